"""What waits to be written, and how it comes to its name."""

from __future__ import annotations

import hashlib
import io
import resource
import time
import zipfile
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_esm.atomic import SMALL_BYTES, SummedFile, commit_together, read_back
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.pickling import torch_save
from dist_esm.outputs.row_buffer import Memory, RowBuffer, are_finite
from dist_esm.outputs.shards import read_shard, write_shard
from dist_esm.types import Row


def same(one, other) -> bool:
    """Whether two contents are alike to the last bit, type and stride."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.stride(), one.storage_offset()) == (
            other.dtype,
            other.stride(),
            other.storage_offset(),
        ) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "how", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}]
)
def test_archives_hold_what_torch_would_have_put_there(tmp_path, how):
    rows = torch.arange(6000, dtype=torch.float32).view(1000, 6)
    content = {
        "ids": ["a", "é" * 300, "\ud800"],
        "data": list(rows.unbind(0)),
        33: rows,
        "parts": {33: list(rows.split([3, 7, *range(40), 210])), 34: []},
        "half": rows.half()[:, 2:4],
        "none": [rows[:0], torch.empty(0, 6)],
        "others": [None, True, -5, 1 << 40, 2.5, ("a", 1), {}, [[]]],
    }
    torch.save(content, tmp_path / "theirs.pt")
    with open(tmp_path / "ours.pt", "wb") as file:
        torch_save(content, file)
    theirs, ours = (torch.load(tmp_path / name, **how) for name in ("theirs.pt", "ours.pt"))
    assert same(ours, theirs)
    assert ours["data"][7].untyped_storage().data_ptr() == ours[33].untyped_storage().data_ptr()
    records = [
        {i.filename.partition("/")[2]: i.CRC for i in zipfile.ZipFile(tmp_path / name).infolist()}
        for name in ("theirs.pt", "ours.pt")
    ]
    assert [name for name in records[0] if records[0][name] != records[1].get(name)] == [
        "data.pkl",
        ".data/serialization_id",
    ]


@pytest.mark.parametrize("span", [slice(0, 1000), slice(5, 17), slice(3, 4), slice(0, 0)])
def test_rows_of_a_matrix_share_its_storage_and_come_back_in_order(span):
    matrix = torch.arange(6000, dtype=torch.float32).view(1000, 6)[span]
    archive = io.BytesIO()
    torch_save({"data": list(matrix.unbind()), "again": {1: matrix}}, archive)
    content = torch.load(io.BytesIO(archive.getvalue()), weights_only=True)
    assert same(content["data"], list(content["again"][1].unbind()))
    assert torch.equal(content["again"][1], matrix)
    assert {row.untyped_storage()._cdata for row in content["data"]} <= {
        content["again"][1].untyped_storage()._cdata
    }


def test_rows_that_lie_in_several_tensors_are_as_one():
    whole = torch.arange(60).view(20, 3)
    for cuts in ([20], [0, 20], [7, 13], [1, 0, 4, 0, 0, 15, 0], [5] * 4):
        rows = ChunkedTensor(torch.split(whole, cuts))
        assert rows.shape == (20, 3)
        for start in range(21):
            for stop in range(start, 21):
                assert torch.equal(rows[start:stop], whole[start:stop]), (cuts, start, stop)
    assert ChunkedTensor([whole[:9], whole[9:]])[9:12].data_ptr() == whole[9:].data_ptr()
    assert ChunkedTensor([whole[:0]])[0:0].shape == (0, 3)


def test_a_checksum_is_that_of_what_was_written_small_and_large(tmp_path):
    numbers = np.random.default_rng(0).bytes(3 * SMALL_BYTES + 5)
    sizes = [3, SMALL_BYTES, 0, SMALL_BYTES + 1, 7, 2 * SMALL_BYTES - 6]
    with SummedFile(tmp_path / "a") as file:
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            file.write(numbers[start : start + size])
    written = (tmp_path / "a").read_bytes()
    assert written == numbers[: sum(sizes)]
    assert file.sha256() == hashlib.sha256(written).hexdigest()


def test_a_large_write_for_which_there_is_no_room_raises(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SMALL_BYTES + 100, before[1]))
    try:
        file = SummedFile(tmp_path / "a")
        with pytest.raises(OSError, match="File too large"):
            file.write(bytes(3 * SMALL_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.close()


@pytest.mark.parametrize(
    "stranger",
    [
        np.float32(1),
        {1},
        torch.ones(1, requires_grad=True),
        torch.nn.Parameter(torch.ones(1)),
        (torch.ones(1),),
    ],
)
def test_what_readers_would_refuse_is_refused_when_it_is_written(stranger):
    with pytest.raises(TypeError, match="has no place in an output"):
        torch_save({"content": stranger}, io.BytesIO())


class Late(Executor):
    """Threads that get to their work a while after they were given it."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2)

    def submit(self, work, /, *args):
        return self.pool.submit(lambda: (time.sleep(0.002), work(*args)))


