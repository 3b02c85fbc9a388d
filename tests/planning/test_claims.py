"""Who takes which unit: each once, own bins first, then the largest that the most loaded bin has left."""

import heapq
import random
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_esm.planning.assign import assign_to_bins
from dist_esm.planning.claims import Claim, ClaimOrder

COSTS = st.lists(st.integers(0, 50), max_size=40)
NUM_RANKS = st.integers(1, 7)


def bins_of(costs, num_ranks):
    return assign_to_bins(costs, [f"{index:06d}" for index in range(len(costs))], num_ranks)


class Counters:
    """The counters of bins, and who claimed what, in order."""

    def __init__(self, num_bins):
        self.counts = [0] * num_bins
        self._lock = threading.Lock()

    def claim(self, bin_):
        with self._lock:
            self.counts[bin_] += 1
            return self.counts[bin_] - 1

    def count_claims(self):
        return list(self.counts)


def in_any_order(order, num_ranks, seed, count_claims=None, steal=True):
    """Let ranks claim in a random order; returns (rank, claim, counters before) of each claim of a unit."""
    counters, chance = Counters(num_ranks), random.Random(seed)
    ranks = {
        rank: order.claims(rank, counters.claim, count_claims or counters.count_claims, steal)
        for rank in range(num_ranks)
    }
    events = []
    while ranks:
        rank = chance.choice(sorted(ranks))
        before = counters.count_claims()
        claim = next(ranks[rank], None)
        if claim is None:
            del ranks[rank]
        else:
            events.append((rank, claim, before))
    return events


def by_the_clock(order, seconds, speeds):
    """Let ranks of these speeds work; returns each rank's claims, and when the last rank ends."""
    counters = Counters(len(speeds))
    ranks = [order.claims(rank, counters.claim, counters.count_claims) for rank in range(len(speeds))]
    done = [[] for _ in speeds]
    free = [(Fraction(0), rank) for rank in range(len(speeds))]
    end = Fraction(0)
    while free:
        now, rank = heapq.heappop(free)
        end = max(end, now)
        claim = next(ranks[rank], None)
        if claim is not None:
            done[rank].append(claim)
            heapq.heappush(free, (now + Fraction(seconds[claim.unit]) / speeds[rank], rank))
    return done, end


@given(costs=COSTS, num_ranks=NUM_RANKS, seed=st.integers(0, 1000))
def test_every_unit_is_claimed_once_and_each_bin_in_its_order(costs, num_ranks, seed):
    bins = bins_of(costs, num_ranks)
    events = in_any_order(ClaimOrder(bins, costs), num_ranks, seed)
    assert sorted(claim.unit for _, claim, _ in events) == list(range(len(costs)))
    for bin_, own in enumerate(bins):
        assert [claim.unit for _, claim, _ in events if claim.bin == bin_] == own


@given(costs=COSTS, num_ranks=NUM_RANKS, seed=st.integers(0, 1000))
def test_a_rank_that_is_through_takes_the_largest_unit_of_the_most_loaded_bin(costs, num_ranks, seed):
    bins = bins_of(costs, num_ranks)
    for rank, claim, before in in_any_order(ClaimOrder(bins, costs), num_ranks, seed):
        left = [own[min(count, len(own)) :] for own, count in zip(bins, before, strict=True)]
        if left[rank]:
            assert claim.bin == rank
        loads = [sum(costs[unit] for unit in units) for units in left]
        if claim.bin != rank:
            assert loads[claim.bin] == max(loads)
        assert costs[claim.unit] == max(costs[unit] for unit in left[claim.bin])


@given(costs=COSTS, num_ranks=NUM_RANKS, seed=st.integers(0, 1000))
def test_counters_that_are_out_of_date_cost_no_unit(costs, num_ranks, seed):
    order = ClaimOrder(bins_of(costs, num_ranks), costs)
    events = in_any_order(order, num_ranks, seed, count_claims=lambda: [0] * num_ranks)
    assert sorted(claim.unit for _, claim, _ in events) == list(range(len(costs)))


@given(costs=COSTS, num_ranks=NUM_RANKS, seed=st.integers(0, 1000))
def test_without_stealing_every_rank_does_its_own_bin(costs, num_ranks, seed):
    bins = bins_of(costs, num_ranks)
    events = in_any_order(ClaimOrder(bins, costs), num_ranks, seed, steal=False)
    assert [[claim.unit for who, claim, _ in events if who == rank] for rank in range(num_ranks)] == bins


@given(own=st.lists(st.integers(1, 50), min_size=1, max_size=12), num_ranks=NUM_RANKS)
def test_with_bins_of_equal_cost_the_order_is_that_of_the_assignment(own, num_ranks):
    costs = [cost for cost in own for _ in range(num_ranks)]
    bins = bins_of(costs, num_ranks)
    assert len({sum(costs[unit] for unit in units) for units in bins}) == 1
    done, _ = by_the_clock(ClaimOrder(bins, costs), costs, [1] * num_ranks)
    assert done == [[Claim(unit, rank) for unit in units] for rank, units in enumerate(bins)]


@given(
    costs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=40),
    num_ranks=NUM_RANKS,
)
def test_no_rank_is_idle_while_a_unit_is_left_however_wrong_the_costs_are(costs, num_ranks):
    guessed, seconds = [guess for guess, _ in costs], [real for _, real in costs]
    order = ClaimOrder(bins_of(guessed, num_ranks), guessed)
    _, end = by_the_clock(order, seconds, [1] * num_ranks)
    # Graham's bound, which any schedule without such idleness keeps.
    assert end <= Fraction(sum(seconds) + (num_ranks - 1) * max(seconds), num_ranks)


def test_a_slow_rank_is_relieved():
    costs = [10] * 40
    done, end = by_the_clock(ClaimOrder(bins_of(costs, 4), costs), costs, [1, 1, 1, Fraction(1, 10)])
    assert sorted(len(claims) for claims in done) == [2, 12, 13, 13]
    assert end == 200  # alone with its bin, the slow rank would end at 1,000


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ranks_that_claim_at_the_same_time_share_nothing(num_ranks):
    costs = [1] * 2000
    order, counters = ClaimOrder([list(range(2000)), *[[]] * (num_ranks - 1)], costs), Counters(num_ranks)
    done = [[] for _ in range(num_ranks)]

    def work(rank):
        for claim in order.claims(rank, counters.claim, counters.count_claims):
            done[rank].append(claim.unit)
            time.sleep(0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(unit for units in done for unit in units) == list(range(2000))


def test_300_000_units_on_1_024_ranks_take_seconds():
    chance = random.Random(0)
    costs = [chance.randint(1, 1000) for _ in range(300_000)]
    bins = bins_of(costs, 1024)
    began = time.process_time()
    order, counters = ClaimOrder(bins, costs), Counters(1024)
    ranks = [order.claims(rank, counters.claim, counters.count_claims) for rank in range(0, 1024, 2)]
    done = []
    for rank in ranks:  # half of the ranks do their own bins,
        done += [next(rank).unit for _ in range(290)]
    for rank in ranks:  # and take a few units of the others
        done += [next(rank).unit for _ in range(20)]
    assert len(set(done)) == len(done) == 512 * 310
    assert time.process_time() - began < 20
