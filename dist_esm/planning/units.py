"""Which files, cut into which units, at what cost, on which rank.

Finding files reads directories; cutting looks at a few record borders of large files; everything after that is pure: the same
inputs give the same plan on every rank, and the run compares digests of it before any work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from dist_esm.config import AssignBy
from dist_esm.fasta.blocks import FastaError, whole
from dist_esm.fasta.slices import count, cut
from dist_esm.planning.assign import assign, cost
from dist_esm.types import Count, FastaFile, JoinedFile, Slice, Unit, UnitResult

MAX_UNIT_BYTES = 32 << 20
MIN_UNIT_BYTES = 64 << 10


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
    """Files whose pieces an earlier launch joined, with their outputs; their units are all done."""

    def digest(self) -> str:
        """A fingerprint of files, units and bins."""
        done = [(result.file, result.ordinal) for result in self.done], sorted(self.joined)
        text = json.dumps(
            [[asdict(item) for item in self.files], [asdict(item) for item in self.units], self.bins, done],
            default=str,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def units_of(self, file: int) -> Sequence[Unit]:
        """The units of a file, in order."""
        return self._by_file[file]

    def unit(self, file: int, ordinal: int) -> Unit:
        """A unit by its file and its place in it."""
        return self._by_file[file][ordinal]

    @cached_property
    def _by_file(self) -> dict[int, list[Unit]]:
        found: dict[int, list[Unit]] = {number: [] for number in range(len(self.files))}
        for unit in self.units:
            found[unit.file].append(unit)
        return found


def cut_files(files: Sequence[FastaFile], unit_share: float) -> list[tuple[int, Slice, str | None]]:
    """Slices of every file: (index of the file, slice, why it cannot be read), in the files' order.

    A file is cut if it can be (plain text or block-gzip) and is larger than `unit_share` of all bytes, or than `MAX_UNIT_BYTES`.
    The cuts do not depend on the number of ranks, so that any number of them can go on from what others left.
    """
    unit_bytes = unit_size(sum(file.num_bytes for file in files), unit_share)
    slices: list[tuple[int, Slice, str | None]] = []
    for number, file in enumerate(files):
        try:
            piece = whole(file.path)
            pieces = cut(piece, file.num_bytes, math.ceil(file.num_bytes / unit_bytes))
            slices.extend((number, piece, None) for piece in pieces)
        except (OSError, FastaError) as error:
            slices.append(
                (
                    number,
                    Slice(file.path),
                    f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error),
                )
            )
    return slices


def unit_size(total_bytes: int, unit_share: float) -> int:
    """Bytes above which a file is cut."""
    return (
        total_bytes + 1
        if unit_share == 1
        else max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, int(total_bytes * unit_share)))
    )


def count_slice(
    piece: Slice, max_residues: int | None, max_sequences: int, is_cut: bool
) -> tuple[list[tuple[Slice, Count]], str | None]:
    """Count a slice; one of a cut file that holds more than `max_sequences` is cut again, so that no part of an output has more.

    Returns
    -------
    (slice, count) pairs in order, and why the slice could not be read, if so
    """
    try:
        found = count(piece, max_residues)
        if not is_cut or found.sequences <= max_sequences:
            return [(piece, found)], None
        smaller = cut(piece, 0, math.ceil(found.sequences / max_sequences) + 1)
        if len(smaller) == 1:
            return [(piece, found)], None
        counted = [count_slice(one, max_residues, max_sequences, is_cut) for one in smaller]
        return [pair for pairs, _ in counted for pair in pairs], next(
            (reason for _, reason in counted if reason), None
        )
    except (OSError, FastaError) as error:
        return [(piece, Count())], f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(
            error
        )


def make_units(counted: Sequence[tuple[int, Slice, Count, str | None]], max_sequences: int) -> list[Unit]:
    """Number the slices of each file and tell each what comes before it.

    A file of more than `max_sequences` records is written as parts of so many: each of its units knows the number of its first.
    """
    by_file: dict[int, list[tuple[Slice, Count, str | None]]] = {}
    for file, piece, found, unreadable in counted:
        by_file.setdefault(file, []).append((piece, found, unreadable))
    units: list[Unit] = []
    for file, slices in by_file.items():
        is_parted = sum(found.sequences for _, found, _ in slices) > max_sequences
        before, part = Count(), 0
        for ordinal, (piece, found, unreadable) in enumerate(slices):
            units.append(
                Unit(
                    file,
                    ordinal,
                    piece,
                    found,
                    before,
                    len(slices) == 1,
                    part if is_parted else None,
                    unreadable,
                )
            )
            before += found
            part += max(1, math.ceil(found.sequences / max_sequences))
    return units


def make_plan(
    files: Sequence[FastaFile],
    units: Sequence[Unit],
    num_workers: int,
    assign_by: AssignBy,
    embed_dim: int,
    done: Sequence[UnitResult] = (),
    joined: Mapping[int, JoinedFile] | None = None,
) -> Plan:
    """Assign the units that are not done to ranks."""
    finished = {(result.file, result.ordinal) for result in done}
    missing = [index for index, unit in enumerate(units) if (unit.file, unit.ordinal) not in finished]
    costs = [cost(units[index], assign_by, embed_dim) for index in missing]
    keys = [(str(files[units[index].file].path), units[index].ordinal) for index in missing]
    bins = tuple(tuple(missing[item] for item in own) for own in assign(costs, keys, num_workers))
    return Plan(tuple(files), tuple(units), bins, tuple(done), joined or {})
