"""Units that failed on this rank, and when they are too many in a row."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dist_esm.stop import Stop
from dist_esm.types import Failure, Unit


class Failures:
    """Units that failed on this rank. So many files in a row, in the order of the bin, and the run is stopped.

    The reader tells what it cannot read as soon as it knows, so that it begins nothing after the last failure that is let pass.
    """

    def __init__(self, units: Sequence[Unit], max_consecutive: int, rank: int, stop: Stop) -> None:
        self.units = units
        self.max_consecutive = max_consecutive
        self.rank = rank
        self.stop = stop
        self.files: set[int] = set()
        self._keys: set[int] = set()
        self._lock = threading.Lock()

    def add(self, key: int, failure: Failure) -> None:
        """A unit failed; telling it twice changes nothing."""
        with self._lock:
            self._keys.add(key)
            self.files.add(self.units[key].file)
            in_a_row = {self.units[one].file for one in run_around(self._keys, key)}
        if len(in_a_row) >= self.max_consecutive:
            last = f"{failure.path}, with {failure.error_type}: {failure.error_message}"
            self.stop.set(f"{len(in_a_row)} files in a row failed on rank {self.rank}, the last, {last}")


def run_around(failed: set[int], key: int) -> range:
    """The longest run of neighbouring failed units around one of them."""
    first = last = key
    while first - 1 in failed:
        first -= 1
    while last + 1 in failed:
        last += 1
    return range(first, last + 1)
