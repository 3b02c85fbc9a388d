"""Files dealt out to workers by their number of sequences."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_esm.fasta.blocks import FastaError
from dist_esm.planning.assign import assign_files_by_size, count_sequences
from helpers.fasta import random_sequence, write
from helpers.intake import GOOD

ZIPPED = gzip.compress("".join(f">r{i}\n{random_sequence(50, i)}\n" for i in range(40)).encode(), mtime=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.integers(0, 50), max_size=30),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_file_goes_to_the_worker_with_the_fewest_sequences_so_far(given_counts, num_workers, rng):
    counts = {Path(name): number for name, number in given_counts.items()}
    bins = assign_files_by_size(counts, num_workers)
    assert len(bins) == num_workers
    assert Counter(path for own in bins for path in own) == Counter(list(counts))
    loads = [0] * num_workers
    left = [list(own) for own in bins]
    for path in sorted(counts, key=lambda path: (-counts[path], str(path))):
        (worker,) = [number for number, own in enumerate(left) if own[:1] == [path]]
        assert loads[worker] == min(loads)
        loads[worker] += counts[path]
        left[worker].pop(0)
    shuffled = list(counts.items())
    rng.shuffle(shuffled)
    assert assign_files_by_size(dict(shuffled), num_workers) == bins
    if len(counts) >= num_workers:
        assert all(bins)


def test_files_are_counted_when_no_counts_are_given(tmp_path):
    paths = [write(tmp_path / f"{n}.fasta", ">x\nMK\n" * n) for n in (1, 5, 3, 2)]
    assert assign_files_by_size(paths, 2) == [[paths[1], paths[0]], [paths[2], paths[3]]]
    assert assign_files_by_size(paths[:1], 3) == [[paths[0]], [], []]
    assert assign_files_by_size([], 2) == [[], []]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 workers"):
        assign_files_by_size({"a": 1}, 0)
    with pytest.raises(ValueError, match="named twice"):
        assign_files_by_size({"a": 1, Path("a"): 2}, 1)
    path = write(tmp_path / "a.fasta", GOOD)
    with pytest.raises(ValueError, match="named twice"):
        assign_files_by_size([path, str(path)], 2)
    with pytest.raises(FastaError, match="truncated gzip"):
        count_sequences(write(tmp_path / "b.fasta.gz", ZIPPED[:50]))
    with pytest.raises(OSError, match="missing"):
        count_sequences(tmp_path / "missing.fasta")
