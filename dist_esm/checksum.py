"""Checksums of outputs, put together of those of blocks.

The sha256 of a file can only be taken from its first byte to its last, which of a large file takes long after
its numbers are written. Those of its blocks are taken by whoever has the bytes at hand, in any order, on any
rank. So the checksum of a file of more than one block is the sha256 of those of its blocks, marked as such;
that of a smaller one is its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from dist_esm.types import WrittenFile

BLOCK_BYTES = 1 << 18
"""It stays as it is: the journals of all runs hold checksums of it."""
MARK = "blocks:"
"""In front of a checksum that depends on how files are cut into blocks."""
Block = tuple[int, int]
"""First byte of a block of a file, or of a part of one, and one past the last."""
Sum = TypeVar("Sum")
MOST_THREADS = 8
BLOCKS_AT_ONCE = 32
"""Blocks that a thread reads and sums before it asks for more."""


class BlockSums:
    """The sha256 of each block of a part of a file, whose bytes come one after another.

    Parameters
    ----------
    start
        Bytes of the file in front of the part.
    """

    def __init__(self, start: int = 0) -> None:
        self._position = start
        self._digests: list[bytes] = []
        self._open = hashlib.sha256()
        self._open_bytes = 0

    def add(self, data: Any) -> None:
        """Add the next bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            taken = view[: BLOCK_BYTES - self._position % BLOCK_BYTES]
            view = view[len(taken) :]
            self._open.update(taken)
            self._open_bytes += len(taken)
            self._position += len(taken)
            if self._position % BLOCK_BYTES == 0:
                self._digests.append(self._open.digest())
                self._open, self._open_bytes = hashlib.sha256(), 0

    def digests(self) -> list[bytes]:
        """Return the sha256 of what is there of each block."""
        return [*self._digests, self._open.digest()] if self._open_bytes else list(self._digests)


def checksum_of_blocks(digests: Sequence[bytes]) -> str:
    """Return the checksum of a file, given the sha256 of each of its blocks."""
    if len(digests) <= 1:
        return (digests[0] if digests else hashlib.sha256().digest()).hex()
    return MARK + hashlib.sha256(b"".join(digests)).hexdigest()


def checksum_of_files(files: Sequence[WrittenFile]) -> str:
    """Return the checksum of a folder: the sha256 of a list of its files with their checksums, in the order
    of their paths."""
    text = json.dumps([asdict(file) for file in sorted(files, key=lambda file: Path(file.path))])
    mark = MARK if any(file.sha256.startswith(MARK) for file in files) else ""
    return mark + hashlib.sha256(text.encode()).hexdigest()


def block_of(position: int) -> Block:
    """Return the block in which a byte of a file is."""
    start = position // BLOCK_BYTES * BLOCK_BYTES
    return start, start + BLOCK_BYTES


def blocks_in(start: int, stop: int) -> list[Block]:
    """Return what a part of a file has of each block."""
    begins = [start, *range(block_of(start)[1], stop, BLOCK_BYTES)]
    return list(pairwise([*begins, stop])) if start < stop else []


def whole_blocks(start: int, stop: int, digests: Sequence[bytes]) -> dict[int, bytes]:
    """Return the blocks that lie within a part of a file, by number, given what `BlockSums` has of it."""
    return {
        number: digest
        for number, digest in enumerate(digests, start // BLOCK_BYTES)
        if start <= number * BLOCK_BYTES and (number + 1) * BLOCK_BYTES <= stop
    }


def summed(path: Path, name: str, known: Mapping[int, bytes]) -> WrittenFile:
    """Take the checksum of a file, and read only the blocks of it that are not known.

    Parameters
    ----------
    path
        The file.
    name
        Its name in the result.
    known
        The sha256 of some of its blocks, by number.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(descriptor).st_size
        blocks = list(enumerate(blocks_in(0, num_bytes)))
        missing = [block for number, block in blocks if number not in known]

        def digest_of(block: Block) -> bytes:
            return hashlib.sha256(read_at(descriptor, *block)).digest()

        found = dict(zip(missing, sum_blocks(digest_of, missing), strict=True))
        digests = [found[block] if block in found else known[number] for number, block in blocks]
        return WrittenFile(name, num_bytes, checksum_of_blocks(digests))
    finally:
        os.close(descriptor)


def sum_blocks(sum_block: Callable[[Block], Sum], blocks: Sequence[Block]) -> list[Sum]:
    """Sum blocks that have to be read, some at a time in threads if there are many.

    Raises
    ------
    Exception
        Whatever `sum_block` raises.
    """

    def sum_share(share: Sequence[Block]) -> list[Sum]:
        return list(map(sum_block, share))

    shares = [blocks[at : at + BLOCKS_AT_ONCE] for at in range(0, len(blocks), BLOCKS_AT_ONCE)]
    if len(shares) < 2:
        return sum_share(blocks)
    with ThreadPoolExecutor(min(MOST_THREADS, len(shares)), "checksum") as threads:
        return [found for share in threads.map(sum_share, shares) for found in share]


def read_at(descriptor: int, start: int, stop: int) -> bytearray:
    """Read bytes of an open file; there are fewer if it is shorter."""
    found = bytearray()
    while more := os.pread(descriptor, stop - start - len(found), start + len(found)):
        found += more
    return found


def read_back(output_dir: Path, path: Path, is_plain: bool = False) -> WrittenFile | None:
    """Read an output, and return its size and checksum.

    Parameters
    ----------
    output_dir
        What `path` is relative to.
    path
        A file, or a folder of files.
    is_plain
        Take the sha256 of whole files, however large, as earlier versions did.

    Returns
    -------
    WrittenFile or None
        None if it is not there, or is neither, as a pipe.
    """
    full = output_dir / path
    if full.exists() and not (full.is_file() or full.is_dir()):
        return None
    if full.is_dir():
        files = [
            read_back(full, file.relative_to(full), is_plain)
            for file in sorted(full.rglob("*"))
            if file.is_file()
        ]
        parts = [file for file in files if file is not None]
        return WrittenFile(str(path), sum(file.num_bytes for file in parts), checksum_of_files(parts))
    try:
        if not is_plain:
            return summed(full, str(path), {})
        with open(full, "rb", buffering=0) as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            return WrittenFile(str(path), os.fstat(file.fileno()).st_size, checksum)
    except FileNotFoundError:
        return None


def read_again(output_dir: Path, written: WrittenFile) -> WrittenFile | None:
    """Return what an output is now, to be compared with what it was when it was written."""
    return read_back(output_dir, Path(written.path), is_plain=not written.sha256.startswith(MARK))
