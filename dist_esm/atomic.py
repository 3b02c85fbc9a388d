"""Files that appear under their names at once and complete.

A file is written under a temporary name, synced, then renamed: a file that is seen under its own name is
complete. Outputs are staged first and committed many at a time, because a sync costs about the same whether
it has one file to wait for or sixteen.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, Self, TextIO, TypeVar

from dist_esm.attempt import as_value
from dist_esm.checksum import BlockSums, checksum_of_blocks, checksum_of_files, read_back
from dist_esm.types import WrittenFile

SMALL_BYTES = 1 << 20
SUMMED_BESIDE_BYTES = 1 << 18
"""Bytes whose checksum is worth another thread while they are written."""
LARGE_BYTES = 1 << 23
"""Bytes of a file that is worth a thread for that: to start one takes longer than to sum less."""
FILE_THREADS, FEWEST_FILES = 4, 8
"""Files of a folder that are written at the same time, and how many are worth a thread."""
SYNC_FILE_RANGE_WRITE = 2
SYNC_THREADS = 8
"""Files of a folder that are synced at the same time; on ext4 fifteen times as fast as one after another."""
FILE_TURNS, SYNC_TURNS = BoundedSemaphore(FILE_THREADS), BoundedSemaphore(SYNC_THREADS)
"""No more than that of all folders together: each file wants Python's interpreter some twenty times, and so
does every launch of a kernel, which would wait for all of them."""
Item = TypeVar("Item")
Answer = TypeVar("Answer")
_numbers = count()
_BESIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")


@dataclass
class Staged:
    """An output that is written under temporary names and waits for `commit_together`."""

    path: Path
    """The output's final path, a file or a folder of files."""
    checksum: str | None
    """Taken while it was written; None: it must be read back."""
    files: list[tuple[Path, Path]]
    """(temporary path, final path) of all that belongs to it, in the order in which they take their names;
    the output is the last."""
    obsolete: list[Path] = field(default_factory=list)
    """Files that go when it is committed, as the records.tsv of an output that has none any more."""
    marks: tuple[str, ...] = ()
    """For a folder: the files that tell one of ours, which may be replaced, from anything else."""


class SummedFile(io.BufferedWriter):
    """New file that is written from its first byte to its last, its checksum taken on the way.

    Reading a file back takes longer than writing it.

    Parameters
    ----------
    path
        Of the file.
    is_alone
        Large blocks are summed in a thread beside writing; else other files are written meanwhile, and it
        needs none.
    """

    def __init__(self, path: Path, is_alone: bool = True) -> None:
        self._summing = _Summing(path, is_alone)
        super().__init__(self._summing, SMALL_BYTES if is_alone else SUMMED_BESIDE_BYTES)

    def checksum(self) -> str:
        """Return the checksum of the whole file, once it is closed."""
        assert self.closed
        return checksum_of_blocks(self._summing.sums.digests())

    def written(self, name: str) -> WrittenFile:
        """Return what was written, under a name, once it is closed."""
        return WrittenFile(name, self._summing.num_bytes, self.checksum())


class _Summing(io.FileIO):
    """The raw file of a `SummedFile`. Large blocks are written and summed side by side: each takes about as
    long as the other."""

    def __init__(self, path: Path, is_alone: bool) -> None:
        super().__init__(path, "wb")
        self.sums = BlockSums()
        self.num_bytes = 0
        self._syncing = 0
        """Bytes that are on their way to the disk."""
        self._is_alone = is_alone
        self._thread: ThreadPoolExecutor | None = None

    def write(self, data: Any) -> int:
        """Write all of the bytes, and add them to the checksum."""
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        if not self._is_alone or len(view) < SUMMED_BESIDE_BYTES or self.num_bytes < LARGE_BYTES:
            self.sums.add(view)
            return self._write_all(view)
        self._thread = self._thread or ThreadPoolExecutor(1, "checksum")
        summed = self._thread.submit(self.sums.add, view)
        try:
            return self._write_all(view)
        finally:
            summed.result()
            self._start_syncing()

    def _start_syncing(self) -> None:
        whole_pages = self.num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if whole_pages - self._syncing >= LARGE_BYTES:
            start_syncing(self.fileno(), self._syncing, whole_pages - self._syncing)
            self._syncing = whole_pages

    def _write_all(self, view: memoryview) -> int:
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        return written

    def close(self) -> None:
        """Close the file."""
        if self._thread is not None:
            self._thread.shutdown()
        super().close()

    def seekable(self) -> bool:
        """Return False: bytes that were summed cannot be taken back."""
        return False


