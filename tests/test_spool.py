"""What waits to be written, and how it comes to its name."""

from __future__ import annotations

import io
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from dist_esm.pickling import torch_save
from dist_esm.spool import Memory, Spool, are_finite, atomically, together


def test_archives_have_the_bytes_that_torch_writes():
    rows = torch.arange(60, dtype=torch.float32).view(10, 6)
    content = {
        "ids": ["a"] * 10,
        "data": list(rows.unbind(0)),
        33: rows,
        "parts": list(rows.split([3, 7])),
        "half": rows.half(),
        "none": [rows[:0], torch.empty(0, 6)],
    }
    wanted, found = io.BytesIO(), io.BytesIO()
    torch.save(content, wanted)
    torch_save(content, found)
    assert found.getvalue() == wanted.getvalue()


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
