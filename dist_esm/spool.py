"""Embeddings on their way to a file: rows that arrive in any order, pieces of a file that was cut, and names that appear at once.

Rows wait in a spool: in memory while they are few, in a nameless file in `output_dir` when they are many, so memory does not grow
with the output. A file appears under its name only when all of it is on disk: written beside, synced, renamed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.records import Row, WrittenFile

SPOOL_BYTES = 16 << 20
"""A spool of more than this goes to disk."""


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


class Spool:
    """Rows of one width and dtype, written at any position, read back as one tensor."""

    def __init__(self, width: int, dtype: np.dtype[Any], directory: Path) -> None:
        self.width = width
        self.dtype = dtype
        self._file = tempfile.SpooledTemporaryFile(dir=str(directory))  # noqa: SIM115 - closed by close()
        self._on_disk = False
        self._num_bytes = 0

    def write(self, first_row: int, rows: NDArray[Any]) -> None:
        """Put rows, shape (n, width) or (width,), at a position."""
        start = first_row * self.width * self.dtype.itemsize
        self._num_bytes = max(self._num_bytes, start + rows.size * self.dtype.itemsize)
        if self._num_bytes > SPOOL_BYTES and not self._on_disk:
            self._file.rollover()
            self._on_disk = True
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)

    def tensor(self) -> Tensor:
        """All rows, shape (n, width). Valid until `close`."""
        kind = torch_dtype(self.dtype)
        if not self._num_bytes:
            return torch.empty(0, self.width, dtype=kind)
        self._file.flush()
        if self._on_disk:
            data: bytearray | mmap.mmap = mmap.mmap(self._file.fileno(), self._num_bytes, access=mmap.ACCESS_COPY)
        else:
            self._file.seek(0)
            data = bytearray(self._file.read())
        return torch.frombuffer(data, dtype=kind).view(-1, self.width)

    def close(self) -> None:
        """Give the rows up."""
        self._file.close()


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """float32 or float16 as torch has it."""
    return {"float32": torch.float32, "float16": torch.float16}[dtype.name]


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; on success it is synced and takes the name, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        beside.unlink(missing_ok=True)


def save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, atomically. Through an open file, since the name of a path would become part of the archive's bytes."""
    with atomically(path) as beside, open(beside, "wb") as file:
        torch_save(content, file)


def torch_save(content: dict[str, Any], file: IO[bytes]) -> None:
    """`torch.save`, whose archive writer covers the cause of a failed write with a complaint about its own state.

    Raises
    ------
    OSError
        If the file cannot be written to.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_piece(embeddings: Embeddings, path: Path) -> Path:
    """Write what one unit of a cut file contributes, for `join`."""
    save({**vars(embeddings), "rows": [tuple(row) for row in embeddings.rows]}, path)
    return path


@contextmanager
def join(paths: Sequence[Path], directory: Path) -> Iterator[Embeddings]:
    """The pieces of a file as one, in the order given. Numbers are copied through spools, so memory does not grow with them."""
    whole: Embeddings | None = None
    spools: list[Spool] = []
    kinds = ("mean", "bos", "per_tok")
    rows: dict[tuple[str, int], tuple[Spool, int]] = {}
    try:
        for path in paths:
            content = torch.load(path, weights_only=True, mmap=True)
            piece = Embeddings(**{**content, "rows": [Row(*row) for row in content["rows"]]})
            whole = whole or replace(piece, rows=[], notes=[])
            whole.rows.extend(piece.rows)
            whole.notes.extend(piece.notes)
            for kind in kinds:
                for layer, tensor in getattr(piece, kind).items():
                    if (kind, layer) not in rows:
                        spools.append(Spool(tensor.shape[1], tensor[:0].numpy().dtype, directory))
                        rows[kind, layer] = (spools[-1], 0)
                    spool, first = rows[kind, layer]
                    for chunk in torch.split(tensor, 1 << 12):
                        spool.write(first, chunk.numpy())
                        first += len(chunk)
                    rows[kind, layer] = (spool, first)
        assert whole is not None
        joined: dict[str, Any] = {kind: {layer: spool.tensor() for (k, layer), (spool, _) in rows.items() if k == kind} for kind in kinds}
        yield replace(whole, **joined)
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
        with open(full, "rb") as file:
            return WrittenFile(str(path), os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
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