class SummedFolder:
    """New folder of files that are written one after another, its checksum taken on the way.

    As a context manager it makes the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: list[WrittenFile] = []

    def __enter__(self) -> Self:
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: every file was closed by its own block."""

    @contextmanager
    def file(self, name: str) -> Iterator[SummedFile]:
        """Give a new file of this name, for as long as the block runs."""
        with SummedFile(self.path / name) as file:
            yield file
        self._written.append(file.written(name))

    def add_files(self, write: Callable[[int], WrittenFile], num_files: int) -> None:
        """Have many files written, some at a time, and count them in order.

        Parameters
        ----------
        write
            Writes the file of a number, from 0, and tells what was written; called in several threads.
        num_files
            How many there are.

        Raises
        ------
        Exception
            Whatever `write` raises.
        """
        self._written += in_shares(write, range(num_files), FILE_TURNS, FILE_THREADS, "file", FEWEST_FILES)

    @contextmanager
    def text(self, name: str) -> Iterator[TextIO]:
        """Give a new text file of this name, UTF-8 with line ends as they are written."""
        with self.file(name) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            yield text

    @property
    def written(self) -> list[WrittenFile]:
        """All files so far, with paths relative to the folder."""
        return list(self._written)

    def add(self, written: WrittenFile) -> None:
        """Count a file that was put there otherwise."""
        self._written.append(written)

    def checksum(self) -> str:
        """Return the checksum of the whole folder, as `read_back` takes it."""
        return checksum_of_files(self._written)


def write_at(path: Path, offset: int, data: Any) -> None:
    """Write bytes at an offset of a file that others may write to elsewhere; it is made if it is not there.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        write_all_at(descriptor, offset, data)
    finally:
        os.close(descriptor)


def write_all_at(descriptor: int, offset: int, data: Any) -> None:
    """Write all bytes at an offset of an open file."""
    view = memoryview(data).cast("B")
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], offset + written)


def start_syncing(descriptor: int, offset: int, num_bytes: int) -> None:
    """Let bytes of an open file be on their way to the disk, without waiting for them (Linux).

    The kernel may leave this to the sync, and the disk has nothing to do until then.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # the sync will say what is wrong
            whole = ctypes.c_int64(offset), ctypes.c_int64(num_bytes)
            ctypes.CDLL(None).sync_file_range(descriptor, *whole, SYNC_FILE_RANGE_WRITE)


def temporary_path(scratch: Path) -> Path:
    """Return a new path in a folder that only this process writes.

    The name is a number: a name made from the output's own could be too long for the file system.

    Raises
    ------
    FileNotFoundError
        If the folder is gone.
    """
    require_scratch(scratch)
    return scratch / str(next(_numbers))


def number_names_from(first: int) -> None:
    """Number temporary names of this process from here on: others may use the same folder."""
    global _numbers
    _numbers = count(first)


def discard_names(scratch: Path, numbers: range) -> None:
    """Remove what a process left under temporary names of these numbers when it was killed."""
    for path in scratch.iterdir():
        number = path.name.removesuffix(".old")
        if number.isdecimal() and int(number) in numbers:
            discard(path)


def require_scratch(scratch: Path) -> None:
    """Make sure that a folder of this process is still there, before anything is written elsewhere.

    Raises
    ------
    FileNotFoundError
        If it is gone.
    """
    if not scratch.is_dir():
        raise FileNotFoundError(f"{scratch} is gone: was output_dir removed while the run was under way?")


