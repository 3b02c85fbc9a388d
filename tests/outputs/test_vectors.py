"""Vectors of a run: the same as numpy's array, and no more of them read than is asked for."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_esm import load
from dist_esm.config import Format
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.types import Row
from helpers.command import environment
from helpers.compare import assert_same
from helpers.outputs import PROVENANCE, write_journal, write_table
from helpers.standin import WIDTH
from helpers.warm import run_warm

COUNTS = (5, 0, 1, 3000, 0, 7)
TOTAL = sum(COUNTS)
LAZY = [Format.npy, Format.safetensors, Format.parquet]


def write_run(
    folder: Path, kind: Format, counts=COUNTS, width=WIDTH, dtype=torch.float32, ids=None
) -> np.ndarray:
    """Write outputs and a journal of them; returns the means of all."""
    everything = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    start, paths = 0, []
    for number, count in enumerate(counts):
        rows = [
            Row(ids[place] if ids else f"p{place}", f"p{place} header", i, 4, 4, "ok", 0, 0, 0, 0)
            for i, place in enumerate(range(start, start + count))
        ]
        mean = everything[start : start + count]
        table = OutputTable(f"{number}.fasta", PROVENANCE, ["mean"], 33, rows, {33: mean}, {}, {}, [])
        paths.append(write_table(kind, table, folder / f"{number:03}_ESM"))
        start += count
    write_journal(folder, *(str(path.relative_to(folder)) for path in paths))
    return everything.float().numpy()


@pytest.fixture(scope="module", params=Format, ids=lambda kind: kind.name)
def run(request, tmp_path_factory):
    counts = COUNTS if request.param in (*LAZY, Format.pt) else (5, 0, 1, 40, 0, 7)
    folder = tmp_path_factory.mktemp(request.param.name)
    expected = write_run(folder, request.param, counts)
    return load(folder), expected


def test_it_is_the_array(run):
    back, expected = run
    vectors = back.vectors
    assert (vectors.shape, vectors.dtype, vectors.ndim, len(vectors), vectors.size) == (
        expected.shape,
        expected.dtype,
        2,
        len(expected),
        expected.size,
    )
    assert_same(vectors, expected)
    assert_same(back.to_numpy(), expected)
    assert back.to_numpy().flags.writeable
    for row, right in zip(vectors, expected, strict=True):
        assert_same(row, right)
    assert "float32, shape" in repr(vectors)
    assert_same(pickle.loads(pickle.dumps(vectors))[-1], expected[-1])


def test_numpy_takes_it(run):
    back, expected = run
    vectors = back.vectors
    assert_same(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1))
    assert_same(np.concatenate([vectors, vectors]), np.concatenate([expected, expected]))
    assert_same(np.mean(vectors, axis=0), expected.mean(0))
    assert_same(vectors.mean(axis=0), expected.mean(0))
    assert_same(vectors - vectors.mean(0), expected - expected.mean(0))
    assert_same(2 * vectors, 2 * expected)
    assert_same(expected - vectors, np.zeros_like(expected))
    assert_same(vectors @ expected.T, expected @ expected.T)
    assert_same(vectors > 0, expected > 0)
    assert_same(vectors.T, expected.T)
    assert_same(vectors.astype(np.float64), expected.astype(np.float64))
    assert_same(np.array(vectors, dtype=np.float16), expected.astype(np.float16))
    assert_same(torch.from_numpy(back.to_numpy()).numpy(), expected)
    assert not hasattr(vectors, "todense")
    with pytest.raises(AttributeError, match="no attribute 'meen'"):
        vectors.meen  # noqa: B018 - read for its error
    with pytest.raises(TypeError):
        vectors[0, 0] = 1


integers = st.integers(-TOTAL, TOTAL - 1)
slices = st.slices(TOTAL)
rows = st.one_of(
    integers,
    slices,
    st.lists(integers, max_size=30),
    st.lists(integers, max_size=30).map(lambda values: np.array(values, dtype=np.int32)),
    st.lists(integers, min_size=4, max_size=4).map(lambda values: np.array(values).reshape(2, 2)),
    st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).random(TOTAL) < 0.01),
    st.sampled_from([np.int64(3), ..., None]),
)
columns = st.one_of(st.integers(-WIDTH, WIDTH - 1), st.slices(WIDTH), st.just(np.array([0, 2])), st.just(...))
masks = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).random((TOTAL, WIDTH)) < 0.01)
keys = st.one_of(rows, st.tuples(rows, columns), st.tuples(rows), st.just(()), masks)


@pytest.fixture(scope="module", params=LAZY, ids=lambda kind: kind.name)
def lazy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.name)
    expected = write_run(folder, request.param)
    return load(folder).vectors, expected


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=keys)
def test_every_index_is_numpys(lazy, key):
    vectors, expected = lazy
    try:
        right = expected[key]
    except IndexError:
        with pytest.raises(IndexError):
            vectors[key]
        return
    assert_same(vectors[key], right)


@pytest.mark.parametrize("key", [TOTAL, -TOTAL - 1, [0, TOTAL], [0.5], "p1", np.ones(3, bool), (0, WIDTH)])
def test_what_is_out_of_range_is_an_index_error(lazy, key):
    with pytest.raises(IndexError):
        lazy[0][key]


@pytest.mark.parametrize("kind", [Format.npy, Format.safetensors, Format.pt])
def test_rows_of_one_output_are_not_copied(tmp_path, kind):
    expected = write_run(tmp_path, kind, (50, 50))
    vectors = load(tmp_path).vectors
    mapped = vectors[10:20]
    assert not mapped.flags.owndata
    assert np.shares_memory(mapped, vectors[12:15])
    assert_same(mapped, expected[10:20])
    if kind is not Format.pt:  # torch maps for reading and writing, in memory alone
        assert not mapped.flags.writeable
    assert vectors[45:55].flags.owndata
    one = load(tmp_path / f"000_ESM{'' if kind is Format.npy else '.' + kind.name}").vectors
    assert np.shares_memory(np.asarray(one), np.asarray(one, copy=False))
    assert not np.shares_memory(np.asarray(one), np.array(one))
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(vectors, copy=False)


@pytest.mark.parametrize("kind", LAZY)
def test_float16_becomes_float32(tmp_path, kind):
    expected = write_run(tmp_path, kind, (50, 50), dtype=torch.float16)
    assert_same(load(tmp_path).vectors, expected)
    assert_same(load(tmp_path).vectors[[3, 99, 3]], expected[[3, 99, 3]])


OPEN = """
import os, resource, sys
import numpy as np
from dist_esm import load
import pyarrow.parquet
run = load(sys.argv[1])
def told():
    mapped = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
    return mapped, int(open("/proc/self/io").read().split("rchar:")[1].split()[0])
