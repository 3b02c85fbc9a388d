"""Proteins to packs: plain Python on ints, first-fit over a few open packs.

Packs know nothing of files, so a thousand files of ten proteins fill them as well as one file of ten
thousand. Segments go into the first open pack with room; when too many packs are open the oldest is let go.
It had the first pick of every segment, so it is about the fullest, and no protein waits long for its answer.
Memory is the open packs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dist_esm.types import Pack, Segment

MIN_SEGMENT = 3
"""Tokens of the smallest segment: BOS, one residue, EOS."""


class Packer:
    """Fills packs of at most `capacity` tokens; a segment that is longer gets a pack of its own.

    Parameters
    ----------
    capacity
        Tokens of a pack, `toks_per_batch`.
    max_open
        Packs that are filled at the same time: the look-ahead. Two fill packs of 25,344 tokens to 99.9%; more
        would keep more files waiting for their last proteins.
    """

    def __init__(self, capacity: int, max_open: int = 2) -> None:
        self.capacity = capacity
        self.max_open = max_open
        self._open: list[list[Segment]] = []
        self._room: list[int] = []

    def add(self, segment: Segment) -> Iterator[Pack]:
        """Take a segment; yields the packs that are full."""
        size = len(segment.tokens)
        index = next((i for i, room in enumerate(self._room) if room >= size), None)
        if index is None:
            index = len(self._open)
            self._open.append([])
            self._room.append(self.capacity)
        self._open[index].append(segment)
        self._room[index] -= size
        if self._room[index] < MIN_SEGMENT:
            yield self._close(index)
        elif len(self._open) > self.max_open:
            yield self._close(0)

    def flush(self, capacity: int | None = None) -> Iterator[Pack]:
        """Let all that is held go.

        Parameters
        ----------
        capacity
            Tokens of the very last packs, if packs are to become smaller. Then what came first goes first, so
            that most outputs are written before the device is done. None: there are as few packs as first-fit
            makes with the longest segments first. Without fewer of them they go as they are, oldest first.
        """
        held = [segment for pack in self._open for segment in pack]
        if capacity is not None and capacity < self.capacity:
            in_order = sorted(held, key=lambda segment: (segment.protein, segment.part))
            packs = Packer(self.capacity, self.max_open)._shrink(in_order, capacity)
        else:
            longest_first = sorted(held, key=lambda segment: -len(segment.tokens))
            packs = Packer(self.capacity, len(held))._pack(longest_first)
            if len(packs) == len(self._open):
                packs = [Pack(tuple(pack)) for pack in self._open]
        self._open, self._room = [], []
        yield from packs

    def _shrink(self, segments: Sequence[Segment], smallest: int) -> list[Pack]:
        """Pack in order. A pack has room for at most two thirds of what is left when it is opened: capacities
        are halved, down to the smallest."""
        left = sum(len(segment.tokens) for segment in segments)
        packs: list[Pack] = []
        for segment in segments:
            while self.capacity // 2 >= smallest and 3 * self.capacity > 2 * left:
                self.capacity //= 2
            packs += self.add(segment)
            left -= len(segment.tokens)
        return packs + self._pack(())

    def _pack(self, segments: Iterable[Segment]) -> list[Pack]:
        packs = [pack for segment in segments for pack in self.add(segment)]
        while self._open:
            packs.append(self._close(0))
        return packs

    def _close(self, index: int) -> Pack:
        del self._room[index]
        return Pack(tuple(self._open.pop(index)))
