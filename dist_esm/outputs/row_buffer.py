"""Embeddings on their way to a file: rows that arrive in any order, and pieces of a file that was cut.

Rows wait in a spool: in memory while there is some left, then in a nameless file in `output_dir`, so memory does not grow
with the output.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import Output, SummedFile, atomically
from dist_esm.outputs.pickling import torch_save
from dist_esm.types import Row

SPOOL_BYTES = 3 << 29
"""Rows that are kept in memory, of all outputs in the making together; what is more waits on disk."""
LARGE_ROWS = 1 << 17
"""Bytes of rows that are worth another thread."""


class ChunkedTensor:
    """Tensors of one width and dtype that follow one another, as if they were one, without a copy of what may be larger than memory.

    Parameters
    ----------
    chunks
        One at least, each of shape (rows, width).
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = list(chunks)
        self._ends = list(accumulate(map(len, self.chunks)))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole."""
        return self._ends[-1], self.chunks[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of all chunks."""
        return self.chunks[0].dtype

    def __getitem__(self, span: slice) -> Tensor:
        """Rows from start up to stop: a view if one chunk has them all, as it has all of a protein's."""
        first = min(bisect_right(self._ends, span.start), len(self.chunks) - 1)
        found = []
        for chunk, end in zip(self.chunks[first:], self._ends[first:], strict=True):
            before = end - len(chunk)
            found.append(chunk[max(0, span.start - before) : span.stop - before])
            if span.stop <= end:
                break
        return found[0] if len(found) == 1 else torch.cat(found)


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
    per_tok: dict[int, ChunkedTensor]
    """Layer to `ChunkedTensor`, shape (sum of embedded residues, D)."""
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


def save(content: dict[str, Any], path: Path) -> str:
    """`torch.save`, atomically; returns the sha256. Through an open file, since the name of a path would become part of the archive's bytes."""
    with atomically(path) as beside, SummedFile(beside) as file:
        torch_save(content, file)
    return file.sha256()


def write_piece(embeddings: Embeddings, path: Path) -> Output:
    """Write what one unit of a cut file contributes, for `join`. Its rows are one text: torch's unpickler takes microseconds for each string."""
    per_tok = {layer: rows[0 : rows.shape[0]] for layer, rows in embeddings.per_tok.items()}
    return Output(path, save({**vars(embeddings), "rows": json.dumps(embeddings.rows), "per_tok": per_tok}, path))


def read_piece(path: Path) -> Embeddings:
    """What `write_piece` wrote; numbers are mapped."""
    content = torch.load(path, weights_only=True, mmap=True)
    per_tok = {layer: ChunkedTensor([tensor]) for layer, tensor in content["per_tok"].items()}
    return Embeddings(**{**content, "rows": list(map(Row._make, json.loads(content["rows"]))), "per_tok": per_tok})


@contextmanager
def join(paths: Sequence[Path], directory: Path) -> Iterator[Embeddings]:
    """The pieces of a file as one, in the order given. Residues stay where they are, vectors are copied through spools: memory grows with neither."""
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
        for kind in ("mean", "bos"):
            whole[kind] = {layer: joined([getattr(piece, kind)[layer] for piece in pieces]) for layer in getattr(pieces[0], kind)}
        whole["per_tok"] = {layer: ChunkedTensor([chunk for piece in pieces for chunk in piece.per_tok[layer].chunks]) for layer in pieces[0].per_tok}
        yield replace(pieces[0], **whole)
    finally:
        for spool in spools:
            spool.close()
