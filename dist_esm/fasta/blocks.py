"""FASTA as bytes: opening, gzip, line ends and digests, before any record is parsed.

Text passes by in blocks, so memory is a few blocks, whatever the size of the file or of its lines. A
block-gzip file (BGZF, as bgzip and samtools write) is entered at the block that holds the slice's first
byte. Ordinary gzip can only be streamed from its beginning.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dist_esm.types import Slice

Tee = Callable[[bytes], object]
BLOCK = 1 << 20
MAX_LINE = 1 << 26
"""A longer line is no FASTA. Refusing it is what keeps the reader's memory bounded."""
BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


class FastaError(ValueError):
    """A file that cannot be read as FASTA; the message names the line and what is wrong with it."""


def whole_file(path: Path) -> Slice:
    """Return the slice that is all of a file. Gzip is told by its first bytes, whatever the name.

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


def raw_blocks(slice_: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """Yield the decompressed bytes of a slice, block by block.

    Parameters
    ----------
    slice_
        What to read.
    tee
        Called with each block before it is yielded, for example `update` of a hash.

    Raises
    ------
    FastaError
        If gzip is truncated or damaged.
    """
    with open(slice_.path, "rb", buffering=0) as file:
        file.seek(slice_.seek[0])
        stream: BinaryIO = gzip.GzipFile(fileobj=file) if slice_.is_gzip else file  # type: ignore[assignment]
        position = slice_.seek[1]
        try:
            while slice_.stop is None or position < slice_.stop:
                size = BLOCK if slice_.stop is None else min(BLOCK, slice_.stop - position)
                if position < slice_.start:
                    size = min(size, slice_.start - position)
                block = stream.read(size)
                if not block:
                    break
                position += len(block)
                if position > slice_.start:
                    if tee is not None:
                        tee(block)
                    yield block
            # Reading one byte more makes gzip check the sum of a block that the slice ends with.
            # That byte begins the next record, if there is one.
            if slice_.is_gzip and slice_.stop is not None and stream.read(1) not in (b"", b">"):
                raise FastaError(
                    f"damaged gzip: a block-gzip record border is not at decompressed byte {position}, "
                    "where the sizes of its blocks put it"
                )
        except EOFError:
            raise FastaError(
                f"truncated gzip: the file ends at byte {file.tell()}, in the middle of its data"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise FastaError(f"damaged gzip at or before byte {file.tell()} of the file: {error}") from None
        if slice_.is_gzip and position == 0:
            raise FastaError("empty gzip file: it decompresses to nothing")


def text_blocks(slice_: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """Yield the text of a slice with every line end (LF, CRLF, CR) as LF and without a byte order mark.

    Blocks may end within a line. `tee` is called with the bytes as they are in the file.
    """
    pending = b""
    is_first = slice_.start == 0
    for block in raw_blocks(slice_, tee):
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


def text_digest(slice_: Slice) -> str:
    """Return the sha256 of the decompressed bytes of a slice.

    Raises
    ------
    FastaError
        If gzip is damaged.
    OSError
        If the file cannot be read.
    """
    sha256 = hashlib.sha256()
    for _ in raw_blocks(slice_, sha256.update):
        pass
    return sha256.hexdigest()


class Digests:
    """The sha256 of several ranges of a text that passes by once, in blocks.

    The digest of a range is what `text_digest` returns for a slice of these bytes.

    Parameters
    ----------
    ranges
        (start, stop) in bytes of the decompressed text, in order, without overlaps; None: to the end.
    """

    def __init__(self, ranges: Sequence[tuple[int, int | None]]) -> None:
        self._ranges = list(ranges)
        self._hashes = [hashlib.sha256() for _ in ranges]
        self.num_bytes = 0
        """Length of the text so far."""

    def update(self, block: bytes) -> None:
        """Take the next block of the text."""
        first, after = self.num_bytes, self.num_bytes + len(block)
        for (start, stop), sha256 in zip(self._ranges, self._hashes, strict=True):
            stop = after if stop is None else stop
            if start < after and stop > first:
                sha256.update(block[max(0, start - first) : stop - first])
        self.num_bytes = after

    def hexdigests(self) -> list[str]:
        """Return the digest of each range, as far as the text has come."""
        return [sha256.hexdigest() for sha256 in self._hashes]


def text_lines(slice_: Slice, tee: Tee | None = None) -> Iterator[bytes]:
    """Yield the lines of a slice, without their ends. `tee` is called with the bytes as they are in the file.

    Raises
    ------
    FastaError
        If gzip is damaged, or a line is longer than `MAX_LINE`.
    """
    parts: list[bytes] = []
    length = 0
    for block in text_blocks(slice_, tee):
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
