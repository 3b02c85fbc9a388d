"""FASTA as bytes: opening, line ends, counting and cutting at disk speed, before any record is parsed.

Counting is a few numpy passes over blocks of the file: a record is a line that begins with ``>``, the parser's own rule, so
the two agree. Cutting never reads a plain file: it jumps to a byte and looks for the next record's border; a block-gzip file
(BGZF, as bgzip and samtools write) is entered at the block that holds the byte. Ordinary gzip can only be streamed.

Memory is a few blocks, whatever the size of the file or of its lines.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_esm.types import Count, Slice

Tee = Callable[[bytes], object]
BLOCK = 1 << 20
MAX_LINE = 1 << 26
"""A longer line is no FASTA; refusing it is what keeps the reader's memory bounded."""
BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_BORDER = re.compile(rb"[\r\n]>")
_NEWLINE, _HEADER, _COMMENT = b"\n>;"


class FastaError(ValueError):
    """A file that cannot be read as FASTA; the message names the line and what is wrong with it."""


def whole(path: Path) -> Slice:
    """The slice that is all of a file. Gzip is told by its first bytes, whatever the name.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FastaError
        If an empty file calls itself gzip.
    """
    with open(path, "rb") as file:
        magic = file.read(2)
    if not magic and path.suffix.lower() == ".gz":
        raise FastaError("empty gzip file: it lacks even the gzip header, so it was cut off or never written")
    return Slice(path, is_gzip=magic == _GZIP_MAGIC)


