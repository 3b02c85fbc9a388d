"""FASTA as bytes: opening, line ends, counting and cutting at disk speed, before any record is parsed.

Counting is a few numpy passes over blocks of the file: a record is a line that begins with ``>``, the parser's own rule, so
the two agree. Cutting never reads a plain file: it jumps to a byte and looks for the next record's border; a block-gzip file
(BGZF, as bgzip and samtools write) is entered at the block that holds the byte. Ordinary gzip can only be streamed.

Memory is a few blocks, whatever the size of the file or of its lines.
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
"""A longer line is no FASTA; refusing it is what keeps the reader's memory bounded."""
BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


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
                raise FastaError(
                    f"damaged gzip: a block-gzip record border is not at decompressed byte {position}, where the sizes of its blocks put it"
                )
        except EOFError:
            raise FastaError(
                f"truncated gzip: the file ends at byte {file.tell()}, in the middle of its data"
            ) from None
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
