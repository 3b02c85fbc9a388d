"""Where the proteins of each unit belong in the one output of a file that was cut.

The reader decides which records get an embedding, and of how many residues. So the file is read here as the
reader reads it, before anything is embedded: then every unit knows how much of the output comes before it.
This takes as long as the reader takes, shared by all ranks. Only files are read so that are cut, come to one
output, and have units to embed; and units whose residues may find no room in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from dist_esm.attempt import as_value
from dist_esm.config import Compression, Config, Include
from dist_esm.distributed import World
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, num_embedded
from dist_esm.outputs.placed import in_place
from dist_esm.outputs.row_buffer import BUFFER_BYTES
from dist_esm.planning.assign import assign_to_bins
from dist_esm.types import Extent, Layout, RecordOutcome, Row, Unit, UnitResult

LARGE_BYTES = BUFFER_BYTES // 8
"""Bytes of residues from which on they may find no room in memory, beside those of other units."""


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
    extents = read_extents(config, units, read, codec.text_size, world)
    laid_out = list(units)
    by_file: dict[int, list[int]] = {}
    for index in read:
        unit, parts = units[index], extents[index]
        if unit.is_shard:
            by_file.setdefault(unit.file, []).append(index)
        elif parts is not None:
            laid_out[index] = replace(unit, parts=tuple(parts))
    for indices in by_file.values():
        parts_of_units = [parts for index in indices if (parts := extents[index]) is not None]
        if len(parts_of_units) == len(indices):
            for index, layout in zip(
                indices, layouts_of([parts[0] for parts in parts_of_units]), strict=True
            ):
                laid_out[index] = replace(units[index], layout=layout)
    return laid_out


def is_large(unit: Unit, config: Config) -> bool:
    """Tell if the residues of a unit may find no room in memory."""
    num_layers = sum(kind is Include.per_tok for kind, _ in config.output_representations())
    row_bytes = config.model.embed_dim * np.dtype(config.save_dtype.name).itemsize
    return num_layers * row_bytes * unit.count.residues > LARGE_BYTES


def read_extents(
    config: Config,
    units: Sequence[Unit],
    indices: Sequence[int],
    text_size: Callable[[Sequence[Row]], int],
    world: World,
) -> dict[int, list[Extent] | None]:
    """Find out how much each output of some units takes; the ranks share the bytes. None: a unit cannot be
    read."""
    slices = [units[index].slice for index in indices]
    sizes = [
        (slice_.stop or units[index].count.residues) - slice_.start
        for index, slice_ in zip(indices, slices, strict=True)
    ]
    keys = [(str(units[index].file), units[index].ordinal) for index in indices]
    own: list[tuple[int, list[Any] | None]] = []
    for place in assign_to_bins(sizes, keys, world.world_size)[world.rank]:
        index = indices[place]
        parts = as_value(extents_of, units[index], config, text_size)
        own.append((index, None if isinstance(parts, Exception) else list(map(astuple, parts))))
    told = (item for share in world.all_gather(own) for item in share)
    return {index: parts and [Extent(*part) for part in parts] for index, parts in told}


def extents_of(unit: Unit, config: Config, text_size: Callable[[Sequence[Row]], int]) -> list[Extent]:
    """Return how much each output of a unit takes.

    Raises
    ------
    FastaError
        If it is no FASTA, or has what the policies do not let pass.
    OSError
        If it cannot be read.
    """
    parts: list[list[Row]] = [[]]
    part_size = unit.part_size or config.max_proteins_per_output
    num_records = -1
    for protein in read_proteins(unit, config):
        num_records += not protein.is_continued
        if unit.first_part is not None and num_records // part_size == len(parts):
            parts.append([])
        protein, outcome, spans = apply_length_policy(protein, config)
        if outcome is not RecordOutcome.skipped:
            number = unit.before.sequences + num_records
            parts[-1].append(Row.of(protein, number, num_embedded(spans), outcome))
    return [Extent(len(rows), sum(row.embedded for row in rows), text_size(rows)) for rows in parts]


def layouts_of(extents: Sequence[Extent]) -> Iterator[Layout]:
    """Give the layouts of the units of a file, in order, given how much of its output each of them takes."""
    digest = hashlib.sha256(json.dumps([astuple(extent) for extent in extents]).encode()).hexdigest()[:16]
    total, before = sum(extents, Extent()), Extent()
    for own in extents:
        yield Layout(before, own, total, digest)
        before += own
