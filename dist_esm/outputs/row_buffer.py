"""Rows of an output in the making, which arrive in any order.

They wait in memory while there is some left, then on disk, so that memory does not grow with the output: in
the place that they have in the output, if that is known already, else in a nameless file in `output_dir`.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import write_all_at
from dist_esm.outputs.arena import BUFFER_BYTES, Arena

KEPT_BYTES = 16 << 20
"""Rows of one buffer that are kept in memory even if there is none left: a file would be open for each of
them."""
LARGE_ROWS = 1 << 17
"""Bytes of rows that are worth another thread."""


@dataclass
class Memory:
    """Memory that buffers share."""

    left: int = BUFFER_BYTES
    """Bytes that they may still take."""
    copiers: Executor | None = None
    """Threads that copy large rows, if there are any."""
    arena: Arena | None = None
    """Where rows are that other processes write; None: none does."""

    def has_room(self, more: int, num_bytes: int) -> bool:
        """Tell if what takes so many bytes in all may take so many more of memory."""
        return more <= self.left or num_bytes <= KEPT_BYTES


class RowFile(Protocol):
    """Where rows go that find no room in memory."""

    def write(self, offset: int, data: Any) -> None:
        """Write bytes at an offset."""
        ...

    def close(self) -> None:
        """Give the file up."""
        ...


class NamelessFile:
    """A file that is gone when it is closed."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # `close` closes it.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=str(directory), buffering=0)  # noqa: SIM115

    def write(self, offset: int, data: Any) -> None:
        """Write bytes at an offset."""
        write_all_at(self._file.fileno(), offset, data)

    def mapped(self, num_bytes: int) -> mmap.mmap:
        """Return its first bytes; what is changed in memory stays there."""
        return mmap.mmap(self._file.fileno(), num_bytes, access=mmap.ACCESS_COPY)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RowBuffer:
    """Rows of one width and dtype, written at any position, read back as one tensor.

    As long as there is memory, rows are kept where the tensor is made of them without another copy; then they
    go to a file. Rows that are given to `write` must stay as they are until `tensor`.

    Parameters
    ----------
    width, dtype
        Of each row.
    file
        Makes the file, when there is no memory left for all rows.
    memory
        Shared with other buffers.
    expected
        How many rows there may be. Room for them is reserved at once, which takes no memory before they are
        written.
    """

    def __init__(
        self,
        width: int,
        dtype: np.dtype[Any],
        file: Callable[[], RowFile],
        memory: Memory,
        expected: int = 0,
    ) -> None:
        self.num_rows = 0
        self._expected = expected
        self._make_file = file
        self._memory = memory
        self._arena = memory.arena
        self._taken = 0
        self._rows: NDArray[Any] = np.empty((0, width), dtype)
        self._is_there: NDArray[np.bool_] = np.empty(0, np.bool_)
        """Of the rows in memory, those that came."""
        self._file: RowFile | None = None
        self._copies: list[Future[None]] = []

    @property
    def _row_bytes(self) -> int:
        return int(self._rows.itemsize * self._rows.shape[1])

    @property
    def num_bytes(self) -> int:
        """Size of all rows."""
        return self.num_rows * self._row_bytes

    def write(self, first_row: int, rows: NDArray[Any]) -> None:
        """Put rows, shape (n, width) or (width,), at a position."""
        rows = rows.reshape(-1, self._rows.shape[1])
        self.num_rows = max(self.num_rows, first_row + len(rows))
        if self._file is None and self.num_bytes > self._taken:
            self._take()
        if self._file is None:
            self._is_there[first_row : first_row + len(rows)] = True
            place = self._rows[first_row : first_row + len(rows)]
            if self._memory.copiers is not None and place.nbytes >= LARGE_ROWS:
                self._copies.append(self._memory.copiers.submit(np.copyto, place, rows))
            else:
                place[:] = rows
        else:
            self._file.write(
                first_row * self._row_bytes, np.ascontiguousarray(rows, dtype=self._rows.dtype).data
            )

    def missing(self, num_rows: int) -> int:
        """Return the bytes of memory that it would take beyond what it has for so many rows."""
        return max(0, num_rows * self._row_bytes - self._taken)

    def _take(self) -> None:
        """Take memory for `num_rows`, or move to a file if there is not enough of it."""
        more = self.missing(self.num_rows)
        if not self._memory.has_room(more, self.num_bytes):
            self._finish_copies()
            self._file = self._make_file()
            for first, stop in runs(self._is_there):  # each row is written once: a `Region` counts them
                self._file.write(first * self._row_bytes, self._rows[first:stop].data)
            self._give_back()
            return
        self._memory.left -= more
        self._taken += more
        if self.num_rows > len(self._rows):
            most = (self._taken + self._memory.left) // self._row_bytes
            num_rows = max(min(self._expected, most), self.num_rows, len(self._rows) * 5 // 4)
            rows = self._empty(num_rows)
            self._finish_copies()
            rows[: len(self._rows)] = self._rows
            self._leave()
            is_there = np.zeros(len(rows), np.bool_)
            is_there[: len(self._rows)] = self._is_there
            self._rows, self._is_there = rows, is_there

    def _empty(self, num_rows: int) -> NDArray[Any]:
        shape, dtype = (num_rows, self._rows.shape[1]), self._rows.dtype
        rows = self._arena.take(shape, dtype) if self._arena is not None else None
        return np.empty(shape, dtype) if rows is None else rows

    def _leave(self) -> None:
        if self._arena is not None:
            self._arena.give_back(self._rows)

    def _finish_copies(self) -> None:
        for copy in self._copies:
            copy.result()
        self._copies.clear()

    def _give_back(self) -> None:
        self._finish_copies()
        self._memory.left += self._taken
        self._taken = 0
        self._leave()
        self._rows, self._is_there = self._rows[:0].copy(), self._is_there[:0].copy()

    @property
    def is_in_place(self) -> bool:
        """Its rows went to a file in which they stay."""
        return self._file is not None and not isinstance(self._file, NamelessFile)

    def tensor(self) -> Tensor:
        """All rows, shape (n, width), unless they are in place. Valid until `close`."""
        self._finish_copies()
        if self._file is None or not self.num_rows:
            return torch.from_numpy(self._rows[: self.num_rows])
        assert isinstance(self._file, NamelessFile)
        data = self._file.mapped(self.num_bytes)
        return torch.frombuffer(data, dtype=torch_dtype(self._rows.dtype)).view(-1, self._rows.shape[1])

    def close(self) -> None:
        """Give the rows up."""
        self._give_back()
        if self._file is not None:
            self._file.close()


def runs(is_there: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first place, and one past the last, of each stretch of what is there."""
    edges = np.flatnonzero(np.diff(is_there.view(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return torch's float32 or float16 for numpy's."""
    return {"float32": torch.float32, "float16": torch.float16}[dtype.name]
