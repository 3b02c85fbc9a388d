"""Files that appear under their names at once and whole: written beside, synced, renamed; what they hold, told by size and checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dist_esm.attempt import as_value
from dist_esm.types import WrittenFile

SMALL_BYTES = 1 << 20

T = TypeVar("T")


class Output(NamedTuple):
    """An output as its writer leaves it."""

    path: Path
    sha256: str | None = None
    """None if it was not written from its first byte to its last, or is a folder: then it has to be read back."""


class SummedFile(io.BufferedWriter):
    """A new file that is written from its first byte to its last, and its checksum taken on the way: reading it back takes longer than writing it."""

    def __init__(self, path: Path) -> None:
        self._summing = _Summing(path, "wb")
        super().__init__(self._summing, SMALL_BYTES)

    def sha256(self) -> str:
        """Of everything in it; to be asked when it is closed."""
        assert self.closed
        return self._summing.found.hexdigest()


class _Summing(io.FileIO):
    """What `SummedFile` writes through. What is large is written and looked at side by side: each takes about as long as the other."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.found = hashlib.sha256()
        self._beside: ThreadPoolExecutor | None = None

    def write(self, data: Any) -> int:
        """Write all of the bytes, and look at them."""
        view = memoryview(data).cast("B")
        if len(view) <= SMALL_BYTES:
            self.found.update(view)
            return self._write_all(view)
        self._beside = self._beside or ThreadPoolExecutor(1, "checksum")
        looked_at = self._beside.submit(self.found.update, view)
        try:
            return self._write_all(view)
        finally:
            looked_at.result()

    def _write_all(self, view: memoryview) -> int:
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        return written

    def close(self) -> None:
        """Close the file."""
        if self._beside is not None:
            self._beside.shutdown()
        super().close()

    def seekable(self) -> bool:
        """It is not: what was summed cannot be taken back."""
        return False


class _Held(threading.local):
    """Files of this thread that are written beside their names and wait for others: (beside, path)."""

    files: list[tuple[Path, Path]] | None = None


_held = _Held()


@contextmanager
def atomically(path: Path, scratch=None) -> Iterator[Path]:
    """A path beside `path` to write a file to; on success it is synced and takes the name, on failure it is removed.

    Within `together` that comes when all are written.
    """
    if not os.path.isdir(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    is_held = False
    try:
        yield beside
        if _held.files is not None:
            _held.files.append((beside, path))
            is_held = True
            return
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        if not is_held:
            beside.unlink(missing_ok=True)


def together(works: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Do pieces of work that write files `atomically`. All are written before the first is synced, and a folder is synced once.

    Returns
    -------
    list
        What each came to, or the exception that ended it, which took its files along.
    """
    values: list[T | Exception] = []
    files: list[list[tuple[Path, Path]]] = []
    for work in works:
        _held.files = []
        values.append(as_value(work))
        files.append(_held.files)
    _held.files = None
    synced: dict[Path, Exception | None] = {}

    def settle(step: Callable[[Path, Path], object]) -> None:
        for number, pairs in enumerate(files):
            for beside, path in pairs:
                error = as_value(step, beside, path) if not isinstance(values[number], Exception) else None
                if isinstance(error, Exception):
                    values[number] = error

    def sync_folder(_: Path, path: Path) -> None:
        if path.parent not in synced:
            synced[path.parent] = as_value(sync, path.parent)
        error = synced[path.parent]
        if error is not None:
            raise error

    settle(lambda beside, _: sync(beside))
    settle(os.replace)
    settle(sync_folder)
    for value, pairs in zip(values, files, strict=True):
        if isinstance(value, Exception):
            for beside, _ in pairs:
                beside.unlink(missing_ok=True)
    return values


@dataclass
class Staged:
    path: Path
    sha256: str | None = None
    files: list = field(default_factory=list)
    obsolete: list = field(default_factory=list)


def commit_together(staged, output_dir):
    return [one if isinstance(one, Exception) else as_value(written_file, output_dir, Output(one.path, one.sha256)) for one in staged]


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(output_dir: Path, path: Path) -> WrittenFile | None:
    """Size and sha256 of an output, a file or a folder of files, given relative to `output_dir`; None if it is not there."""
    full = output_dir / path
    if full.is_dir():
        parts = [fingerprint(full, one.relative_to(full)) for one in sorted(full.rglob("*")) if one.is_file()]
        text = json.dumps([asdict(one) for one in parts if one is not None])
        return WrittenFile(
            str(path),
            sum(one.num_bytes for one in parts if one is not None),
            hashlib.sha256(text.encode()).hexdigest(),
        )
    try:
        with open(full, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = (
                hashlib.sha256(file.read(size))
                if size <= SMALL_BYTES
                else hashlib.file_digest(file, "sha256")
            )
            return WrittenFile(str(path), size, found.hexdigest())
    except FileNotFoundError:
        return None


def written_file(output_dir: Path, output: Output) -> WrittenFile:
    """An output that is in place.

    Raises
    ------
    FileNotFoundError
        If it is gone already.
    """
    path = output.path.relative_to(output_dir)
    if output.sha256 is not None and output.path.exists():
        return WrittenFile(str(path), output.path.stat().st_size, output.sha256)
    found = fingerprint(output_dir, path)
    if found is None:
        raise FileNotFoundError(f"{output.path} vanished as soon as it was written: was output_dir removed?")
    return found


def remove(path: Path) -> None:
    """Remove an output, a file or a folder of files."""
    if path.is_dir():
        for one in sorted(path.rglob("*"), reverse=True):
            one.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
