"""The greedy assignment: largest first, each to the least loaded."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dist_esm.config import AssignBy
from dist_esm.fasta.blocks import whole_file
from dist_esm.fasta.slices import count_records
from dist_esm.types import Unit


def count_sequences(path: str | os.PathLike[str]) -> int:
    """Count the records of a FASTA file, plain or compressed: the lines that begin with ``>``.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    int
        Number of records, those that the policies would skip included.

    Raises
    ------
    OSError
        If the file cannot be read.
    FastaError
        If its compression is damaged.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "two.fasta")
    ...     _ = path.write_text(">a\\nMKV\\n>b\\nGAV\\n")
    ...     count_sequences(path)
    2
    """
    return count_records(whole_file(Path(path))).sequences


def assign_files_by_size(
    files: Iterable[Path | str] | Mapping[Path | str, int], num_workers: int
) -> list[list[Path]]:
    """Deal files out to workers: most sequences first, each to the worker with the fewest so far.

    Ties go by path, so the same files give the same bins, in whatever order they are named.

    Parameters
    ----------
    files
        Paths, whose sequences are counted; or a mapping of path to number of sequences, then no file is read.
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
    OSError, FastaError
        If a file whose sequences are to be counted cannot be read.

    Examples
    --------
    >>> bins = assign_files_by_size({"a.fasta": 500, "b.fasta": 300, "c.fasta": 200, "d.fasta": 100}, 2)
    >>> [[path.name for path in files] for files in bins]
    [['a.fasta', 'd.fasta'], ['b.fasta', 'c.fasta']]
    """
    given = {Path(path): count for path, count in files.items()} if isinstance(files, Mapping) else None
    paths = list(given) if given is not None else [Path(path) for path in files]
    if len(set(paths)) < len(paths) or (isinstance(files, Mapping) and len(paths) < len(files)):
        raise ValueError("a file is named twice: name each once")
    costs = [given[path] if given is not None else count_sequences(path) for path in paths]
    bins = assign_to_bins(costs, [str(path) for path in paths], num_workers)
    return [[paths[index] for index in own] for own in bins]


def assign_to_bins(
    costs: Sequence[int], keys: Sequence[str | tuple[str, int]], num_bins: int
) -> list[list[int]]:
    """Put items into bins: largest cost first, each into the least loaded bin.

    Parameters
    ----------
    costs
        Cost of each item.
    keys
        What tells items of the same cost apart, so that their order does not matter.
    num_bins
        Number of bins. Of equally loaded ones the one with the fewest items is next, then the lowest.

    Returns
    -------
    list of `num_bins` lists of int
        Indices of items, in the order in which they were put.

    Raises
    ------
    ValueError
        If `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"cannot assign to {num_bins} workers: use 1 or more")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, 0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], keys[i])):
        load, num_items, index = heap[0]
        bins[index].append(item)
        heapq.heapreplace(heap, (load + costs[item], num_items + 1, index))
    return bins


def unit_cost(unit: Unit, assign_by: AssignBy, embed_dim: int) -> int:
    """Return the cost of a unit in the greedy assignment."""
    if assign_by is AssignBy.sequences:
        return unit.count.sequences
    if assign_by is AssignBy.residues:
        return unit.count.residues
    return unit.count.flops(embed_dim)
