"""Memory that a rank shares with the processes which write its outputs."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from dist_esm.outputs import arena
from dist_esm.outputs.arena import Arena

PAGE = mmap.PAGESIZE


@pytest.fixture
def small(monkeypatch):
    """An arena of eight pages, that gives out pieces of any size."""
    monkeypatch.setattr(arena, "LEAST_BYTES", 1)
    return Arena.make(8 * PAGE)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_never_overlap_and_all_room_comes_back(monkeypatch, seed):
    monkeypatch.setattr(arena, "LEAST_BYTES", 1)
    chance, memory, live = np.random.default_rng(seed), Arena.make(64 * PAGE), []
    refused = 0
    for number in range(500):
        if live and chance.random() < 0.5:
            array, value = live.pop(int(chance.integers(len(live))))
            assert (array == value).all()
            memory.give_back(array)
            continue
        array = memory.take((int(chance.integers(1, 9000)), 4), np.dtype(np.float16))
        if array is None:
            refused += 1
            continue
        value = np.float16(number)
        array[:] = value
        live.append((array, value))
    assert refused
    for array, value in live:
        assert (array == value).all()
        memory.give_back(array)
    assert memory.take((64, PAGE), np.dtype(np.uint8)) is not None


def test_what_is_written_is_seen_where_it_is_opened_again(small):
    other = Arena(os.dup(small.descriptor))
    small.take((2, PAGE), np.dtype(np.uint8))
    rows = small.take((300, 7), np.dtype(np.float32))
    rows[:] = np.arange(2100).reshape(300, 7)
    offset = small.offset_of(rows[10:20])
    assert offset == 2 * PAGE + 10 * 7 * 4
    assert np.array_equal(other.array(offset, (10, 7), np.dtype(np.float32)), rows[10:20])


def test_only_what_is_in_it_in_one_stretch_has_an_offset(small):
    rows = small.take((10, 7), np.dtype(np.float32))
    assert small.offset_of(rows[:, :3]) is None
    assert small.offset_of(rows.copy()) is None


def test_few_bytes_and_too_many_get_no_piece(monkeypatch):
    memory = Arena.make(32 * PAGE)
    assert memory.take((arena.LEAST_BYTES - 1, 1), np.dtype(np.uint8)) is None
    assert memory.take((32 * PAGE + 1, 1), np.dtype(np.uint8)) is None
    assert memory.take((32 * PAGE, 1), np.dtype(np.uint8)) is not None
    memory.give_back(np.zeros(10))  # which it never gave out


def test_populating_keeps_what_is_there(small):
    rows = small.take((2, PAGE), np.dtype(np.uint8))
    rows[:] = 7
    small.populate(100 * PAGE)
    assert (rows == 7).all()


def test_no_more_is_populated_than_is_asked_for(small):
    small.populate(PAGE + 1)
    taken = os.fstat(small.descriptor).st_blocks * 512
    assert taken in (0, 2 * PAGE)  # 0: a system that cannot do it
