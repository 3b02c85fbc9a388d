"""How much room ids and headers take as JSON, found while a file is counted.

A format may have a limit for it, and a file that is over it is written as numbered parts. Sizes are upper
bounds: a scan knows neither the id of a record nor its letters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_esm.fasta.blocks import FastaError

GROUP = 16
"""Records whose sizes are kept as one sum, so that memory stays small for a file of many."""
RECORD_BYTES = 72
"""Quotes and commas around an id and a header, the two numbers beside them, and an id that is made up."""


def _bytes_of_characters() -> NDArray[np.uint8]:
    """Bytes that each byte of a header may take as JSON that is text in JSON again, in a header and an id."""
    sizes = np.ones(256, np.uint8)
    sizes[128:] = 2  # as Latin-1
    sizes[:32] = 7  # a backslash twice, and u001f
    sizes[[ord('"'), ord("\\")]] = 4
    sizes[ord("\n")] = 0
    return 2 * sizes


_SIZES = _bytes_of_characters()


def _sizes_of(
    block: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64], num_line_feeds: int
) -> NDArray[np.int64]:
    """Return what lines may take as JSON, the line feeds at their ends left out."""
    data = np.frombuffer(block, dtype=np.uint8)
    is_plain = block.isascii() and b'"' not in block and b"\\" not in block
    if is_plain and np.count_nonzero(data < 32) == num_line_feeds:
        return 2 * (stops - starts)  # nearly always: to look each byte up takes much longer
    borders = np.stack([starts, stops], axis=1).ravel()
    # Every other sum is that of what lies between two headers.
    return np.add.reduceat(np.append(_SIZES[data], 0), borders, dtype=np.int64)[::2]


class HeaderTexts:
    """The sizes of the headers that pass by, in order."""

    def __init__(self) -> None:
        self._sums: list[NDArray[np.int64]] = []
        """Of each whole group of records."""
        self._pending: NDArray[np.int64] = np.empty(0, np.int64)
        """Sizes of the last records, one at least: the next block may go on with a header."""
        self._is_in_header = False

    def add(
        self,
        block: bytes,
        starts: NDArray[np.int64],
        is_header: NDArray[np.bool_],
        continues: bool,
    ) -> None:
        """Take the next block of a text.

        Parameters
        ----------
        block
            Its bytes.
        starts
            Where its lines begin; the last may begin at its end.
        is_header
            Which of them begin with `>`.
        continues
            The first line is the rest of one that the last block ended in.
        """
        is_header = is_header.copy()
        if continues:
            is_header[0] = self._is_in_header
        lines = np.flatnonzero(is_header)
        if len(lines):
            stops = np.append(starts[1:], len(block))[lines]
            sizes = _sizes_of(block, starts[lines], stops, num_line_feeds=len(starts) - 1)
            if continues and is_header[0]:
                self._pending[-1] += sizes[0]
                sizes = sizes[1:]
            self._take(sizes + RECORD_BYTES)
        if len(starts) > 1 or not continues:
            self._is_in_header = bool(is_header[-1])

    def _take(self, sizes: NDArray[np.int64]) -> None:
        pending = np.concatenate([self._pending, sizes])
        num_whole = max(0, len(pending) - 1) // GROUP * GROUP
        if num_whole:
            self._sums.append(pending[:num_whole].reshape(-1, GROUP).sum(axis=1))
        self._pending = pending[num_whole:]

    @property
    def num_bytes(self) -> int:
        """Of all headers and ids."""
        return int(sum(int(sums.sum()) for sums in self._sums) + self._pending.sum())

    def part_size(self, max_records: int, max_bytes: int) -> int:
        """Return how many records a part may have, so that none of them has more than `max_bytes`.

        Raises
        ------
        FastaError
            If a few records have more.
        """
        borders = np.arange(0, len(self._pending), GROUP)
        rest = np.add.reduceat(self._pending, borders) if len(borders) else self._pending
        ends = np.concatenate([[0], *self._sums, rest]).astype(np.int64).cumsum()
        num_records = GROUP * (len(ends) - 1)
        size = max_records
        while size >= 1:
            first = np.arange(0, max(1, num_records), size)
            begin, end = first // GROUP, np.minimum(-(-(first + size) // GROUP), len(ends) - 1)
            if int((ends[end] - ends[begin]).max()) <= max_bytes:
                return size
            size //= 2
        raise FastaError(
            f"ids and headers of {GROUP} records or fewer may take more than the {max_bytes} bytes that one "
            "file of the format holds: shorten them, or use format=parquet in another output_dir"
        )
