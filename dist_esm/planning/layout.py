"""Where the proteins of each unit belong in the one output of a file that was cut.

The reader decides which records get an embedding, and of how many residues. So the file is read here as the
reader reads it, before anything is embedded: then every unit knows how much of the output comes before it.
This takes as long as the reader takes, shared by all ranks. Only files are read so that are cut, come to one
output, and have units to embed; and units whose residues may find no room in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain

import numpy as np

from dist_esm.attempt import as_value
from dist_esm.config import Compression, Config, Include
from dist_esm.distributed import World
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, num_embedded
from dist_esm.outputs.arena import BUFFER_BYTES
from dist_esm.outputs.formats.base import InPlace
from dist_esm.outputs.placed import in_place
from dist_esm.planning.assign import assign_to_bins
from dist_esm.types import Extent, Layout, RecordOutcome, Row, Unit, UnitResult

LARGE_BYTES = BUFFER_BYTES // 8
"""Bytes of residues from which on they may find no room in memory, beside those of other units."""


@dataclass(frozen=True)
class Part:
    """What some records take of one output."""

    extent: Extent
    lengths: list[int]
    """Embedded residues of each of them, if the format's places depend on these."""


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
    if codec is None:
        return list(units)
    finished = {(result.file, result.ordinal) for result in done}
    is_missing = [(unit.file, unit.ordinal) not in finished for unit in units]
    cut = {unit.file for unit, missing in zip(units, is_missing, strict=True) if missing and unit.is_shard}
    read = [
        index
        for index, (unit, missing) in enumerate(zip(units, is_missing, strict=True))
        if unit.file in cut or (missing and is_large(unit, config))
    ]
    if not read:
        return list(units)
    found = read_extents(config, units, read, codec, world)
    laid_out = list(units)
    by_file: dict[int, list[int]] = {}
    for index in read:
        if units[index].is_shard:
            by_file.setdefault(units[index].file, []).append(index)
        else:
            parts = tuple(layout for part in found[index] for layout in layouts_of([part]))
            laid_out[index] = replace(units[index], parts=parts)
    for indices in by_file.values():
        if all(found[index] for index in indices):
            layouts = layouts_of([found[index][0] for index in indices])
            for index, layout in zip(indices, layouts, strict=True):
                laid_out[index] = replace(units[index], layout=layout)
    return laid_out


def is_large(unit: Unit, config: Config) -> bool:
    """Tell if the residues of a unit may find no room in memory."""
    num_layers = sum(kind is Include.per_tok for kind, _ in config.output_representations())
    row_bytes = config.model.embed_dim * np.dtype(config.save_dtype.name).itemsize
    return num_layers * row_bytes * unit.count.residues > LARGE_BYTES


def read_extents(
    config: Config, units: Sequence[Unit], indices: Sequence[int], codec: InPlace, world: World
) -> dict[int, list[Part]]:
    """Find out how much each output of some units takes; the ranks share the bytes.

    Returns
    -------
    dict
        By index of the unit, its outputs; [] if it cannot be read.
    """
    slices = [units[index].slice for index in indices]
    sizes = [
        (slice_.stop or units[index].count.residues) - slice_.start
        for index, slice_ in zip(indices, slices, strict=True)
    ]
    keys = [(str(units[index].file), units[index].ordinal) for index in indices]
    own: list[tuple[int, list[Part]]] = []
    for place in assign_to_bins(sizes, keys, world.world_size)[world.rank]:
        parts = as_value(parts_of, units[indices[place]], config, codec)
        own.append((indices[place], [] if isinstance(parts, Exception) else parts))
    told = (item for share in world.all_gather(own, Part, Extent) for item in share)
    return dict(told)


def parts_of(unit: Unit, config: Config, codec: InPlace) -> list[Part]:
    """Return how much the proteins of a unit take of each of its outputs.

    Raises
    ------
    FastaError
        If it is no FASTA, or has what the policies do not let pass.
    OSError
        If it cannot be read.
    """
    part_size = unit.part_size or config.max_proteins_per_output
    found: list[Part] = []
    rows: list[Row] = []
    num_records = -1
    for protein in read_proteins(unit, config):
        num_records += not protein.is_continued
        if unit.first_part is not None and num_records // part_size > len(found):
            found.append(part_of(rows, codec))
            rows = []
        protein, outcome, spans = apply_length_policy(protein, config)
        if outcome is not RecordOutcome.skipped:
            number = unit.before.sequences + num_records
            rows.append(Row.of(protein, number, num_embedded(spans), outcome))
    return [*found, part_of(rows, codec)]


def part_of(rows: Sequence[Row], codec: InPlace) -> Part:
    """Return how much of an output these rows take."""
    lengths = [row.embedded for row in rows]
    extent = Extent(len(rows), sum(lengths), codec.text_size(rows))
    return Part(extent, lengths if codec.has_lengths else [])


def layouts_of(parts: Sequence[Part]) -> Iterator[Layout]:
    """Give the layouts of parts of one output that follow one another."""
    extents = [part.extent for part in parts]
    text = json.dumps([[astuple(extent) for extent in extents], [part.lengths for part in parts]])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    total, before = sum(extents, Extent()), Extent()
    lengths = tuple(chain.from_iterable(part.lengths for part in parts))
    for own in extents:
        yield Layout(before, own, total, digest, lengths)
        before += own
