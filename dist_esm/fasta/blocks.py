"""FASTA as bytes: opening, decompression, line ends and digests, before any record is parsed.

Text passes by in blocks, so memory is a few blocks, whatever the size of the file or of its lines. A
block-gzip file (BGZF, as bgzip and samtools write) is entered at the block that holds the slice's first
byte. Ordinary gzip can only be streamed from its beginning.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dist_esm.fasta.formats import (
    HEAD,
    SUFFIXES,
    compression_of,
    is_readable,
    name_of_bytes,
    name_of_compression,
    name_of_packed,
)
from dist_esm.types import Compression, Slice

Tee = Callable[[bytes], object]
BLOCK = 1 << 20
MAX_LINE = 1 << 26
"""A longer line is no FASTA. Refusing it is what keeps the reader's memory bounded."""
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 16
"""Compressed bytes that are read at once."""
BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends a block-gzip file; SAM/BAM format specification, section 4.1.2."""


CHANGED = "the file was changed while the run was under way: start the run again"
ELSEWHERE = "(other settings need another output_dir)"
"""Goes behind a remedy that is another setting: one output_dir does not mix two."""


class FastaError(ValueError):
    """A file that cannot be read as FASTA; the message names the line and what is wrong with it."""


def whole_file(path: Path) -> Slice:
    """Return the slice that is all of a file. Compression is told by its first bytes, whatever the name.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FastaError
        If the file is in a format that cannot be read, is empty though its name has `.gz`, or lacks its end.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
        compression = compression_of(head)
        if not head and path.suffix.lower() in SUFFIXES:
            packed = SUFFIXES[path.suffix.lower()]
            raise FastaError(
                f"empty {packed} file: it lacks even the {packed} header, so it was cut off or never written"
            )
        if compression is None:
            if words := name_of_bytes(head):
                raise FastaError(f"this is {words}")
        elif not is_readable(compression):
            raise FastaError(f"this is {name_of_compression(compression)}")
        elif is_bgzf(head) and _lacks_end(file):
            raise FastaError(
                "truncated gzip: this is block-gzip (BGZF), and its end block is missing, so the file was "
                "cut off between two blocks, or never finished: fetch it again, or write it again with bgzip"
            )
    return Slice(path, compression=compression)


def is_bgzf(head: bytes) -> bool:
    """Tell if a block of block-gzip begins with these bytes, at least 18."""
    return len(head) >= 18 and head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\x02\x00"


def bgzf_index(file: BinaryIO) -> list[tuple[int, int]] | None:
    """Return (offset in the file, offset in the text) of each block of a block-gzip file, and of its end.

    None if it is not block-gzip throughout. Source: the SAM/BAM format specification, section 4.1.
    """
    entries = []
    offset = text = 0
    file.seek(0)
    while header := file.read(18):
        if not is_bgzf(header):
            return None
        (size,) = struct.unpack("<H", header[16:18])
        if size < len(header):
            return None
        file.seek(offset + size - 3)
        tail = file.read(4)
        if len(tail) < 4:
            return None
        entries.append((offset, text))
        offset += size + 1
        text += struct.unpack("<I", tail)[0]
    return [*entries, (offset, text)]


def _lacks_end(file: BinaryIO) -> bool:
    """Tell if a file is block-gzip throughout and its last block is not the empty one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - CHUNK))
    if file.read().rstrip(b"\0").endswith(BGZF_END.rstrip(b"\0")):
        return False
    return bgzf_index(file) is not None


class _Unpacked:
    """The text of a compressed file. Members or frames follow each other; zeros between them are padding."""

    def __init__(self, file: BinaryIO, new_decompressor: Callable[[], Any], magic: bytes = b"") -> None:
        self._file = file
        self._new_decompressor = new_decompressor
        self._magic = magic
        self._decompressor: Any = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return at most so many bytes; none at the end.

        Raises
        ------
        EOFError
            If the file ends within a member.
        Exception
            What the decompressor raises for damaged data.
        """
        while True:
            if self._decompressor is None:
                while not (data := self._rest.lstrip(b"\0")):
                    self._rest = self._file.read(CHUNK)
                    if not self._rest:
                        return b""
                if not data.startswith(self._magic[: len(data)]):
                    raise gzip.BadGzipFile(f"Not a gzipped file ({data[:2]!r})")
                self._decompressor = self._new_decompressor()
            else:
                data = self._rest
                if not data and self._decompressor.needs_input:
                    data = self._file.read(CHUNK)
                    if not data:
                        raise EOFError
            self._rest = b""
            block: bytes = self._decompressor.decompress(data, size)
            if self._decompressor.eof:
                self._rest, self._decompressor = self._decompressor.unused_data, None
            if block:
                return block


def _open_stream(file: BinaryIO, compression: Compression | None) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return what gives the text of a file, and the errors by which it says that the file is damaged.

    isal, where it is installed, reads gzip about three times as fast as Python's own zlib.
    """
    if compression is None:
        return file, ()
    if compression == "gzip":
        try:
            from isal import igzip_lib
        except ImportError:
            return gzip.GzipFile(fileobj=file), (gzip.BadGzipFile, zlib.error)
        new = partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP)
        # Its stub says less than that it is an exception.
        damaged: type[Exception] = igzip_lib.error  # type: ignore[assignment, unused-ignore]
        return _Unpacked(file, new, b"\x1f\x8b"), (gzip.BadGzipFile, damaged)
    if compression == "bz2":
        import bz2

        return _Unpacked(file, bz2.BZ2Decompressor), (OSError, ValueError)
    if compression == "xz":
        import lzma

        return _Unpacked(file, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)), (lzma.LZMAError,)
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    widest = {zstd.DecompressionParameter.window_log_max: 31}
    return _Unpacked(file, partial(zstd.ZstdDecompressor, options=widest)), (zstd.ZstdError,)


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
        If a compressed file is truncated or damaged, or holds another format than text.
    """
    packed = slice_.compression
    with open(slice_.path, "rb", buffering=0) as file:
        file.seek(slice_.seek[0])
        stream, errors = _open_stream(file, packed)
        position = slice_.seek[1]
        try:
            while slice_.stop is None or position < slice_.stop:
                size = BLOCK if slice_.stop is None else min(BLOCK, slice_.stop - position)
                if position < slice_.start:
                    size = min(size, slice_.start - position)
                block = stream.read(size)
                if not block:
                    break
                if packed and position == 0 and (words := name_of_packed(block[:HEAD], packed)):
                    raise FastaError(f"this is {words}")
                position += len(block)
                if position > slice_.start:
                    if tee is not None:
                        tee(block)
                    yield block
            # Reading one byte more makes gzip check the sum of a block that the slice ends with.
            # That byte begins the next record, if there is one.
            if packed and slice_.stop is not None and stream.read(1) not in (b"", b">"):
                raise FastaError(
                    f"damaged gzip: a block-gzip record border is not at decompressed byte {position}, "
                    "where the sizes of its blocks put it"
                )
        except EOFError:
            raise FastaError(
                f"truncated {packed}: the file ends at byte {file.tell()}, in the middle of its data"
            ) from None
        except errors as error:
            if isinstance(error, FastaError) or getattr(error, "errno", None) is not None:
                raise
            raise FastaError(
                f"damaged {packed} at or before byte {file.tell()} of the file: {error}"
            ) from None
        if packed and position == 0:
            raise FastaError(f"empty {packed} file: it decompresses to nothing")


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
