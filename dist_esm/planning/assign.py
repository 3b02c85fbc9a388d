"""The greedy assignment: largest first, each to the least loaded."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dist_esm.config import AssignBy
from dist_esm.fasta.blocks import whole
from dist_esm.fasta.slices import count
from dist_esm.types import Unit


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


def assign_files_by_size(
    files: Iterable[Path | str] | Mapping[Path | str, int], num_workers: int
) -> list[list[Path]]:
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
    return [
        [paths[index] for index in own] for own in assign(costs, [str(path) for path in paths], num_workers)
    ]


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


def cost(unit: Unit, assign_by: AssignBy, embed_dim: int) -> int:
    """What a unit weighs in the greedy assignment.

    `flops`, for one layer of width D: 24 D^2 for each residue and 4 D L^2 for the attention of a protein of L residues.
    """
    if assign_by is AssignBy.sequences:
        return unit.count.sequences
    if assign_by is AssignBy.residues:
        return unit.count.residues
    return 24 * embed_dim**2 * unit.count.residues + 4 * embed_dim * unit.count.squares
