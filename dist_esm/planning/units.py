"""The plan: files, the units they are cut into, and the rank that takes each.

Cutting looks at a few record borders of large files. Everything after that is pure: the same inputs give
the same plan on every rank, and the run compares digests of it before any work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from dist_esm.config import AssignBy
from dist_esm.fasta.blocks import FastaError, whole_file
from dist_esm.fasta.header_texts import HeaderTexts
from dist_esm.fasta.slices import count_records, cut_slice
from dist_esm.outputs.in_hand import Deaths, name_of
from dist_esm.planning.assign import assign_to_bins, unit_cost
from dist_esm.types import (
    Count,
    Failure,
    FastaFile,
    JoinedFile,
    LengthHistogram,
    Slice,
    Unit,
    UnitFailure,
    UnitResult,
)

MAX_UNIT_BYTES = 32 << 20
MIN_UNIT_BYTES = 32 << 10

CountedSlice = tuple[int, Slice, Count, str | None]
"""Index of a file, a slice of it, what it holds, and why it cannot be read, if so."""


@dataclass(frozen=True)
class Plan:
    """The whole run, as every rank computes it."""

    files: tuple[FastaFile, ...]
    units: tuple[Unit, ...]
    bins: tuple[tuple[int, ...], ...]
    """For each rank the indices of its units, in the order in which it takes them."""
    done: tuple[UnitResult, ...] = ()
    """Units that an earlier launch finished; they are in no bin."""
    joined: Mapping[int, JoinedFile] = field(default_factory=dict)
    """Files whose shards an earlier launch joined, with their outputs; their units are all done."""
    costs: tuple[int, ...] = ()
    """What each unit costs."""
    suspects: tuple[int, ...] = ()
    """Units that may have killed a process: they are in no bin, and run last, one at a time."""
    quarantined: tuple[UnitFailure, ...] = ()
    """Units that killed a process while they alone were in hand: they do not run."""
    remarks: Mapping[int, str] = field(default_factory=dict)
    """By file, what a person should know of it before it is embedded."""
    lengths: LengthHistogram = field(default_factory=LengthHistogram)
    """Of all records of all files."""

    def digest(self) -> str:
        """Return a fingerprint of files, units and bins."""
        done = [(result.file, result.ordinal) for result in self.done], sorted(self.joined)
        quarantined = [failure.file for failure in self.quarantined]
        units = [
            (
                replace(unit, layout=None, parts=()),
                unit.layout and unit.layout.digest,
                [layout.digest for layout in unit.parts],
            )
            for unit in self.units
        ]
        # It takes a tenth of the time of JSON, which is seconds for a hundred thousand files.
        text = repr((self.files, units, self.bins, done, self.suspects, quarantined))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def units_of(self, file: int) -> Sequence[Unit]:
        """Return the units of a file, in order."""
        return self._by_file[file]

    def unit(self, file: int, ordinal: int) -> Unit:
        """Return a unit by its file and its place in it."""
        return self._by_file[file][ordinal]

    @cached_property
    def _by_file(self) -> dict[int, list[Unit]]:
        by_file: dict[int, list[Unit]] = {file: [] for file in range(len(self.files))}
        for unit in self.units:
            by_file[unit.file].append(unit)
        return by_file


def cut_files(files: Sequence[FastaFile], unit_share: float) -> list[tuple[int, Slice, str | None]]:
    """Cut every file into slices, in the files' order.

    A file is cut if it can be (plain text or block-gzip) and is larger than `unit_share` of all bytes, or
    than `MAX_UNIT_BYTES`. The cuts do not depend on the number of ranks, so any number of them can resume a
    run.

    Returns
    -------
    list of (int, Slice, str or None)
        Index of the file, a slice of it, and why it cannot be read, if so.
    """
    unit_bytes = unit_size(sum(file.num_bytes for file in files), unit_share)
    slices: list[tuple[int, Slice, str | None]] = []
    for index, file in enumerate(files):
        if file.problem is not None:
            slices.append((index, Slice(file.path), file.problem))
            continue
        try:
            num_slices = math.ceil(file.num_bytes / unit_bytes) if file.copy is None else 1
            file_slices = cut_slice(whole_file(file.location), file.num_bytes, num_slices)
            slices.extend((index, slice_, None) for slice_ in file_slices)
        except (OSError, FastaError) as error:
            slices.append((index, Slice(file.path), reason(error)))
    return slices


def reason(error: OSError | FastaError) -> str:
    """Return why a file cannot be read, as its failure will say it."""
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)


def unit_size(total_bytes: int, unit_share: float) -> int:
    """Return the number of bytes above which a file is cut."""
    if unit_share == 1:
        return total_bytes + 1
    return max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, int(total_bytes * unit_share)))


def count_slice(
    slice_: Slice,
    max_residues: int | None,
    max_sequences: int,
    is_cut: bool,
    max_text: int | None = None,
    histogram: LengthHistogram | None = None,
) -> tuple[list[tuple[Slice, Count]], str | None]:
    """Count a slice; if it is of a cut file and holds more than `max_sequences`, cut it again.

    No part of an output has more records than that, nor ids and headers of more than `max_text` bytes.
    `histogram` is told of the records' lengths.

    Returns
    -------
    list of (Slice, Count)
        In order.
    str or None
        Why the slice cannot be read, if so.
    """
    try:
        texts = HeaderTexts() if max_text is not None else None
        lengths = LengthHistogram()
        count = count_records(slice_, max_residues, texts, lengths)
        if histogram is not None:
            histogram.merge(lengths)
        if texts is not None and max_text is not None:
            count = replace(count, text=texts.num_bytes, part_size=texts.part_size(max_sequences, max_text))
        if not is_cut or count.sequences <= max_sequences:
            return [(slice_, count)], None
        smaller = cut_slice(slice_, 0, math.ceil(count.sequences / max_sequences) + 1)
        if len(smaller) == 1:
            return [(slice_, count)], None
        counted = [count_slice(part, max_residues, max_sequences, is_cut, max_text) for part in smaller]
        unreadable = next((problem for _, problem in counted if problem), None)
        return [pair for pairs, _ in counted for pair in pairs], unreadable
    except (OSError, FastaError) as error:
        return [(slice_, Count())], reason(error)


def make_units(
    counted: Sequence[CountedSlice], max_sequences: int, max_text: int | None = None
) -> list[Unit]:
    """Number the slices of each file and tell each what comes before it.

    A file of more than `max_sequences` records, or with ids and headers of more than `max_text` bytes, is
    written as numbered parts: each of its units knows the number of its first part, and their size.
    """
    by_file: dict[int, list[CountedSlice]] = {}
    for item in counted:
        by_file.setdefault(item[0], []).append(item)
    units: list[Unit] = []
    for slices in by_file.values():
        total = sum((count for _, _, count, _ in slices), Count())
        is_parted = total.sequences > max_sequences or (max_text is not None and total.text > max_text)
        before, part = Count(), 0
        for ordinal, (file, slice_, count, unreadable) in enumerate(slices):
            first_part = part if is_parted else None
            is_whole = len(slices) == 1
            part_size = min(max_sequences, count.part_size or max_sequences)
            units.append(
                Unit(file, ordinal, slice_, count, before, is_whole, first_part, part_size, unreadable)
            )
            before += count
            part += max(1, math.ceil(count.sequences / part_size))
    return units


def make_plan(
    files: Sequence[FastaFile],
    units: Sequence[Unit],
    num_workers: int,
    assign_by: AssignBy,
    embed_dim: int,
    done: Sequence[UnitResult] = (),
    joined: Mapping[int, JoinedFile] | None = None,
    deaths: Mapping[str, Deaths] | None = None,
    remarks: Mapping[int, str] | None = None,
    lengths: LengthHistogram | None = None,
) -> Plan:
    """Assign the units that are not done to ranks, but for those whose processes died before."""
    finished = {(result.file, result.ordinal) for result in done}
    missing = [index for index, unit in enumerate(units) if (unit.file, unit.ordinal) not in finished]
    costs = [unit_cost(unit, assign_by, embed_dim) for unit in units]
    suspects, quarantined = set_aside(files, units, missing, deaths or {})
    aside = {*suspects, *((failure.file, failure.ordinal) for failure in quarantined)}
    free = [index for index in missing if not {index, (units[index].file, units[index].ordinal)} & aside]
    keys = [(str(files[units[index].file].path), units[index].ordinal) for index in free]
    assigned = assign_to_bins([costs[index] for index in free], keys, num_workers)
    bins = tuple(tuple(free[item] for item in own) for own in assigned)
    return Plan(
        tuple(files),
        tuple(units),
        bins,
        tuple(done),
        joined or {},
        tuple(costs),
        suspects,
        quarantined,
        remarks or {},
        lengths or LengthHistogram(),
    )


def set_aside(
    files: Sequence[FastaFile], units: Sequence[Unit], missing: Sequence[int], deaths: Mapping[str, Deaths]
) -> tuple[tuple[int, ...], tuple[UnitFailure, ...]]:
    """Find the units whose processes died before.

    Returns
    -------
    units that run last, those with the fewest deaths first; failures of units that do not run any more
    """
    suspects: list[tuple[int, int]] = []
    quarantined = []
    for index in missing if deaths else []:
        unit = units[index]
        record = deaths.get(name_of(files[unit.file], unit))
        if record is None:
            continue
        if record.is_quarantined:
            path = str(files[unit.file].path)
            failure = Failure(path, "QuarantinedError", record.describe(), 0)
            quarantined.append(UnitFailure(unit.file, unit.ordinal, failure, 0.0))
        elif record.is_suspect:
            suspects.append((record.seen + record.unseen, index))
    return tuple(index for _, index in sorted(suspects)), tuple(quarantined)
