"""Columns of numbers in Parquet as they lie in a mapped file, without a copy.

A reader of Parquet decodes a whole row group for one row of it, and takes six times the memory of its
numbers. Here only the headers of pages are read: the values of a page that is neither compressed nor has
nulls are a matrix, and stand at its end.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.outputs.formats.parquet_pages import DATA_PAGE, PLAIN, STRUCT, Struct, read_value

HEADER_BYTES = 1 << 12
"""A header of a page is shorter; it may have the least and the greatest value in it."""


@dataclass(frozen=True)
class MappedColumn:
    """The vectors of one column in one row group."""

    pages: list[NDArray[Any]]
    """Each of shape (vectors, D)."""
    starts: list[int]
    """The first vector of each page, and the number of all."""

    def vectors(self, start: int, stop: int) -> NDArray[Any]:
        """Return vectors from `start` up to `stop`, shape (stop - start, D): a view if one page has them."""
        first = min(bisect_right(self.starts, start), len(self.pages)) - 1
        parts = []
        for page, page_start in zip(self.pages[first:], self.starts[first:], strict=False):
            parts.append(page[max(0, start - page_start) : stop - page_start])
            if stop <= page_start + len(page):
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def map_column(
    file: NDArray[np.uint8], start: int, stop: int, dtype: np.dtype[Any], width: int
) -> MappedColumn | None:
    """Map the vectors of a column in a row group.

    Parameters
    ----------
    file
        The whole file, mapped.
    start, stop
        Where the column's pages begin, and where they end.
    dtype, width
        Of its numbers, and D.

    Returns
    -------
    MappedColumn or None
        None if its pages are laid out in another way than `parquet_pages` does it: whoever asks must decode
        them.
    """
    pages = []
    while start < stop:
        head = io.BytesIO(file[start : start + HEADER_BYTES].tobytes())
        header = read_value(head, STRUCT)
        start += head.tell()
        if header[1] != DATA_PAGE or header[2] != header[3] or not isinstance(header.fields[5][1], Struct):
            return None
        num_values, encoding = header[5][1], header[5][2]
        content = file[start : start + header[3]]
        num_bytes = num_values * dtype.itemsize
        if encoding != PLAIN or num_values % width or levels_size(content) + num_bytes != len(content):
            return None
        pages.append(content[len(content) - num_bytes :].view(dtype).reshape(-1, width))
        start += len(content)
    if not pages:
        return None
    return MappedColumn(pages, [0, *accumulate(map(len, pages))])


def levels_size(content: NDArray[np.uint8]) -> int:
    """Return the bytes of the levels of a page of lists: two stretches, each behind its length."""
    first = 4 + int.from_bytes(content[:4].tobytes(), "little")
    return first + 4 + int.from_bytes(content[first : first + 4].tobytes(), "little")
