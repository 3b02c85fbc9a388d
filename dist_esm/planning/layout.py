"""Where the proteins of each unit belong in the one output of a file that was cut.

The reader decides which records get an embedding, and of how many residues. So the file is read here as the
reader reads it, before anything is embedded: then every unit knows how much of the output comes before it.
This takes as long as the reader takes, shared by all ranks. Only files are read so that are cut, come to one
output, and have units to embed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace

from dist_esm.attempt import as_value
from dist_esm.config import Compression, Config
from dist_esm.distributed import World
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, num_embedded
from dist_esm.outputs.placed import in_place
from dist_esm.planning.assign import assign_to_bins
from dist_esm.types import Extent, Layout, RecordOutcome, Row, Unit, UnitResult


def lay_out(config: Config, units: Sequence[Unit], done: Sequence[UnitResult], world: World) -> list[Unit]:
    """Tell units where their proteins belong, if these can be written to their places.

    Every rank reads its share of the bytes. A file that cannot be read, or that the policies let fail, gets
    no layout: it fails later, with its reason.

    Parameters
    ----------
    config
        Checked configuration.
    units
        Of all files.
    done
        Units that are done already.
    world
        The ranks.
    """
    codec = in_place(config.format, config.compression is not Compression.none)
    finished = {(result.file, result.ordinal) for result in done}
    missing = {unit.file for unit in units if unit.is_shard and (unit.file, unit.ordinal) not in finished}
    if codec is None or not missing:
        return list(units)
    cut = [unit for unit in units if unit.file in missing]
    sizes = [(unit.slice.stop or unit.slice.start) - unit.slice.start for unit in cut]
    keys = [(str(unit.file), unit.ordinal) for unit in cut]
    own = []
    for index in assign_to_bins(sizes, keys, world.world_size)[world.rank]:
        extent = as_value(extent_of, cut[index], config, codec.text_size)
        own.append((index, None if isinstance(extent, Exception) else astuple(extent)))
    extents = dict(item for share in world.all_gather(own) for item in share)
    by_file: dict[int, list[Extent | None]] = {}
    for index, unit in enumerate(cut):
        extent = extents[index] and Extent(*extents[index])
        by_file.setdefault(unit.file, []).append(extent)
    layouts = {
        file: list(layouts_of([extent for extent in parts if extent is not None]))
        for file, parts in by_file.items()
        if None not in parts
    }
    return [
        replace(unit, layout=layouts[unit.file][unit.ordinal]) if unit.file in layouts else unit
        for unit in units
    ]


def extent_of(unit: Unit, config: Config, text_size: Callable[[Sequence[Row]], int]) -> Extent:
    """Return how much of an output the proteins of a unit take.

    Raises
    ------
    FastaError
        If it is no FASTA, or has what the policies do not let pass.
    OSError
        If it cannot be read.
    """
    rows = list(rows_of(unit, config))
    return Extent(len(rows), sum(row.embedded for row in rows), text_size(rows))


def rows_of(unit: Unit, config: Config) -> Iterator[Row]:
    """Give the rows that the proteins of a unit will have in an output, in order."""
    number = unit.before.sequences - 1
    for protein in read_proteins(unit, config):
        number += not protein.is_continued
        protein, outcome, spans = apply_length_policy(protein, config)
        if outcome is not RecordOutcome.skipped:
            yield Row.of(protein, number, num_embedded(spans), outcome)


def layouts_of(extents: Sequence[Extent]) -> Iterator[Layout]:
    """Give the layouts of the units of a file, in order, given how much of its output each of them takes."""
    digest = hashlib.sha256(json.dumps([astuple(extent) for extent in extents]).encode()).hexdigest()[:16]
    total, before = sum(extents, Extent()), Extent()
    for own in extents:
        yield Layout(before, own, total, digest)
        before += own
