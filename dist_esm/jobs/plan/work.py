"""What is left to do of a plan, in sums: records, work for the device, and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dist_esm.config import Compression, Config, Include, Long, SaveDtype
from dist_esm.outputs.formats.base import ContentSize
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.planning.units import Plan
from dist_esm.types import Count

ID_BYTES = 16
"""Bytes of an id, of which a scan knows only that it is a part of the header."""
COMPRESSED_SHARE = 0.93
"""What zstd leaves of numbers."""
LEAST_SHARE = 0.9
"""So much of what a scan counts is taken to be embedded when a run is refused for its size: policies that a
scan does not know leave out some records."""


@dataclass(frozen=True)
class Work:
    """What is left to do."""

    files: int
    """With a unit that is not done."""
    count: Count
    """Of the units that are not done."""
    outputs: int
    """Files, or numbered parts of files, to write."""


def work_of(plan: Plan) -> Work:
    """Return what is left to do of a plan."""
    indices = [index for own in plan.bins for index in own] + list(plan.suspects)
    files = {plan.units[index].file for index in indices}
    parts = 0
    for index in indices:
        unit = plan.units[index]
        if unit.first_part is not None:
            parts += max(1, -(-unit.count.sequences // (unit.part_size or unit.count.sequences or 1)))
    in_parts = {plan.units[index].file for index in indices if plan.units[index].first_part is not None}
    return Work(len(files), count_of(plan, indices), len(files) - len(in_parts) + parts)


def count_of(plan: Plan, indices: Iterable[int]) -> Count:
    """Return the sum over units of what a scan found, as far as it is about records."""
    counts = [plan.units[index].count for index in indices]
    return Count(
        sequences=sum(count.sequences for count in counts),
        residues=sum(count.residues for count in counts),
        squares=sum(count.squares for count in counts),
        seen=sum(count.seen for count in counts),
        num_long=sum(count.num_long for count in counts),
        headers=sum(count.headers for count in counts),
    )


def content_size(work: Work, config: Config) -> ContentSize:
    """Return how much all outputs together will hold, as far as a scan knows it."""
    count, limit = work.count, config.truncation_seq_length
    proteins, residues = count.sequences, count.seen
    if config.long is Long.skip and limit is not None:
        proteins, residues = proteins - count.num_long, residues - count.num_long * limit
    elif config.long is Long.window:
        residues = count.residues
    kinds: dict[str, list[int]] = {kind.name: [] for kind in Include}
    for kind, layer in config.output_representations():
        kinds[kind.name].append(layer)
    headers = max(0, count.headers - count.sequences)  # without the `>`
    return ContentSize(
        proteins=proteins,
        residues=residues,
        id_bytes=min(headers, ID_BYTES * count.sequences),
        header_bytes=headers,
        include=[kind.name for kind in config.include],
        kinds=kinds,
        width=config.model.embed_dim,
        itemsize=2 if config.save_dtype is SaveDtype.float16 else 4,
    )


@dataclass(frozen=True)
class Output:
    """What the outputs will take."""

    num_bytes: int
    """About."""
    least_bytes: int
    """For certain: numbers alone, of most of the records."""
    files: int
    """Files and folders, about."""
    least_files: int


def output_of(work: Work, config: Config) -> Output:
    """Return what the outputs of what is left to do will take.

    Outputs grow with their content, so all are taken for one and a few empty ones.
    """
    codec = FORMATS[config.format.name].codec
    size = content_size(work, config)
    empty = content_size(Work(0, Count(), 0), config)
    more = max(0, work.outputs - 1)
    num_bytes = codec.output_bytes(size) + more * codec.output_bytes(empty) if work.outputs else 0
    least = size.number_bytes
    if config.compression is not Compression.none:
        num_bytes -= round((1 - COMPRESSED_SHARE) * least)
        least = round(COMPRESSED_SHARE * least)
    num_files = codec.output_files(size) + more * codec.output_files(empty) if work.outputs else 0
    return Output(num_bytes, round(LEAST_SHARE * least), num_files, round(LEAST_SHARE * num_files))
