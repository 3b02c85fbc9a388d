"""Which files, cut into which units, at what cost, on which rank.

Finding files reads directories; cutting looks at a few record borders of large files; everything after that is pure: the same
inputs give the same plan on every rank, and the run compares digests of it before any work.
"""

from __future__ import annotations

import glob
import hashlib
import heapq
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from dist_esm.config import AssignBy
from dist_esm.fasta.blocks import FastaError, count, cut, whole
from dist_esm.types import Count, FastaFile, JoinedFile, Slice, Unit, UnitResult

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
PASSED_OVER = (".", "~")
"""Beginnings of hidden and temporary names."""
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
        text = json.dumps([[asdict(item) for item in self.files], [asdict(item) for item in self.units], self.bins, done], default=str)
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


def count_sequences(path: str | os.PathLike[str]) -> int:
    """Number of records of a FASTA file, plain or gzip: the lines that begin with ``>``.

    Raises
    ------
    OSError
        If the file cannot be read.
    FastaError
        If gzip is damaged.
    """
    return count(whole(Path(path))).sequences


def assign_files_by_size(files: Iterable[Path | str] | Mapping[Path | str, int], num_workers: int) -> list[list[Path]]:
    """Deal files out to workers: most sequences first, each to the worker with the fewest so far, ties by path.

    Parameters
    ----------
    files
        Paths, whose sequences are counted; or a mapping of path to number of sequences, in which case no file is read.
    num_workers
        Number of bins.

    Returns
    -------
    list of `num_workers` lists of Path
        Every file is in exactly one. With fewer files than workers some are empty.

    Raises
    ------
    ValueError
        If `num_workers` is below 1, or a path is named twice.
    """
    counts = {Path(path): number for path, number in files.items()} if isinstance(files, Mapping) else None
    paths = list(counts) if counts is not None else [Path(path) for path in files]
    if len(set(paths)) < len(paths) or (isinstance(files, Mapping) and len(paths) < len(files)):
        raise ValueError("a file is named twice: name each once")
    costs = [counts[path] if counts is not None else count_sequences(path) for path in paths]
    return [[paths[index] for index in own] for own in assign(costs, [str(path) for path in paths], num_workers)]


def assign(costs: Sequence[int], keys: Sequence[str | tuple[str, int]], num_bins: int) -> list[list[int]]:
    """The greedy assignment itself: largest cost first, to the least loaded bin; ties by key, then fewest items, then lowest bin."""
    if num_bins < 1:
        raise ValueError(f"cannot assign to {num_bins} workers: use 1 or more")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, 0, number) for number in range(num_bins)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], keys[i])):
        load, items, number = heap[0]
        bins[number].append(index)
        heapq.heapreplace(heap, (load + costs[index], items + 1, number))
    return bins


def find_files(inputs: Sequence[str]) -> list[FastaFile]:
    """Resolve paths, directories and globs to FASTA files with their outputs, in a stable order.

    A file named outright is taken, hidden or not, link or not. Directories are searched recursively: hidden and temporary names
    are skipped, links are followed, and a file or directory that a search or a glob can reach in two ways is taken once, under
    its real name if that is one of them.

    Raises
    ------
    ValueError
        If a path does not exist or holds no FASTA file, or if two inputs would share an output.
    """
    found: dict[Path, None] = {}
    outright: set[Path] = set()
    roots: list[Path] = []
    for item in inputs:
        path = Path(os.path.abspath(os.path.expanduser(item)))
        if path.is_dir():
            matches, root = sorted(_search(path)), path
            if not matches:
                raise ValueError(f"input={item} holds no FASTA file ({_suffixes()}): name a directory that does")
        elif path.exists():
            if not _has_suffix(path):
                raise ValueError(f"input={item} does not end in {_suffixes()}: rename it if it is FASTA")
            matches, root = [path], path.parent
            outright.add(path)
        elif glob.has_magic(item):
            hits = [Path(os.path.abspath(hit)) for hit in sorted(glob.glob(os.path.expanduser(item), recursive=True))]
            matches = [hit for hit in hits if hit.is_file() and _is_fasta(hit)]
            matches += [match for hit in hits if hit.is_dir() and not hit.name.startswith(PASSED_OVER) for match in sorted(_search(hit))]
            if not matches:
                raise ValueError(f"input={item} matches no FASTA file ({_suffixes()}): check the pattern, and quote it for the shell")
            root = Path(os.path.commonpath([match.parent for match in matches]))
        else:
            raise ValueError(f"input={item} does not exist: name a FASTA file, a directory, a glob or a list of these")
        found.update(dict.fromkeys(matches))
        roots.append(root)
    root = Path(os.path.commonpath(roots))
    real = {path: os.path.realpath(path) for path in found}
    names: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (path not in outright, real[path] != str(path), str(path))):
        names.setdefault(str(path) if path in outright else real[path], path)
    files = []
    for path in sorted(names.values(), key=str):
        stat = path.stat()
        relative = path.relative_to(root)
        source = str(relative).encode("utf-8", "backslashreplace").decode()  # a name may be any bytes
        files.append(FastaFile(path, relative.with_name(_stem(path) + "_ESM"), stat.st_size, stat.st_mtime_ns, source))
    _refuse_collisions(files)
    return files


