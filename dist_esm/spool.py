"""Embeddings on their way to a file: rows that arrive in any order, pieces of a file that was cut, and names that appear at once.

Rows wait in a spool: in memory while there is some left, then in a nameless file in `output_dir`, so memory does not grow
with the output. A file appears under its name only when all of it is on disk: written beside, synced, renamed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.attempt import attempt
from dist_esm.pickling import torch_save
from dist_esm.records import Row, WrittenFile

SPOOL_BYTES = 3 << 29
"""Rows that are kept in memory, of all outputs in the making together; what is more waits on disk."""
SMALL_BYTES = 1 << 20
LARGE_ROWS = 1 << 17
"""Bytes of rows that are worth another thread."""

T = TypeVar("T")


@dataclass(frozen=True)
class Embeddings:
    """What one output holds: N proteins in file order, in fp32 or fp16."""

    source: str
    """The input file, relative to the common root of the inputs."""
    provenance: dict[str, Any]
    """Model, weights and settings that the numbers depend on."""
    include: list[str]
    """Kinds that were asked for: mean, bos, per_tok."""
    main_layer: int
    """The layer of `data`: the last one requested."""
    rows: list[Row]
    mean: dict[int, Tensor]
    """Layer to Tensor, shape (N, D); the main layer is always there."""
    bos: dict[int, Tensor]
    """Layer to Tensor, shape (N, D)."""
    per_tok: dict[int, Tensor]
    """Layer to Tensor, shape (sum of embedded residues, D)."""
    notes: list[str]
    """A line of `NOTE_COLUMNS` for each record that was truncated, windowed, skipped, changed or given an id."""

    @property
    def ids(self) -> list[str]:
        """Ids in file order, duplicates included."""
        return [row.id for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Embedded residues of each protein."""
        return [row.embedded for row in self.rows]


@dataclass
class Memory:
    """What the spools that share it may keep in memory, in bytes, and threads that copy what is large, if there are any."""

    left: int = SPOOL_BYTES
    copiers: Executor | None = None


