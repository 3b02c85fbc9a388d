"""Packs hold every segment once, and none stays open for ever."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_esm.pipeline.packer import Packer
from dist_esm.types import Segment


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(3, 60), max_size=200), st.integers(3, 50), st.integers(1, 8))
def test_packs_hold_every_segment_once_and_no_more_than_fits(sizes, capacity, max_open):
    packer = Packer(capacity, max_open)
    packs = []
    for protein_index, size in enumerate(sizes):
        packs += packer.add(Segment(protein_index, 0, np.empty(size, np.uint8), (0, size - 2)))
    last = list(packer.flush())
    assert all(one.num_tokens + other.num_tokens > capacity for one, other in itertools.combinations(last, 2))
    packs += last
    tickets = [segment.protein for pack in packs for segment in pack.segments]
    assert sorted(tickets) == list(range(len(sizes)))
    assert all(pack.num_tokens <= capacity or len(pack.segments) == 1 for pack in packs)


def test_no_pack_is_left_open_for_ever():
    packer = Packer(100, max_open=4)
    packs = list(packer.add(Segment(0, 0, np.empty(55, np.uint8), (0, 53))))
    for protein_index in range(1, 20):
        packs += packer.add(Segment(protein_index, 0, np.empty(60, np.uint8), (0, 58)))
    assert 0 in [segment.protein for pack in packs for segment in pack.segments]


def test_the_last_packs_become_smaller_and_are_in_order_where_they_are_to():
    packer = Packer(400)
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 40, 60).tolist()
    segments = [
        Segment(number, 0, np.empty(size, np.uint8), (0, size - 2)) for number, size in enumerate(sizes)
    ]
    early = [pack for segment in segments for pack in packer.add(segment)]
    last = list(packer.flush(100))
    tickets = [[segment.protein for segment in pack.segments] for pack in last]
    assert sorted(itertools.chain(*tickets, *([s.protein for s in pack.segments] for pack in early))) == list(
        range(len(sizes))
    )
    numbers = [pack.num_tokens for pack in last]
    assert 150 < max(numbers[:-2]) <= 2 / 3 * sum(numbers)
    assert max(numbers[-2:]) <= 100
    assert [min(pack) for pack in tickets] == sorted(min(pack) for pack in tickets)
    assert not list(packer.flush(100))


def test_one_long_segment_at_the_end_is_a_pack_of_its_own():
    packer = Packer(400)
    assert not list(packer.add(Segment(0, 0, np.empty(390, np.uint8), (0, 388))))
    (pack,) = packer.flush(100)
    assert pack.num_tokens == 390
