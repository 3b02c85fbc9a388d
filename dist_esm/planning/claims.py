"""Which unit a rank takes next: those of its own bin, then what the most loaded bins have left.

The assignment is a plan; real ranks differ. A rank works through its own bin, largest unit first. A rank
that has finished its bin takes the largest unit of the most loaded bin, so that the smallest units come
last and all ranks end close together.

A claim is one atomic addition to a counter of the bin: the first claim is given position 0 of that bin, the
next position 1. So no unit is given twice and none is left out, whatever ranks know of each other, and
there are as many counters as ranks, not as units. It costs a round trip for each unit; a unit of another
bin takes another one, which reads all counters, and a choice in time linear in the ranks. With bins of
equal cost, on ranks of equal speed, nobody takes from another and the order of work is that of the
assignment.

A counter for each unit was rejected: 300,000 units would be as many keys, and a rank that is through with
its bin would try units that have long been claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple


class Claim(NamedTuple):
    """A unit that one rank alone works on."""

    unit: int
    """Its index in the plan."""
    bin: int
    """The rank that the assignment gave it to; if another rank claimed it, it was taken over."""


class ClaimOrder:
    """The order in which ranks claim units; a value that is the same on every rank.

    Parameters
    ----------
    bins
        For each rank the indices of its units, in the order in which it takes them.
    costs
        What each unit of the plan costs, by its index.

    Examples
    --------
    >>> order = ClaimOrder(bins=[[0, 3], [1, 2]], costs=[5, 4, 3, 1])
    >>> order.bin_to_relieve(rank=0, num_claimed=[2, 1])
    1
    >>> order.unit(bin_=1, position=1)
    2
    >>> order.bin_to_relieve(rank=0, num_claimed=[2, 2]) is None
    True
    """

    def __init__(self, bins: Sequence[Sequence[int]], costs: Sequence[int]) -> None:
        self._bins = [tuple(own) for own in bins]
        self._left = [
            list(accumulate((costs[unit] for unit in reversed(own)), initial=0))[::-1] for own in self._bins
        ]
        """For each bin the cost of its units from each position to its end."""

    def unit(self, bin_: int, position: int) -> int | None:
        """Return the unit at a position of a bin; None behind its end."""
        return self._bins[bin_][position] if position < len(self._bins[bin_]) else None

    def bin_to_relieve(self, rank: int, num_claimed: Sequence[int]) -> int | None:
        """Return the bin that a rank claims from when its own has no units left.

        Parameters
        ----------
        rank
            The rank that is free.
        num_claimed
            For each bin the claims so far; more than it has units if ranks came too late.

        Returns
        -------
        int or None
            The bin whose units left cost most; of several, the one that has most units left; of these, the
            first behind the rank, so that ranks spread out. None if no bin has units left.
        """
        candidates = (
            (left[claimed], len(left) - claimed, -((bin_ - rank) % len(self._bins)))
            for bin_, (left, claimed) in enumerate(zip(self._left, num_claimed, strict=True))
            if claimed < len(left) - 1
        )
        best = max(candidates, default=None)
        return None if best is None else (rank - best[2]) % len(self._bins)

    def claims(
        self,
        rank: int,
        claim: Callable[[int], int],
        count_claims: Callable[[], Sequence[int]],
        steal: bool = True,
    ) -> Iterator[Claim]:
        """Claim units for a rank, each when it is asked for, until there are none left.

        Parameters
        ----------
        rank
            The rank that works.
        claim
            Adds 1 to the counter of a bin, in a way that no two callers see the same, and returns what it
            was before.
        count_claims
            Returns the counters of all bins. They may be out of date.
        steal
            Whether to go on with the units of others.
        """
        yield from self.own_claims(rank, claim)
        if steal:
            yield from self.claims_of_others(rank, claim, count_claims)

    def own_claims(self, rank: int, claim: Callable[[int], int]) -> Iterator[Claim]:
        """Claim the units of a rank's own bin, as `claims` does first."""
        while (unit := self.unit(rank, claim(rank))) is not None:
            yield Claim(unit, rank)

    def claims_of_others(
        self, rank: int, claim: Callable[[int], int], count_claims: Callable[[], Sequence[int]]
    ) -> Iterator[Claim]:
        """Claim what other ranks have not begun, as `claims` does when the rank's own bin is empty."""
        exhausted = {rank}
        while True:
            counts = [
                max(count, len(self._bins[bin_])) if bin_ in exhausted else count
                for bin_, count in enumerate(count_claims())
            ]
            bin_ = self.bin_to_relieve(rank, counts)
            if bin_ is None:
                return
            unit = self.unit(bin_, claim(bin_))
            if unit is None:
                exhausted.add(bin_)  # another rank was faster
            else:
                yield Claim(unit, bin_)
