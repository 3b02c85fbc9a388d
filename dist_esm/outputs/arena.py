"""Memory that this process shares with those that write its outputs.

Rows that wait for their output are written here once; a process that writes them is told where they are.
Pages stay once they are there: to get them from the system takes several times as long as to fill them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

BUFFER_BYTES = 3 << 29
"""Rows that are kept in memory, of all outputs in the making together; what is more waits on disk."""
POPULATE_WRITE = 23
"""Linux's number for it (5.14 and later), which `mmap` does not have."""
POPULATED_BYTES = 1 << 22
"""Pages that are asked for at once: while they come, the process maps nothing else and starts no thread."""
LEAST_BYTES = 1 << 16
"""Fewer are copied to the process that writes them: that is quicker than to keep account of them."""


class Arena:
    """A stretch of shared memory, given out in pieces. One thread takes them and gives them back.

    Parameters
    ----------
    descriptor
        Of its nameless file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
        self._begin = int(self._bytes.ctypes.data)
        self._free = [(0, len(self._bytes))]
        """Offset and bytes of each stretch that is free, in order; no two of them touch."""
        self._taken: dict[int, int] = {}
        """Offset of each piece to its bytes."""

    @classmethod
    def make(cls, num_bytes: int = BUFFER_BYTES) -> Self:
        """Make a new one (Linux).

        Raises
        ------
        OSError
            If the system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory without a name (Linux has)")
        descriptor = os.memfd_create("rows", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let nobody else have it from now on; its memory goes with the last array."""
        os.close(self.descriptor)

    def populate(self, num_bytes: int) -> None:
        """Get the first pages from the system beforehand, if it can do so; else each comes when it is
        written."""
        libc, stop = ctypes.CDLL(None), min(num_bytes, len(self._bytes))
        for first in range(0, stop, POPULATED_BYTES):
            address = ctypes.c_void_p(self._begin + first)
            size = ctypes.c_size_t(min(POPULATED_BYTES, stop - first))
            if libc.madvise(address, size, POPULATE_WRITE) != 0:
                return

    def take(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """Return an array with a piece of its own; None if it is small, or no stretch is so long."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if num_bytes < LEAST_BYTES:
            return None
        for number, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[number : number + 1] = [(offset + size, free - size)] if free > size else []
                self._taken[offset] = size
                return self.array(offset, shape, dtype)
        return None

    def give_back(self, array: NDArray[Any]) -> None:
        """Take the piece of an array back; nothing if the array has none."""
        offset = int(array.ctypes.data) - self._begin
        size = self._taken.pop(offset, None)
        if size is None:
            return
        place = bisect_left(self._free, (offset, 0))
        first, after = place, place
        if place and sum(self._free[place - 1]) == offset:
            first, offset, size = place - 1, self._free[place - 1][0], size + self._free[place - 1][1]
        if place < len(self._free) and self._free[place][0] == offset + size:
            after, size = place + 1, size + self._free[place][1]
        self._free[first:after] = [(offset, size)]

    def offset_of(self, array: NDArray[Any]) -> int | None:
        """Return where an array begins, if all of it is here in one stretch."""
        offset = int(array.ctypes.data) - self._begin
        return offset if array.flags.c_contiguous and 0 <= offset < len(self._bytes) else None

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the array that begins at an offset."""
        return np.ndarray(shape, dtype, self._bytes.data, offset)
