"""Units that failed on this rank, and when they are too many in a row."""

from __future__ import annotations

import threading

from dist_esm.stop import Stop
from dist_esm.types import Failure, Unit


class Failures:
    """Counts failed files in a row, in the order in which units were taken, and stops the run at too many.

    Then the device or the model is at fault, not the files.

    Files that cannot be read do not count. The reader tells of them as soon as it knows, so that it begins
    no other unit of such a file.

    Parameters
    ----------
    max_consecutive
        So many failed files in a row stop the run.
    rank
        Named in the reason.
    stop
        Set when there are too many.
    """

    def __init__(self, max_consecutive: int, rank: int, stop: Stop) -> None:
        self.max_consecutive = max_consecutive
        self.rank = rank
        self.stop = stop
        self.files: set[int] = set()
        """Files that cannot be completed any more."""
        self._file_of: dict[int, int] = {}
        """Key of each unit that was taken to its file."""
        self._failed: set[int] = set()
        self._unreadable: set[int] = set()
        self._num_ended = 0
        self._lock = threading.Lock()

    def begin(self, key: int, unit: Unit) -> None:
        """A unit is taken; keys count from 0."""
        with self._lock:
            self._file_of[key] = unit.file

    def end(self, num_units: int) -> None:
        """Units have an outcome."""
        with self._lock:
            self._num_ended += num_units

    @property
    def num_open(self) -> int:
        """Units that were taken and have no outcome yet."""
        with self._lock:
            return len(self._file_of) - self._num_ended

    def add_unreadable(self, key: int) -> None:
        """A unit could not be read: its file is at fault, and says nothing of the device."""
        with self._lock:
            self._unreadable.add(key)
            self.files.add(self._file_of[key])

    def add(self, key: int, failure: Failure) -> None:
        """A unit failed; telling it twice changes nothing."""
        with self._lock:
            if key in self._unreadable:
                return
            self._failed.add(key)
            self.files.add(self._file_of[key])
            in_a_row = {self._file_of[neighbour] for neighbour in run_around(self._failed, key)}
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
