"""Where each id is among many proteins, in 16 bytes for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_esm.outputs.opened import OutputSequence

hash_of = hash
"""What ids are looked up by: Python's own hash of text, another one in each process."""


class Positions:
    """The positions of ids in a sequence of outputs, whose ids are read once to make it and not kept.

    A hash of each id is kept, sorted, with its position. What a hash finds is compared with the id itself,
    which is read from its output again.

    Parameters
    ----------
    outputs
        In order.
    """

    def __init__(self, outputs: OutputSequence) -> None:
        self._outputs = outputs
        hashes = np.empty(int(outputs.starts[-1]), np.int64)
        for output in range(len(outputs)):
            start, stop = outputs.starts[output : output + 2]
            hashes[start:stop] = [hash_of(name) for name in outputs.ids(output)]
        self._order: NDArray[np.int64] = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._last: tuple[int, list[str]] | None = None

    def first(self, name: str) -> int | None:
        """Return the first position of an id; None if there is none."""
        return next((position for position in self._candidates(name) if self._id_at(position) == name), None)

    def all(self, name: str) -> list[int]:
        """Return all positions of an id, in order."""
        return [position for position in self._candidates(name) if self._id_at(position) == name]

    def _candidates(self, name: str) -> list[int]:
        begin = np.searchsorted(self._hashes, hash_of(name), side="left")
        end = np.searchsorted(self._hashes, hash_of(name), side="right")
        found: list[int] = self._order[begin:end].tolist()
        return found

    def _id_at(self, position: int) -> str:
        output, place = self._outputs.find(position)
        if self._last is None or self._last[0] != output:
            self._last = output, self._outputs.ids(output)
        return self._last[1][place]
