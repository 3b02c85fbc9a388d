"""A region of a file that several processes write at once, each to regions of its own.

Regions need not begin and end with pages, and two hosts that write to one page of a file on a network file
system may undo each other's bytes. So a process writes the whole pages of its region alone. The bytes at both
ends, less than a page each, it keeps: who completes the file writes them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_esm.atomic import start_syncing, write_all_at, write_at
from dist_esm.checksum import (
    BLOCK_BYTES,
    Block,
    BlockSums,
    block_of,
    blocks_in,
    read_at,
    sum_blocks,
    whole_blocks,
)

PAGE_BYTES = mmap.PAGESIZE
STRETCH_BYTES = 16 * BLOCK_BYTES
"""What a thread writes and sums before it asks for more: whole blocks, but for those at the ends."""
STRETCH_THREADS = 4
"""Threads that write one region. One sums 0.5 to 1.5 GB/s, so that the last of 150 MB would take 0.1 to 0.4 s
in which the device has nothing to do."""


class BlockSum(NamedTuple):
    """Checksums of a block."""

    sha256: bytes
    crc32: int
    """0 if it was not taken."""


def sum_of(data: Any, has_crc: bool) -> BlockSum:
    """Take the checksums of a block."""
    return BlockSum(hashlib.sha256(data).digest(), zlib.crc32(data) if has_crc else 0)


@dataclass(frozen=True)
class WrittenRegion:
    """A region whose whole pages are on disk."""

    start: int
    """Bytes in front of it."""
    stop: int
    head: bytes
    """Its bytes in front of its first whole page."""
    tail: bytes
    """Its bytes behind its last whole page."""
    digests: tuple[bytes, ...]
    """The sha256 of what it has of each block of the file, as of `BlockSums`."""
    crc32: int
    """0 if it was not taken."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.stop - self.start

    def write_ends(self, path: Path) -> None:
        """Write the bytes at both ends. Nobody else may write to the file any more."""
        for start, data in ((self.start, self.head), (self.stop - len(self.tail), self.tail)):
            if data:
                path.parent.mkdir(exist_ok=True)  # no page may have been written
                write_at(path, start, data)

    def is_intact(self, path: Path) -> bool:
        """Tell if the file has the bytes that were written."""
        try:
            return self.summed(path, has_crc=False, known={}).digests == self.digests
        except OSError:
            return False

    def summed(self, path: Path, has_crc: bool, known: Mapping[Block, BlockSum]) -> WrittenRegion:
        """Return the region with checksums of what the file has now.

        Parameters
        ----------
        path
            The file.
        has_crc
            Take the CRC-32, too; else it is 0.
        known
            What was summed already: it is not read.

        Raises
        ------
        OSError
            If the file cannot be read.
        """

        def sum_block(block: Block) -> BlockSum:
            start, stop = block
            return sum_of(self.read(path, start - self.start, stop - self.start), has_crc)

        sums, blocks = dict(known), blocks_in(self.start, self.stop)
        missing = [block for block in blocks if block not in sums]
        sums |= zip(missing, sum_blocks(sum_block, missing), strict=True)
        crc32 = 0
        for start, stop in blocks if has_crc else []:
            crc32 = joined_crc32(crc32, sums[start, stop].crc32, stop - start)
        return replace(self, digests=tuple(sums[block].sha256 for block in blocks), crc32=crc32)

    def whole_blocks(self) -> dict[int, bytes]:
        """Return the sha256 of the blocks of the file that lie within it, by number."""
        return whole_blocks(self.start, self.stop, self.digests)

    def read(self, path: Path, start: int, stop: int) -> bytearray:
        """Read bytes of the region; offsets count from its beginning. There are fewer if the file is
        shorter."""
        inner_start, inner_stop = len(self.head), self.num_bytes - len(self.tail)
        found = bytearray(self.head[start:stop])
        first, last = max(start, inner_start), min(stop, inner_stop)
        if first < last:
            with open(path, "rb", buffering=0) as file:
                file.seek(self.start + first)
                while first < last and (block := file.read(last - first)):
                    found += block
                    first += len(block)
        if stop > inner_stop:
            found += self.tail[max(0, start - inner_stop) : stop - inner_stop]
        return found

    def rows(
        self, path: Path, dtype: np.dtype[Any], width: int, pieces: Sequence[tuple[int, int]]
    ) -> list[NDArray[Any]]:
        """Return its rows, in matrices that follow one another. Those in whole pages are mapped.

        Parameters
        ----------
        path
            The file.
        dtype, width
            Of each row.
        pieces
            What it consists of: bytes to pass over, and the number of rows behind them.
        """
        row_bytes = width * dtype.itemsize
        inner_start, inner_stop = len(self.head), self.num_bytes - len(self.tail)
        found = []
        mapped: NDArray[Any] | None = None
        offset = 0
        for passed, num_rows in pieces:
            offset += passed
            stop = offset + num_rows * row_bytes
            # Borders between what is read and what is mapped, at whole rows.
            first = min(stop, offset + max(0, -(-(inner_start - offset) // row_bytes)) * row_bytes)
            last = max(first, offset + max(0, inner_stop - offset) // row_bytes * row_bytes)
            last = min(last, stop)
            for begin, end, is_mapped in ((offset, first, False), (first, last, True), (last, stop, False)):
                if begin == end:
                    continue
                if is_mapped:
                    mapped = np.memmap(path, np.uint8, "c") if mapped is None else mapped
                    data = mapped[self.start + begin : self.start + end]
                else:
                    data = np.frombuffer(self.read(path, begin, end), np.uint8)
                found.append(data.view(dtype).reshape(-1, width))
            offset = stop
        return found or [np.empty((0, width), dtype)]


class OutsideError(ValueError):
    """Bytes do not lie within a region."""


class Region:
    """A region that is being written.

    Parameters
    ----------
    path
        The file; it is made when the first bytes are written.
    start, stop
        First byte, and one past the last.
    has_crc
        Take the CRC-32, too, which costs half as much as the sha256.
    """

    def __init__(self, path: Path, start: int, stop: int, has_crc: bool = True) -> None:
        page = PAGE_BYTES
        inner_start = min(stop, -(-start // page) * page)
        inner_stop = max(inner_start, stop // page * page)
        self.path = path
        self.start = start
        self.stop = stop
        self._has_crc = has_crc
        self._head = bytearray(inner_start - start)
        self._tail = bytearray(stop - inner_stop)
        self._descriptor: int | None = None
        self._filled: FilledBlocks | None = None

    def write(self, offset: int, data: Any) -> None:
        """Write bytes, at an offset that counts from the beginning of the region; each of them once.

        Raises
        ------
        OSError
            If the file cannot be written.
        OutsideError
            If they do not lie within the region.
        """
        begin, end = self._write(offset, data)
        if begin < end:
            self._filled = self._filled or FilledBlocks(self._open(), self._has_crc)
            self._filled.add(begin, end)

    def _write(self, offset: int, data: Any) -> tuple[int, int]:
        """Write bytes, and return which bytes of the file they are, but for those at the ends of the
        region."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        end = offset + len(view)
        if end > self.stop - self.start:
            raise OutsideError(f"{end} bytes do not fit into a region of {self.stop - self.start}")
        inner_start, inner_stop = len(self._head), self.stop - self.start - len(self._tail)
        if offset < inner_start:
            self._head[offset : min(end, inner_start)] = view[: inner_start - offset]
        first, last = max(offset, inner_start), min(end, inner_stop)
        if first < last:
            write_all_at(self._open(), self.start + first, view[first - offset : last - offset])
        if end > inner_stop:
            begin = max(offset, inner_stop)
            self._tail[begin - inner_stop : end - inner_stop] = view[begin - offset :]
        return self.start + first, self.start + last

    def write_all(self, blocks: Iterable[NDArray[Any]]) -> WrittenRegion:
        """Write all of it, from its first byte to its last, and wait until it is on disk.

        Threads write and sum stretches of it side by side: the device may be waiting for the last one.

        Raises
        ------
        OSError
            If the file cannot be written.
        OutsideError
            If there are more bytes than the region has.
        ValueError
            If there are fewer.
        """
        if len(self._head) + len(self._tail) < self.stop - self.start:
            self._open()  # before threads would do so at once
        in_hand: deque[Future[_Sums]] = deque()
        digests: list[bytes] = []
        crc32 = num_bytes = 0

        def take_oldest() -> None:
            nonlocal crc32, num_bytes
            sums = in_hand.popleft().result()
            digests.extend(sums.blocks.digests())
            crc32 = joined_crc32(crc32, sums.crc32, sums.num_bytes) if self._has_crc else 0
            num_bytes += sums.num_bytes

        with ThreadPoolExecutor(STRETCH_THREADS, "checksum") as threads:
            for start, views in stretches(blocks, self.start):
                in_hand.append(threads.submit(self._write_stretch, start, views))
                if len(in_hand) > 2 * STRETCH_THREADS:
                    take_oldest()
            while in_hand:
                take_oldest()
        if num_bytes != self.stop - self.start:
            raise ValueError(f"{num_bytes} bytes were written to a region of {self.stop - self.start}")
        return self._written(digests, crc32)

    def _write_stretch(self, start: int, views: Sequence[memoryview]) -> _Sums:
        """Write what follows one another from an offset in the file, and return its checksums."""
        sums = _Sums(start, self._has_crc)
        for view in views:
            self._write(start + sums.num_bytes - self.start, view)
            sums.add(view)
        if self._descriptor is not None:  # there is more than the ends
            start_syncing(self._descriptor, start, sums.num_bytes)
        return sums

    def read_back(self) -> WrittenRegion:
        """Return the checksums of a region that was written in any order, and wait until it is on disk.

        Most of its blocks were summed when they were full.
        """
        known = self._filled.sums() if self._filled is not None else {}
        return self._written((), 0).summed(self.path, self._has_crc, known)

    def _written(self, digests: Sequence[bytes], crc32: int) -> WrittenRegion:
        if len(self._head) + len(self._tail) < self.stop - self.start:
            os.fsync(self._open())
        head, tail = bytes(self._head), bytes(self._tail)
        return WrittenRegion(self.start, self.stop, head, tail, tuple(digests), crc32)

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._descriptor

    def close(self) -> None:
        """Close the file."""
        if self._filled is not None:
            self._filled.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class FilledBlocks:
    """The sums of the blocks of a file whose bytes come in any order, each once: a thread reads a block as
    soon as it is full, when the file system still has it in memory.

    Parameters
    ----------
    descriptor
        The open file.
    has_crc
        Take the CRC-32, too.
    """

    def __init__(self, descriptor: int, has_crc: bool) -> None:
        self._descriptor = descriptor
        self._has_crc = has_crc
        self._num_bytes: dict[Block, int] = {}
        """How many came of each block."""
        self._sums: dict[Block, Future[BlockSum]] = {}
        self._thread = ThreadPoolExecutor(1, "checksum")

    def add(self, start: int, stop: int) -> None:
        """Bytes from start up to stop were written."""
        for begin, end in blocks_in(start, stop):
            block = first, last = block_of(begin)
            self._num_bytes[block] = self._num_bytes.get(block, 0) + end - begin
            if self._num_bytes[block] == last - first:
                self._sums[block] = self._thread.submit(self._sum, block)

    def _sum(self, block: Block) -> BlockSum:
        start_syncing(self._descriptor, block[0], block[1] - block[0])
        return sum_of(read_at(self._descriptor, *block), self._has_crc)

    def sums(self) -> dict[Block, BlockSum]:
        """Wait for the sums of all blocks that are full.

        Raises
        ------
        OSError
            If one cannot be read.
        """
        return {block: summed.result() for block, summed in self._sums.items()}

    def close(self) -> None:
        """End the thread; nobody wants further sums."""
        self._thread.shutdown(cancel_futures=True)


class _Sums:
    """Checksums of bytes that come one after another, from an offset in a file."""

    def __init__(self, start: int, has_crc: bool) -> None:
        self._has_crc = has_crc
        self.blocks = BlockSums(start)
        self.crc32 = 0
        self.num_bytes = 0

    def add(self, data: memoryview) -> None:
        self.num_bytes += len(data)
        self.blocks.add(data)
        if self._has_crc:
            self.crc32 = zlib.crc32(data, self.crc32)


def stretches(blocks: Iterable[NDArray[Any]], start: int) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut bytes that follow one another, from an offset in a file, at multiples of `STRETCH_BYTES`.

    Yields
    ------
    Offset of a stretch in the file, and its bytes in order. Nothing is copied.
    """
    first = position = start
    views: list[memoryview] = []
    for block in blocks:
        view = block.data.cast("B") if block.nbytes else memoryview(b"")
        while len(view):
            views.append(view[: STRETCH_BYTES - position % STRETCH_BYTES])
            view = view[len(views[-1]) :]
            position += len(views[-1])
            if position % STRETCH_BYTES == 0:
                yield first, views
                first, views = position, []
    if views:
        yield first, views


_POLYNOMIAL = 0xEDB88320


def joined_crc32(first: int, second: int, num_bytes: int) -> int:
    """Return the CRC-32 of two texts that follow one another, given the CRC-32 of each and the size of the
    second.

    Putting a zero bit behind a text multiplies its CRC by x, as a polynomial over GF(2) modulo that of
    CRC-32, in which the highest bit stands for x to the power of 0.
    """
    return _product(_shift(num_bytes), first) ^ second


@lru_cache(maxsize=64)
def _shift(num_bytes: int) -> int:
    """Return what zeros of so many bytes multiply by."""
    power, base = 1 << 31, 1 << 30
    num_bits = 8 * num_bytes
    while num_bits:
        if num_bits & 1:
            power = _product(base, power)
        base = _product(base, base)
        num_bits >>= 1
    return power


def _product(one: int, other: int) -> int:
    """Multiply two polynomials modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
