"""Rows that wait to be written, in memory and on disk."""

from __future__ import annotations

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from dist_esm.outputs.row_buffer import Memory, NamelessFile, RowBuffer


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
    monkeypatch.setattr("dist_esm.outputs.row_buffer.KEPT_BYTES", 0)
    rows = np.random.default_rng(0).standard_normal((300, 6), dtype=np.float32)
    memory = Memory(num_bytes, copiers)
    buffer = RowBuffer(6, rows.dtype, partial(NamelessFile, tmp_path / "scratch"), memory, expected)
    for number in [*range(20), *np.random.default_rng(1).permutation(np.arange(20, 60))]:
        buffer.write(5 * int(number), rows[5 * number : 5 * number + 5])
        assert memory.left >= 0
    assert np.array_equal(buffer.tensor().numpy(), rows)
    assert buffer.num_bytes == rows.nbytes
    buffer.close()
    assert memory.left == num_bytes


class Noted:
    """A file that notes which bytes it was given."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.written += range(offset, offset + data.nbytes)

    def close(self) -> None:
        """There is nothing to close."""


@pytest.mark.parametrize("num_bytes", [0, 1000, 7000])
def test_a_row_is_given_to_the_file_once(monkeypatch, num_bytes):
    """Also when some of those that it follows are not there yet."""
    monkeypatch.setattr("dist_esm.outputs.row_buffer.KEPT_BYTES", 0)
    rows, file = np.ones((300, 6), np.float32), Noted()
    buffer = RowBuffer(6, rows.dtype, lambda: file, Memory(num_bytes), 300)
    for number in [4, 2, 7, *np.random.default_rng(0).permutation([*set(range(60)) - {4, 2, 7}]).tolist()]:
        buffer.write(5 * number, rows[5 * number : 5 * number + 5])
    assert buffer.is_in_place
    assert sorted(file.written) == list(range(rows.nbytes))