@pytest.mark.parametrize("expected", [0, 100, 300])
@pytest.mark.parametrize("num_bytes", [1 << 20, 7000, 1000, 0])
@pytest.mark.parametrize("copiers", [None, Late()], ids=["", "copied late"])
def test_rows_come_back_in_their_places_from_memory_and_from_disk(
    tmp_path, monkeypatch, num_bytes, expected, copiers
):
    monkeypatch.setattr("dist_esm.outputs.row_buffer.LARGE_ROWS", 0)
    rows = np.random.default_rng(0).standard_normal((300, 6), dtype=np.float32)
    memory = Memory(num_bytes, copiers)
    buffer = RowBuffer(6, rows.dtype, tmp_path / "scratch", memory, expected)
    for number in [*range(20), *np.random.default_rng(1).permutation(np.arange(20, 60))]:
        buffer.write(5 * int(number), rows[5 * number : 5 * number + 5])
        assert memory.left >= 0
    assert np.array_equal(buffer.tensor().numpy(), rows)
    assert buffer.num_bytes == rows.nbytes
    buffer.close()
    assert memory.left == num_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_number_that_is_not_finite_is_found_among_many(dtype):
    rows = np.random.default_rng(0).standard_normal((50, 40)).astype(dtype)
    rows[0, :2] = np.finfo(dtype).max, np.finfo(dtype).min
    rows[1] = np.finfo(dtype).max  # their sum is beyond fp32, and yet each is finite
    assert are_finite(rows)
    assert are_finite(rows[:0])
    assert are_finite(rows[:, 3])
    for number in (np.inf, -np.inf, np.nan, -np.nan):
        rows[7, 3] = number
        assert not are_finite(rows)
        assert not are_finite(rows[:, 3])
        assert are_finite(rows[:, 4])


def test_a_shard_comes_back_as_it_was_also_one_of_version_1(tmp_path):
    rows = [Row("a", "a b", 0, 3, 3, "ok", 0, 0, 0, 0), Row("b", "b", 2, 5, 4, "truncated", 1, 0, 0, 0)]
    mean, per_tok = torch.arange(12.0).view(2, 6), torch.arange(42.0).view(7, 6)
    table = OutputTable(
        "a.fasta", {"model": "m"}, ["mean"], 1, rows, {1: mean}, {}, {1: ChunkedTensor([per_tok])}, ["a line"]
    )
    staged = write_shard(table, tmp_path / "shards" / "a.pt", tmp_path)
    (written,) = commit_together([staged], tmp_path)
    assert written == read_back(tmp_path, Path("shards/a.pt"))
    content = torch.load(tmp_path / "shards" / "a.pt", weights_only=True)
    content["notes"] = content.pop("tsv_lines")
    torch.save(content, tmp_path / "old.pt")
    for name in ("shards/a.pt", "old.pt"):
        shard = read_shard(tmp_path / name)
        assert (shard.source, shard.rows, shard.tsv_lines) == (table.source, rows, ["a line"])
        assert torch.equal(shard.mean[1], mean)
        assert torch.equal(shard.per_tok[1][0:7], per_tok)
