"""What the kernel still has to write of a file."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest

SYS_CACHESTAT = 451
"""Linux 6.5 and later; the same number on every architecture (include/uapi/asm-generic/unistd.h)."""


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Stat(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    ]


def waiting_pages(path: Path) -> int:
    """Return how many pages of a file nobody has begun to write to disk. Skips where the kernel does not
    say."""
    if sys.platform != "linux":
        pytest.skip("cachestat is a system call of Linux")
    stat = _Stat()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        whole = _Range(0, 0)
        failed = ctypes.CDLL(None).syscall(
            SYS_CACHESTAT, descriptor, ctypes.byref(whole), ctypes.byref(stat), 0
        )
    finally:
        os.close(descriptor)
    if failed:
        pytest.skip("the kernel has no cachestat")
    return int(stat.dirty)


def skip_unless_pages_wait(folder: Path) -> None:
    """Skip where pages do not wait for a sync at all: in memory, or on a disk without a cache."""
    path = folder / "probe"
    path.write_bytes(bytes(1 << 20))
    if not waiting_pages(path):
        pytest.skip("this file system does not keep what is to be written")


def wait_until_few_wait(path: Path, num_pages: int, seconds: float = 20.0) -> int:
    """Wait until no more pages of a file wait than that, and return how many do."""
    until = time.monotonic() + seconds
    while waiting_pages(path) > num_pages and time.monotonic() < until:
        time.sleep(0.02)
    return waiting_pages(path)
