"""Why a rank stops before its bin is empty."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dist_esm.records import Failure, Unit


class Stop:
    """Why a rank should stop, if it should. Set from any thread; the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.at_once = False
        """Drop what is in flight, rather than finish what has been read."""
        self._lock = threading.Lock()

    def set(self, reason: str, at_once: bool = False) -> None:
        """Ask for a stop."""
        with self._lock:
            self.reason = self.reason or reason
            self.at_once = self.at_once or at_once


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