@contextmanager
def atomically(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give a temporary path for one small file; on success it takes its name, on failure it goes.

    Parameters
    ----------
    path
        The file's own path. Its folder is made if it is not there.
    scratch
        A folder of this process alone, on the same file system. Without one, the temporary file is beside
        `path`, under a name that `is_leftover` can tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(scratch) if scratch else path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        discard(temporary)


def is_leftover(path: Path, names: Sequence[str]) -> bool:
    """Return whether a path is the temporary file of an `atomically` without scratch, for a file of one of
    these names."""
    match = _BESIDE.fullmatch(path.name)
    return match is not None and match["name"] in names


def commit_together(staged: Sequence[Staged | Exception], output_dir: Path) -> list[WrittenFile | Exception]:
    """Put staged outputs in their places: sync all, rename all, then sync each folder once.

    Never raises: an output that cannot be committed is an exception in its place, and its temporary files are
    removed as far as they can be.

    Parameters
    ----------
    staged
        What was written, or the exception that stands in its place.
    output_dir
        What the paths of the results are relative to.

    Returns
    -------
    list
        In the order given: path, size and checksum of each output, or the exception that ended it.
    """
    errors: dict[int, Exception] = {}
    synced: dict[Path, Exception | None] = {}

    def each(step: Callable[[Staged], None]) -> None:
        for place, output in enumerate(staged):
            if isinstance(output, Staged) and place not in errors:
                error = as_value(step, output)
                if isinstance(error, Exception):
                    errors[place] = error

    def sync_folders(output: Staged) -> None:
        for _, path in output.files:
            if path.parent not in synced:
                synced[path.parent] = as_value(sync, path.parent)
            error = synced[path.parent]
            if error is not None:
                raise error

    each(_sync_files)
    each(_rename_files)
    each(sync_folders)
    results: list[WrittenFile | Exception] = []
    for place, output in enumerate(staged):
        if isinstance(output, Exception):
            results.append(output)
        elif place in errors:
            results.append(errors[place])
            discard_staged(output)
        else:
            results.append(as_value(_written_file, output_dir, output))
    return results


def _sync_files(output: Staged) -> None:
    for temporary, _ in output.files:
        if temporary.is_dir():
            sync_all(list(temporary.iterdir()))
        sync(temporary)


def _rename_files(output: Staged) -> None:
    for temporary, path in output.files:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():
            _rename_folder(temporary, path, output.marks)
        else:
            os.replace(temporary, path)
    for path in output.obsolete:
        path.unlink(missing_ok=True)


def _rename_folder(temporary: Path, path: Path, marks: Sequence[str]) -> None:
    """Replace a folder whole. A folder cannot be renamed over one that holds files, so the old one steps
    aside first."""
    refuse_to_replace(path, marks)
    if not path.exists():
        os.rename(temporary, path)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    discard(old)


def refuse_to_replace(path: Path, marks: Sequence[str]) -> None:
    """Make sure that a path is free, or a folder of ours: with the files in `marks`, without folders.

    Raises
    ------
    FileExistsError
        If it is anything else, so that nothing that is not ours is ever removed.
    """
    if not os.path.lexists(path):
        return
    is_folder: dict[str, bool] | None = None
    if path.is_dir() and not path.is_symlink():
        is_folder = {entry.name: entry.is_dir() for entry in os.scandir(path)}
    if is_folder is None or any(is_folder.values()) or (is_folder and not set(marks) <= set(is_folder)):
        raise FileExistsError(
            f"{path} is there already and is no folder of embeddings alone: "
            "move it away, or name another output_dir"
        )


def discard_staged(output: Staged) -> None:
    """Remove what is left of an output's temporary files."""
    for temporary, _ in output.files:
        discard(temporary)


def discard(temporary: Path) -> None:
    """Remove a temporary file or folder if it can be removed.

    Whoever calls this already has an error to report, or nothing that depends on it: a file that stays is
    removed by the next launch.
    """
    with suppress(OSError):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink()


def in_shares(
    work: Callable[[Item], Answer],
    items: Sequence[Item],
    turns: BoundedSemaphore,
    most_threads: int,
    name: str,
    fewest: int = 1,
) -> list[Answer]:
    """Return what `work` makes of each item, in order; each of some threads takes an equal share of them.

    To hand a share to a thread costs as much as to hand it one item, which for thousands of small files is
    more than the work itself.

    Parameters
    ----------
    work
        Called in several threads.
    items
        What to do.
    turns
        Taken for each item: it bounds how many are worked on by all callers together.
    most_threads
        How many threads there may be.
    name
        Of the threads.
    fewest
        Items that are worth a thread. If one would do, it is the caller's own.

    Raises
    ------
    Exception
        Whatever `work` raises, when all threads have ended.
    """
    num_threads = max(1, min(most_threads, len(items) // fewest))

    def do_share(first: int) -> list[Answer]:
        answers = []
        for item in items[first::num_threads]:
            with turns:
                answers.append(work(item))
        return answers

    if num_threads == 1:
        return do_share(0)

    with ThreadPoolExecutor(num_threads, name) as threads:
        shares = list(threads.map(do_share, range(num_threads)))
    return [shares[place % num_threads][place // num_threads] for place in range(len(items))]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Sequence[Path]) -> None:
    """Wait until many files are on disk, some at a time: the file system then writes them together."""
    in_shares(sync, paths, SYNC_TURNS, SYNC_THREADS, "sync")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _written_file(output_dir: Path, output: Staged) -> WrittenFile:
    """Return what became of an output that is in place.

    Raises
    ------
    FileNotFoundError
        If it is gone already.
    """
    path = output.path.relative_to(output_dir)
    if output.checksum is not None and output.path.exists():
        return WrittenFile(str(path), size_of(output.path), output.checksum)
    written = read_back(output_dir, path)
    if written is None:
        raise FileNotFoundError(f"{output.path} vanished as soon as it was written: was output_dir removed?")
    return written


def remove(path: Path) -> None:
    """Remove an output, a file or a folder of files; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
