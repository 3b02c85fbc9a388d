"""An HDF5 file but for the numbers that are written to their places by others: a hole in it.

No h5py is needed for it, so that whoever writes such numbers need not import it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.outputs.formats.base import representation_name

BLOCK_BYTES = 1 << 20
SPOOL_BYTES = 1 << 28
"""Bytes of a file without its numbers that are kept in memory."""


def attribute_header(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return what HDF5 writes in front of the numbers of an attribute that stands by itself.

    Source: HDF5 File Format Specification 3.0, IV.A.2: attribute message of version 3, with a datatype
    message of version 1 and a dataspace message of version 2.
    """
    limits, num_bits = np.finfo(dtype), 8 * dtype.itemsize
    bias = (1 << limits.nexp - 1) - 1
    float_type = struct.pack("<4B", 0x11, 0x20, num_bits - 1, 0)
    float_type += struct.pack("<I2H", dtype.itemsize, 0, num_bits)
    float_type += struct.pack("<4BI", limits.nmant, limits.nexp, 0, limits.nmant, bias)
    space = struct.pack(f"<4B{2 * len(shape)}Q", 2, len(shape), 1, 1, *shape, *shape)
    text = name.encode() + b"\0"
    sizes = struct.pack("<2B3HB", 3, 0, len(text), len(float_type), len(space), 0)
    return sizes + text + float_type + space


@dataclass(frozen=True)
class AttributePages:
    """The residues of a further layer, as `Pages` of `base`: each protein's attribute is a page."""

    layer: int
    lengths: NDArray[np.int64]
    """Of the proteins."""
    width: int
    dtype: np.dtype[Any]
    first: int = 0
    """The first residue of the first protein."""

    def header(self, number: int) -> bytes:
        """Return what stands in front of the residues of a protein."""
        shape = int(self.lengths[number]), self.width
        return attribute_header(representation_name("per_tok", self.layer), shape, self.dtype)

    def some(self, first: int, last: int) -> AttributePages:
        """Return the pages from number `first` to `last`, as if there were no others."""
        return replace(self, lengths=self.lengths[first : last + 1], first=int(self.firsts[first]))

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The first residue of each protein, and the number of all."""
        return self.first + np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def header_bytes(self) -> NDArray[np.int64]:
        """Bytes in front of the residues of each protein, and 0."""
        size = len(self.header(0)) if len(self.lengths) else 0
        return np.array([*[size] * len(self.lengths), 0], np.int64)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each attribute begins, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each attribute."""
        return self.header_bytes[:-1] + self.lengths * self.width * self.dtype.itemsize


class FileWithHole:
    """All of a file but a range of it that HDF5 has no numbers for, as an open file for HDF5.

    It is in memory, or in a nameless file if it is large.

    Parameters
    ----------
    folder
        Where the nameless file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.hole = range(0)
        self.pages: dict[int, tuple[int, AttributePages]] = {}
        """By layer, where the attributes in the hole begin, and these. HDF5 writes them without their
        numbers, which is passed over."""
        self.last_page: int | None = None
        """Where HDF5 has written such an attribute last."""
        self._file = SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder))  # noqa: SIM115 - closed by close()
        self._position = 0
        self._end = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def _go_to(self, position: int) -> None:
        """Go to where a byte outside the hole is."""
        self._file.seek(position - (len(self.hole) if position >= self.hole.stop else 0))

    def write(self, data: Any) -> int:
        """Write bytes.

        Raises
        ------
        ValueError
            If they are in the hole, and are not one of its attributes.
        """
        view = memoryview(data)
        start, stop = self._position, self._position + view.nbytes
        if start < self.hole.stop and stop > self.hole.start and self.hole:
            header, size = self._page_at(start)
            if size != view.nbytes or view[: len(header)] != header:
                raise ValueError("HDF5 writes to where the numbers of datasets belong")
            self.last_page = start
        else:
            self._go_to(start)
            self._file.write(view)
        self._position = stop
        self._end = max(self._end, stop)
        return view.nbytes

    def _page_at(self, start: int) -> tuple[bytes, int]:
        """Return the header and the bytes of the attribute in the hole that begins here; none: b"", 0."""
        for first, pages in self.pages.values():
            number = int(np.searchsorted(pages.offsets, start - first))
            if number < len(pages.lengths) and first + pages.offsets[number] == start:
                return pages.header(number), int(pages.sizes[number])
        return b"", 0

    def readinto(self, buffer: Any) -> int:
        """Read bytes; what was not written is zero, as are numbers in the hole: HDF5 reads on behind what it
        is after."""
        view = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + view.nbytes
        view[:] = bytes(view.nbytes)
        header = self._page_at(start)[0][: view.nbytes]
        view[: len(header)] = header
        for first, last in ((start, min(stop, self.hole.start)), (max(start, self.hole.stop), stop)):
            if first < last:
                self._go_to(first)
                found = self._file.read(last - first)
                view[first - start : first - start + len(found)] = found
        self._position = stop
        return view.nbytes

    def truncate(self, size: int) -> int:
        """Set the size of the whole file."""
        self._end = size
        self._file.truncate(size - (len(self.hole) if size >= self.hole.stop else 0))
        return size

    def flush(self) -> None:
        """Do nothing: nobody else sees the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes without those of the hole."""
        return self._end - len(self.hole)

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Give bytes from start up to stop, those of the hole not counted."""
        self._file.seek(start)
        for begin in range(start, stop, BLOCK_BYTES):
            size = min(BLOCK_BYTES, stop - begin)
            yield self._file.read(size).ljust(size, b"\0")

    def close(self) -> None:
        """Give it up."""
        self._file.close()