class Spool:
    """Rows of one width and dtype, written at any position, read back as one tensor.

    They are kept where the tensor is made of them without another copy, as long as there is memory; then they go to a nameless file.
    Rows that are given to `write` must stay as they are until `tensor`.
    `expected` is how many there may be: room for them is reserved at once, which takes no memory before they are written.
    """

    def __init__(self, width: int, dtype: np.dtype[Any], directory: Path, memory: Memory, expected: int = 0) -> None:
        self.num_rows = 0
        self._expected = expected
        self._directory = directory
        self._memory = memory
        self._taken = 0
        self._rows: NDArray[Any] = np.empty((0, width), dtype)
        self._file: IO[bytes] | None = None
        self._copies: list[Future[None]] = []

    @property
    def _row_bytes(self) -> int:
        return int(self._rows.itemsize * self._rows.shape[1])

    @property
    def num_bytes(self) -> int:
        """Size of all rows."""
        return self.num_rows * self._row_bytes

    def write(self, first_row: int, rows: NDArray[Any]) -> None:
        """Put rows, shape (n, width) or (width,), at a position."""
        rows = rows.reshape(-1, self._rows.shape[1])
        self.num_rows = max(self.num_rows, first_row + len(rows))
        if self._file is None and self.num_bytes > self._taken:
            self._take()
        if self._file is None:
            place = self._rows[first_row : first_row + len(rows)]
            if self._memory.copiers is not None and place.nbytes >= LARGE_ROWS:
                self._copies.append(self._memory.copiers.submit(np.copyto, place, rows))
            else:
                place[:] = rows
        else:
            self._file.seek(first_row * self._row_bytes)
            self._file.write(np.ascontiguousarray(rows, dtype=self._rows.dtype).data)

    def _take(self) -> None:
        """Take memory for `num_rows`, or move to a file if there is not enough of it."""
        more = self.num_bytes - self._taken
        if more > self._memory.left:
            self._finish_copies()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=str(self._directory))  # noqa: SIM115 - closed by close()
            self._file.write(self._rows[: self._taken // self._row_bytes].data)
            self._give_back()
            return
        self._memory.left -= more
        self._taken += more
        if self.num_rows > len(self._rows):
            most = (self._taken + self._memory.left) // self._row_bytes
            rows = np.empty((max(min(self._expected, most), self.num_rows, len(self._rows) * 5 // 4), self._rows.shape[1]), self._rows.dtype)
            self._finish_copies()
            rows[: len(self._rows)] = self._rows
            self._rows = rows

    def _finish_copies(self) -> None:
        for copy in self._copies:
            copy.result()
        self._copies.clear()

    def _give_back(self) -> None:
        self._memory.left += self._taken
        self._taken = 0
        self._rows = self._rows[:0].copy()

    def tensor(self) -> Tensor:
        """All rows, shape (n, width). Valid until `close`."""
        self._finish_copies()
        if self._file is None or not self.num_rows:
            return torch.from_numpy(self._rows[: self.num_rows])
        self._file.flush()
        data = mmap.mmap(self._file.fileno(), self.num_bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(data, dtype=torch_dtype(self._rows.dtype)).view(-1, self._rows.shape[1])

    def close(self) -> None:
        """Give the rows up."""
        self._give_back()
        if self._file is not None:
            self._file.close()


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """float32 or float16 as torch has it."""
    return {"float32": torch.float32, "float16": torch.float16}[dtype.name]


def are_finite(rows: NDArray[Any]) -> bool:
    """Whether all are finite numbers, fp32 or fp16. A sum of fp32 is seldom finite otherwise, and costs a small part of looking at each."""
    if rows.dtype == np.float16:  # numpy adds these one by one; without their signs, the bits of finite ones are less than those of infinity
        return not rows.size or bool((np.ascontiguousarray(rows).view(np.uint16) & 0x7FFF).max() < 0x7C00)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(rows.sum(dtype=np.float32)) or np.isfinite(rows).all())


class _Held(threading.local):
    """Files of this thread that are written beside their names and wait for others: (beside, path)."""

    files: list[tuple[Path, Path]] | None = None


_held = _Held()


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
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
        values.append(attempt(work))
        files.append(_held.files)
    _held.files = None
    synced: dict[Path, Exception | None] = {}

    def settle(step: Callable[[Path, Path], object]) -> None:
        for number, pairs in enumerate(files):
            for beside, path in pairs:
                error = attempt(partial(step, beside, path)) if not isinstance(values[number], Exception) else None
                if isinstance(error, Exception):
                    values[number] = error

    def sync_folder(_: Path, path: Path) -> None:
        if path.parent not in synced:
            synced[path.parent] = attempt(partial(sync, path.parent))
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


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, atomically. Through an open file, since the name of a path would become part of the archive's bytes."""
    with atomically(path) as beside, open(beside, "wb", buffering=SMALL_BYTES) as file:
        torch_save(content, file)


def write_piece(embeddings: Embeddings, path: Path) -> Path:
    """Write what one unit of a cut file contributes, for `join`. Its rows are one text: torch's unpickler takes microseconds for each string."""
    save({**vars(embeddings), "rows": json.dumps(embeddings.rows)}, path)
    return path


def read_piece(path: Path) -> Embeddings:
    """What `write_piece` wrote; numbers are mapped."""
    content = torch.load(path, weights_only=True, mmap=True)
    return Embeddings(**{**content, "rows": list(map(Row._make, json.loads(content["rows"])))})


@contextmanager
def join(paths: Sequence[Path], directory: Path) -> Iterator[Embeddings]:
    """The pieces of a file as one, in the order given. Numbers are copied through spools, so memory does not grow with them."""
    pieces = [read_piece(path) for path in paths]
    spools: list[Spool] = []
    memory = Memory()

    def joined(parts: list[Tensor]) -> Tensor:
        spools.append(Spool(parts[0].shape[1], parts[0][:0].numpy().dtype, directory, memory, expected=sum(map(len, parts))))
        first = 0
        for chunk in (chunk for part in parts for chunk in torch.split(part, 1 << 12)):
            spools[-1].write(first, chunk.numpy())
            first += len(chunk)
        return spools[-1].tensor()

    try:
        whole: dict[str, Any] = {"rows": [row for piece in pieces for row in piece.rows], "notes": [line for piece in pieces for line in piece.notes]}
        for kind in ("mean", "bos", "per_tok"):
            whole[kind] = {layer: joined([getattr(piece, kind)[layer] for piece in pieces]) for layer in getattr(pieces[0], kind)}
        yield replace(pieces[0], **whole)
    finally:
        for spool in spools:
            spool.close()


def fingerprint(output_dir: Path, path: Path) -> WrittenFile | None:
    """Size and sha256 of an output, a file or a folder of files, given relative to `output_dir`; None if it is not there."""
    full = output_dir / path
    if full.is_dir():
        parts = [fingerprint(full, one.relative_to(full)) for one in sorted(full.rglob("*")) if one.is_file()]
        text = json.dumps([asdict(one) for one in parts if one is not None])
        return WrittenFile(str(path), sum(one.num_bytes for one in parts if one is not None), hashlib.sha256(text.encode()).hexdigest())
    try:
        with open(full, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.sha256(file.read(size)) if size <= SMALL_BYTES else hashlib.file_digest(file, "sha256")
            return WrittenFile(str(path), size, found.hexdigest())
    except FileNotFoundError:
        return None


def written_file(output_dir: Path, path: Path) -> WrittenFile:
    """An output that was just written."""
    found = fingerprint(output_dir, path.relative_to(output_dir))
    if found is None:
        raise FileNotFoundError(f"{path} vanished as soon as it was written: was output_dir removed?")
    return found


def remove(path: Path) -> None:
    """Remove an output, a file or a folder of files."""
    if path.is_dir():
        for one in sorted(path.rglob("*"), reverse=True):
            one.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