before = told()
vectors = run.vectors
after = told()
assert vectors.shape == (80_000, 256), vectors.shape
vectors[40_000:40_010].sum()
sliced = told()
print(*(1024 * (b[0] - a[0]) for a, b in ((before, after), (after, sliced))), after[1] - before[1])
"""


@pytest.mark.parametrize("kind", LAZY)
def test_opening_a_run_reads_no_numbers_and_no_ids(tmp_path, kind):
    """80,000 proteins of 256 numbers are 82 MB, and 8 MB of ids and headers."""
    write_run(tmp_path, kind, (10_000,) * 8, 256, ids=[f"{'p' * 40}{i}" for i in range(80_000)])
    line = [sys.executable, "-c", OPEN, str(tmp_path)]
    done = run_warm(line, environment(), 120)
    assert done.returncode == 0, done.stderr
    grown, grown_for_slice, read = map(int, done.stdout.split())
    assert grown < 12e6
    assert read < 1e6
    assert grown_for_slice < 3e6


@pytest.mark.parametrize("kind", LAZY)
def test_many_outputs_open_soon(tmp_path, kind):
    """A tenth of 1,000 outputs in more than a tenth of their time: scripts/bench_load.py has all."""
    write_run(tmp_path, kind, (200,) * 100, 8)
    assert len(load(tmp_path)) == 20_000  # what reads the format is imported
    begun = time.monotonic()
    assert load(tmp_path).vectors.shape == (20_000, 8)
    assert time.monotonic() - begun < 2


RESIDUES = """
import sys
from dist_esm import load
import pyarrow.parquet
run = load(sys.argv[1])
assert run.positions("p7") == [7]
before = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
rows = run.residues("p7")
after = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
assert rows.shape == (500, 640) and (rows == 7).all()
print(1024 * (after - before))
"""


@pytest.mark.parametrize("kind", Format)
def test_residues_of_a_protein_are_read_alone(tmp_path, kind):
    """100 proteins of 500 residues of 640 numbers are 128 MB; one is 1.3 MB."""
    lengths = [500] * 100
    rows = [Row(f"p{i}", f"p{i}", i, 500, 500, "ok", 0, 0, 0, 0) for i in range(100)]
    chunks = ChunkedTensor([torch.full((length, 640), float(i)) for i, length in enumerate(lengths)])
    mean = torch.zeros(100, 640)
    table = OutputTable(
        "a.fasta", PROVENANCE, ["mean", "per_tok"], 33, rows, {33: mean}, {}, {33: chunks}, []
    )
    path = write_table(kind, table, tmp_path / "a_ESM")
    line = [sys.executable, "-c", RESIDUES, str(path)]
    done = run_warm(line, environment(), 120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16e6  # with what a forked process has to map


def test_ids_are_found_without_being_kept_also_if_their_hashes_are_the_same(tmp_path, monkeypatch):
    ids = [f"p{i % 30}" for i in range(100)]
    write_run(tmp_path, Format.npy, (30, 40, 30), ids=ids)
    for hashed in (hash, lambda name: len(name), lambda name: 7):
        monkeypatch.setattr("dist_esm.outputs.positions.hash_of", hashed)
        run = load(tmp_path)
        assert run.positions("p3") == [3, 33, 63, 93]
        assert "p29" in run
        assert "p30" not in run
        assert 5 not in run
        assert "ids" not in vars(run)
        assert_same(run["p29"], run.vectors[29])
        assert_same(run[["p29", 31, "p0", -1]], np.asarray(run.vectors)[[29, 31, 0, 99]])
        assert_same(run[np.array([5, 2])], np.asarray(run.vectors)[[5, 2]])
        with pytest.raises(KeyError, match="p30"):
            run[["p0", "p30"]]


def test_a_run_has_slices(run):
    back, expected = run
    for key in (slice(3), slice(-2, None), slice(None, None, 5), slice(4, 2), slice(2, 20)):
        assert_same(back[key], expected[key])
    assert back[:3].flags.writeable
    assert back[3].flags.writeable


def test_an_output_whose_ids_do_not_fit_its_vectors_is_named(tmp_path):
    write_run(tmp_path, Format.npy, (3, 3))
    table = tmp_path / "001_ESM" / "proteins.tsv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    run = load(tmp_path)
    assert run.vectors.shape == (6, WIDTH)
    with pytest.raises(ValueError, match=r"001_ESM is damaged: it has 2 ids and vectors of 3 proteins"):
        run.ids  # noqa: B018 - read for its error
    with pytest.raises(ValueError, match="001_ESM is damaged"):
        run["p1"]


def test_a_safetensors_that_ends_early_is_damaged(tmp_path):
    write_run(tmp_path, Format.safetensors, (300,))
    path = tmp_path / "000_ESM.safetensors"
    whole = path.read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:end])
        with pytest.raises(
            ValueError, match=r"000_ESM.safetensors is damaged or no output .*: embed its input again"
        ):
            len(load(path))


def test_a_safetensors_of_another_writer_is_read(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    expected = write_run(tmp_path, Format.safetensors, (300,))
    path = tmp_path / "000_ESM.safetensors"
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, dict(reversed(metadata.items())))
    back = load(path)
    assert_same(back.vectors, expected)
    assert back.ids == [f"p{i}" for i in range(300)]