def refuse_nested(files: Sequence[FastaFile]) -> None:
    """For a format whose outputs are folders: no output may lie inside another.

    Raises
    ------
    ValueError
        If one would.
    """
    by_output = {file.output: file.path for file in files}
    for file in files:
        outer = next((by_output[folder] for folder in file.output.parents if folder in by_output), None)
        if outer is not None:
            raise ValueError(f"{file.path} would be written inside the output folder of {outer}: rename one, or embed them into two output_dirs")


def _suffixes() -> str:
    return " ".join(SUFFIXES) + ", each also with .gz"


def _stem(path: Path) -> str:
    """The name without its FASTA suffix."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[: name.rindex(".")]


def _has_suffix(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _is_fasta(path: Path) -> bool:
    return _has_suffix(path) and not path.name.startswith(PASSED_OVER)


def _search(directory: Path) -> Iterator[Path]:
    """FASTA files below a directory; real names win over links, and no directory is entered twice."""
    entered: set[str] = set()
    files: dict[str, Path] = {}

    def visit(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in entered:
            return
        entered.add(real)
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(PASSED_OVER):
                continue
            target = path if entry.is_symlink() else entry  # a path takes a link to itself for no file, an entry raises
            if target.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif target.is_file() and _is_fasta(path):
                (file_links if entry.is_symlink() else file_names).append(path)

    folders: list[Path] = [directory]
    links: list[Path] = []
    file_names: list[Path] = []
    file_links: list[Path] = []
    while folders or links:
        visit(folders.pop() if folders else links.pop(0))
    for path in sorted(file_names) + sorted(file_links):
        files.setdefault(os.path.realpath(path), path)
    yield from files.values()


def _refuse_collisions(files: Sequence[FastaFile]) -> None:
    taken: dict[Path, Path] = {}
    for file in files:
        other = taken.setdefault(file.output, file.path)
        if other != file.path:
            raise ValueError(f"{other} and {file.path} would both be written to {file.output}: rename one, or embed them into two output_dirs")


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
            slices.append((number, Slice(file.path), f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)))
    return slices


def unit_size(total_bytes: int, unit_share: float) -> int:
    """Bytes above which a file is cut."""
    return total_bytes + 1 if unit_share == 1 else max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, int(total_bytes * unit_share)))


def count_slice(piece: Slice, max_residues: int | None, max_sequences: int, is_cut: bool) -> tuple[list[tuple[Slice, Count]], str | None]:
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
        return [pair for pairs, _ in counted for pair in pairs], next((reason for _, reason in counted if reason), None)
    except (OSError, FastaError) as error:
        return [(piece, Count())], f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)


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
            units.append(Unit(file, ordinal, piece, found, before, len(slices) == 1, part if is_parted else None, unreadable))
            before += found
            part += max(1, math.ceil(found.sequences / max_sequences))
    return units


def cost(unit: Unit, assign_by: AssignBy, embed_dim: int) -> int:
    """What a unit weighs in the greedy assignment.

    `flops`, for one layer of width D: 24 D^2 for each residue and 4 D L^2 for the attention of a protein of L residues.
    """
    if assign_by is AssignBy.sequences:
        return unit.count.sequences
    if assign_by is AssignBy.residues:
        return unit.count.residues
    return 24 * embed_dim**2 * unit.count.residues + 4 * embed_dim * unit.count.squares


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
