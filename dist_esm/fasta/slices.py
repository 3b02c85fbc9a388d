"""Slices of whole records: counted by passes over bytes, cut at record borders without reading the file.

Counting is a few numpy passes over blocks of the file. A record is a line that begins with ``>``, which is
the parser's own rule, so both find the same number of records. Cutting never reads a plain file: it jumps
to a byte and looks for the next record's border. A block-gzip file is entered at the block that holds the
byte.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dist_esm.fasta.blocks import bgzf_index, raw_blocks, text_blocks
from dist_esm.fasta.header_texts import HeaderTexts
from dist_esm.types import Count, LengthHistogram, Slice

_BORDER = re.compile(rb"[\r\n]>")
_NEWLINE, _HEADER, _COMMENT = b"\n>;"


def count_records(
    slice_: Slice,
    max_residues: int | None = None,
    texts: HeaderTexts | None = None,
    histogram: LengthHistogram | None = None,
) -> Count:
    """Count the records, the bytes of sequence lines, and the lines of a slice.

    Parameters
    ----------
    slice_
        What to count.
    max_residues
        Residues that one forward sees of a record, for what `Count` says of it; None: all.
    texts
        Is told of the headers.
    histogram
        Is told of the records' lengths.

    Returns
    -------
    Count
        A scan knows no policy for letters: `residues` are bytes of sequence lines, blanks and gaps included.

    Raises
    ------
    FastaError
        If gzip is damaged.
    OSError
        If the file cannot be read.
    """
    limit = np.iinfo(np.int64).max if max_residues is None else max_residues
    sequences = num_lines = num_header_bytes = 0
    measured = _Lengths(limit, histogram)
    open_record = 0  # residues so far of the record that the last block ended in
    in_record = False
    # True if the line that the last block ended in holds residues; None if that block ended at a line end.
    carried: bool | None = None
    for block in text_blocks(slice_):
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(data == _NEWLINE)
        starts = np.empty(len(ends) + 1, dtype=np.int64)
        starts[0] = 0
        np.add(ends, 1, out=starts[1:])
        lengths = np.append(ends, len(data))
        lengths -= starts
        first = data.take(starts, mode="clip")
        is_header = (first == _HEADER) & (lengths > 0)
        is_text = ~(is_header | (first == _COMMENT))
        if texts is not None:
            texts.add(block, starts, is_header, carried is not None)
        if carried is not None:
            is_header[0], is_text[0] = False, carried
        carried = bool(is_text[-1]) if lengths[-1] else None
        headers = np.flatnonzero(is_header)
        lengths *= is_text
        num_residues = np.cumsum(lengths)
        borders = num_residues[headers]
        num_lines += len(ends)
        sequences += len(headers)
        total = int(num_residues[-1])
        num_header_bytes += len(data) - len(ends) - total
        if len(headers):
            if in_record:
                borders = np.insert(borders, 0, -open_record)
            measured.add(np.diff(borders))
            in_record, open_record = True, total - int(borders[-1])
        elif in_record:
            open_record += total
    if in_record:
        measured.add(np.array([open_record], dtype=np.int64))
    return Count(
        sequences=sequences,
        residues=measured.residues,
        squares=measured.squares,
        lines=num_lines + (carried is not None),
        seen=measured.seen,
        num_long=measured.num_long,
        headers=num_header_bytes,
    )


class _Lengths:
    """Sums over the lengths of records, of which one forward sees at most `limit` residues."""

    def __init__(self, limit: int, histogram: LengthHistogram | None) -> None:
        self.residues = self.seen = self.squares = self.num_long = 0
        self._limit = limit
        self._histogram = histogram

    def add(self, lengths: NDArray[np.int64]) -> None:
        seen = np.minimum(lengths, self._limit)
        self.residues += int(lengths.sum())
        self.seen += int(seen.sum())
        self.squares += int((seen**2).sum())
        self.num_long += int((lengths > self._limit).sum())
        if self._histogram is not None:
            self._histogram.add(lengths)


def cut_slice(slice_: Slice, num_bytes: int, num_slices: int) -> list[Slice]:
    """Cut a slice at record borders into at most `num_slices` of about equal size.

    Parameters
    ----------
    slice_
        What to cut.
    num_bytes
        Size of its file on disk.
    num_slices
        Largest number of slices.

    Returns
    -------
    list of Slice
        In order. Of compressed files only block-gzip is cut.
    """
    if num_slices < 2 or slice_.compression not in (None, "gzip"):
        return [slice_]
    index = None
    if slice_.compression == "gzip":
        with open(slice_.path, "rb") as file:
            index = bgzf_index(file)
        if index is None:
            return [slice_]
    end = slice_.stop if slice_.stop is not None else (index[-1][1] if index else num_bytes)
    borders = [slice_.start]
    for index_of_cut in range(1, num_slices):
        target = slice_.start + (end - slice_.start) * index_of_cut // num_slices
        if target > borders[-1]:  # else the last border is the next one after this byte, too
            borders.append(_next_record(slice_, target, end, index))
    borders = [border for border in borders if border < end] + [end]
    slices = [
        Slice(slice_.path, start, stop, _entry(index, start), slice_.compression)
        for start, stop in pairwise(borders)
    ]
    return slices or [slice_]


def _entry(index: list[tuple[int, int]] | None, offset: int) -> tuple[int, int]:
    """Return where to enter a file to read on from an offset in its text: (file offset, text offset)."""
    if index is None:
        return (offset, offset)
    return index[max(0, bisect_right(index, offset, key=lambda entry: entry[1]) - 1)]


def _next_record(slice_: Slice, target: int, end: int, index: list[tuple[int, int]] | None) -> int:
    """Return the offset of the first record at or after a byte that is not a slice's first."""
    start = target - 1
    position, last = start, b""
    for block in raw_blocks(Slice(slice_.path, start, end, _entry(index, start), slice_.compression)):
        if border := _BORDER.search(last + block):
            return position - len(last) + border.end() - 1
        position += len(block)
        last = block[-1:]
    return end
