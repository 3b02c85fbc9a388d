"""What waits to be written, and how it comes to its name."""

from __future__ import annotations

import io
import time
import zipfile
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from dist_esm.disk import atomically, together
from dist_esm.pickling import torch_save
from dist_esm.spool import Memory, Spool, are_finite


def same(one, other) -> bool:
    """Whether two contents are alike to the last bit, type and stride."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.stride(), one.storage_offset()) == (other.dtype, other.stride(), other.storage_offset()) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("how", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}])
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
    records = [{i.filename.partition("/")[2]: i.CRC for i in zipfile.ZipFile(tmp_path / name).infolist()} for name in ("theirs.pt", "ours.pt")]
    assert [name for name in records[0] if records[0][name] != records[1].get(name)] == ["data.pkl", ".data/serialization_id"]


@pytest.mark.parametrize("stranger", [np.float32(1), {1}, torch.ones(1, requires_grad=True), torch.nn.Parameter(torch.ones(1)), (torch.ones(1),)])
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
def test_rows_come_back_in_their_places_from_memory_and_from_disk(tmp_path, monkeypatch, num_bytes, expected, copiers):
    monkeypatch.setattr("dist_esm.spool.LARGE_ROWS", 0)
    rows = np.random.default_rng(0).standard_normal((300, 6), dtype=np.float32)
    memory = Memory(num_bytes, copiers)
    spool = Spool(6, rows.dtype, tmp_path / "scratch", memory, expected)
    for number in [*range(20), *np.random.default_rng(1).permutation(np.arange(20, 60))]:
        spool.write(5 * int(number), rows[5 * number : 5 * number + 5])
        assert memory.left >= 0
    assert np.array_equal(spool.tensor().numpy(), rows)
    assert spool.num_bytes == rows.nbytes
    spool.close()
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


def test_of_files_written_together_one_that_fails_takes_no_other_along(tmp_path):
    def write(name: str, error: Exception | None):
        with atomically(tmp_path / name / "file") as beside:
            beside.write_text(name)
        with atomically(tmp_path / name / "second") as beside:
            beside.write_text(name)
            if error is not None:
                raise error
        assert not (tmp_path / name / "file").exists()
        return name

    error = OSError("full")
    assert together([partial(write, "a", None), partial(write, "b", error), partial(write, "c", None)]) == ["a", error, "c"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == ["a/file", "a/second", "c/file", "c/second"]