def raw_blocks(piece: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """The decompressed bytes of a slice; each block is passed to `tee`, too, for whoever wants a digest.

    Raises
    ------
    FastaError
        If gzip is truncated or damaged.
    """
    with open(piece.path, "rb", buffering=0) as file:
        file.seek(piece.seek[0])
        stream: BinaryIO = gzip.GzipFile(fileobj=file) if piece.is_gzip else file  # type: ignore[assignment]
        position = piece.seek[1]
        try:
            while piece.stop is None or position < piece.stop:
                wanted = BLOCK if piece.stop is None else min(BLOCK, piece.stop - position)
                if position < piece.start:
                    wanted = min(wanted, piece.start - position)
                block = stream.read(wanted)
                if not block:
                    break
                position += len(block)
                if position > piece.start:
                    if tee is not None:
                        tee(block)
                    yield block
            # One byte more, so that gzip checks the sum of a block that the slice ends with; it belongs to the next record, if there is one.
            if piece.is_gzip and piece.stop is not None and stream.read(1) not in (b"", b">"):
                raise FastaError(f"damaged gzip: a block-gzip record border is not at decompressed byte {position}, where the sizes of its blocks put it")
        except EOFError:
            raise FastaError(f"truncated gzip: the file ends at byte {file.tell()}, in the middle of its data") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise FastaError(f"damaged gzip at or before byte {file.tell()} of the file: {error}") from None
        if piece.is_gzip and position == 0:
            raise FastaError("empty gzip file: it decompresses to nothing")


def blocks(piece: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """The text of a slice with every line end (LF, CRLF, CR) as LF and no byte order mark; blocks may end within a line."""
    pending = b""
    is_first = piece.start == 0
    for block in raw_blocks(piece, tee):
        block = pending + block
        pending = b""
        if is_first:
            if len(block) < len(BOM) and BOM.startswith(block):
                pending = block
                continue
            block = block.removeprefix(BOM)
            is_first = False
        if b"\r" in block:
            if block.endswith(b"\r"):
                block, pending = block[:-1], b"\r"
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            yield block
    if pending:
        yield pending.replace(b"\r", b"\n")


def digest(piece: Slice) -> str:
    """sha256 of the decompressed bytes of a slice.

    Raises
    ------
    FastaError
        If gzip is damaged.
    OSError
        If the file cannot be read.
    """
    found = hashlib.sha256()
    for _ in raw_blocks(piece, found.update):
        pass
    return found.hexdigest()


class Digests:
    """sha256 of ranges of a text that goes by once, in blocks; of each what `digest` says of such a slice.

    Parameters
    ----------
    ranges
        (start, stop) in bytes of the decompressed text, in order, without overlaps; None: to the end.
    """

    def __init__(self, ranges: Sequence[tuple[int, int | None]]) -> None:
        self._ranges = list(ranges)
        self._found = [hashlib.sha256() for _ in ranges]
        self.num_bytes = 0
        """Of the text so far."""

    def update(self, block: bytes) -> None:
        """The next block."""
        first, after = self.num_bytes, self.num_bytes + len(block)
        for (start, stop), found in zip(self._ranges, self._found, strict=True):
            stop = after if stop is None else stop
            if start < after and stop > first:
                found.update(block[max(0, start - first) : stop - first])
        self.num_bytes = after

    def hexdigests(self) -> list[str]:
        """Of the text so far."""
        return [found.hexdigest() for found in self._found]


def lines(piece: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """The lines of a slice, without their ends.

    Raises
    ------
    FastaError
        If gzip is damaged, or a line is longer than `MAX_LINE`.
    """
    parts: list[bytes] = []
    length = 0
    for block in blocks(piece, tee):
        first, *rest = block.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > MAX_LINE:
            raise FastaError(f"a line of more than {MAX_LINE} bytes: this is no FASTA file")
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
            length = len(rest[-1])
    if length:
        yield b"".join(parts)


def count(piece: Slice, max_residues: int | None = None) -> Count:
    """Count the records, residues and lines of a slice.

    Parameters
    ----------
    piece
        What to count.
    max_residues
        Residues that one forward sees of a record, for `Count.squares`; None: all.

    Raises
    ------
    FastaError
        If gzip is damaged.
    OSError
        If the file cannot be read.
    """
    limit = np.iinfo(np.int64).max if max_residues is None else max_residues
    sequences = residues = squares = num_lines = 0
    open_record = 0  # residues so far of the record that the last block ended in
    in_record = False
    carried: bool | None = None  # whether the line that the last block ended in holds residues; None: it ended at a line end
    for block in blocks(piece):
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
        if len(headers):
            if in_record:
                residues += open_record + int(borders[0])
                squares += min(open_record + int(borders[0]), limit) ** 2
            finished = np.diff(borders)
            residues += int(finished.sum())
            squares += int((np.minimum(finished, limit) ** 2).sum())
            in_record, open_record = True, total - int(borders[-1])
        elif in_record:
            open_record += total
    if in_record:
        residues += open_record
        squares += min(open_record, limit) ** 2
    return Count(sequences, residues, squares, num_lines + (carried is not None))


def cut(piece: Slice, num_bytes: int, num_slices: int) -> list[Slice]:
    """Cut a slice at record borders into at most `num_slices` of about equal size.

    Parameters
    ----------
    piece
        What to cut. Gzip that is not block-gzip comes back whole.
    num_bytes
        The size of its file on disk.
    num_slices
        How many slices are wanted.
    """
    index = _bgzf_index(piece.path) if piece.is_gzip else None
    if num_slices < 2 or (piece.is_gzip and index is None):
        return [piece]
    end = piece.stop if piece.stop is not None else (index[-1][1] if index else num_bytes)
    borders = [piece.start]
    for number in range(1, num_slices):
        target = piece.start + (end - piece.start) * number // num_slices
        if target > borders[-1]:  # else the last border is the next one after this byte, too
            borders.append(_next_record(piece, target, end, index))
    borders = [border for border in borders if border < end] + [end]
    slices = [Slice(piece.path, start, stop, _entry(index, start) if piece.is_gzip else (start, start), piece.is_gzip) for start, stop in pairwise(borders)]
    return slices or [piece]


def _entry(index: list[tuple[int, int]] | None, offset: int) -> tuple[int, int]:
    """Where to enter a file to read its text from an offset."""
    if index is None:
        return (offset, offset)
    return index[max(0, bisect_right(index, offset, key=lambda entry: entry[1]) - 1)]


def _next_record(piece: Slice, target: int, end: int, index: list[tuple[int, int]] | None) -> int:
    """Offset of the first record at or after a byte that is not a slice's first."""
    start = target - 1
    position, last = start, b""
    for block in raw_blocks(Slice(piece.path, start, end, _entry(index, start), piece.is_gzip)):
        if found := _BORDER.search(last + block):
            return position - len(last) + found.end() - 1
        position += len(block)
        last = block[-1:]
    return end


def _bgzf_index(path: Path) -> list[tuple[int, int]] | None:
    """(offset in the file, offset in the text) of each block of a block-gzip file, the end as the last; None: not block-gzip.

    Source: the SAM/BAM format specification, section 4.1.
    """
    entries = []
    offset = text = 0
    with open(path, "rb") as file:
        while header := file.read(18):
            if len(header) < 18 or header[:4] != b"\x1f\x8b\x08\x04" or header[12:16] != b"BC\x02\x00":
                return None
            entries.append((offset, text))
            (size,) = struct.unpack("<H", header[16:18])
            if size < len(header):
                return None
            file.seek(offset + size - 3)
            tail = file.read(4)
            if len(tail) < 4:
                return None
            offset += size + 1
            text += struct.unpack("<I", tail)[0]
    return [*entries, (offset, text)]
