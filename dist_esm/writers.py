"""A unit's embeddings to one file, atomically.

Rows arrive in any order and wait in a spool: in memory while they are few, in a nameless file in `output_dir` when they are many,
so memory does not grow with the output. A file appears under its name only when all of it is on disk: written beside, synced,
renamed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.config import Include

NOTE_COLUMNS = ("record", "id", "outcome", "residues", "embedded", "windows", "upper_cased", "stops_removed", "gaps_removed", "replaced", "note")
SPOOL_BYTES = 16 << 20
"""A spool of more than this goes to disk."""


@dataclass(frozen=True)
class Embeddings:
    """What one output holds: N proteins in file order."""

    ids: list[str]
    headers: list[str]
    lengths: list[int]
    """Residues that were embedded of each protein."""
    main_layer: int
    """The layer of `data`: the last one requested."""
    mean: dict[int, Tensor]
    """Layer to fp32 Tensor, shape (N, D)."""
    bos: dict[int, Tensor]
    """Layer to fp32 Tensor, shape (N, D)."""
    per_tok: dict[int, Tensor]
    """Layer to fp32 Tensor, shape (sum of lengths, D)."""
    notes: list[str]
    """A line of `NOTE_COLUMNS` for each record that was truncated, windowed, skipped, changed or given an id."""


class Spool:
    """fp32 rows of one width, written at any position, read back as one tensor."""

    def __init__(self, width: int, directory: Path) -> None:
        self.width = width
        self._file = tempfile.SpooledTemporaryFile(dir=str(directory))  # noqa: SIM115 - closed by close()
        self._on_disk = False
        self._num_bytes = 0

    def write(self, first_row: int, rows: NDArray[np.float32]) -> None:
        """Put rows, shape (n, width) or (width,), at a position."""
        start = first_row * self.width * 4
        self._num_bytes = max(self._num_bytes, start + rows.nbytes)
        if self._num_bytes > SPOOL_BYTES and not self._on_disk:
            self._file.rollover()
            self._on_disk = True
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(rows).data)

    def tensor(self) -> Tensor:
        """All rows, shape (n, width). Valid until `close`."""
        if not self._num_bytes:
            return torch.empty(0, self.width)
        self._file.flush()
        if self._on_disk:
            data: bytearray | mmap.mmap = mmap.mmap(self._file.fileno(), self._num_bytes, access=mmap.ACCESS_COPY)
        else:
            self._file.seek(0)
            data = bytearray(self._file.read())
        return torch.frombuffer(data, dtype=torch.float32).view(-1, self.width)

    def close(self) -> None:
        """Give the rows up."""
        self._file.close()


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; on success it is synced and takes the name, on failure it is removed."""
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


def write_pt(embeddings: Embeddings, include: Sequence[Include], path: Path) -> None:
    """Write VirNucPro's layout, with every representation beside it under fair-esm's names.

    ``proteins`` and ``data`` are lists in file order, ``data`` of the mean of the last requested layer, shape (D,); further
    ``headers``, ``lengths``, and as included ``mean_representations[layer]`` and ``bos_representations[layer]``, shape (N, D),
    and ``representations[layer]``, a list of tensors of shape (L, D). Tensors of a kind and layer are views of one storage.
    """
    content: dict[str, object] = {
        "proteins": embeddings.ids,
        "data": list(embeddings.mean[embeddings.main_layer].unbind(0)),
        "headers": embeddings.headers,
        "lengths": embeddings.lengths,
    }
    if Include.mean in include:
        content["mean_representations"] = embeddings.mean
    if Include.bos in include:
        content["bos_representations"] = embeddings.bos
    if Include.per_tok in include:
        content["representations"] = {layer: list(torch.split(rows, embeddings.lengths)) for layer, rows in embeddings.per_tok.items()}
    save(content, path)


def write_output(embeddings: Embeddings, include: Sequence[Include], stem: Path) -> Path:
    """Write one output and, if any of its records deserves a note, ``<stem>.records.tsv`` beside it.

    Returns
    -------
    the path of the output
    """
    notes = stem.with_name(stem.name + ".records.tsv")
    if embeddings.notes:
        with atomically(notes) as beside:
            beside.write_text("\n".join(["\t".join(NOTE_COLUMNS), *embeddings.notes, ""]), encoding="utf-8")
    else:
        notes.unlink(missing_ok=True)
    path = stem.with_name(stem.name + ".pt")
    write_pt(embeddings, include, path)
    return path


def write_piece(embeddings: Embeddings, path: Path) -> Path:
    """Write what one unit of a cut file contributes, for `join`."""
    save(asdict(embeddings), path)
    return path


def save(content: dict[str, object], path: Path) -> None:
    """`torch.save`, atomically. Through an open file, since the name of a path would become part of the archive's bytes."""
    with atomically(path) as beside, open(beside, "wb") as file:
        torch.save(content, file)


@contextmanager
def join(paths: Sequence[Path], directory: Path) -> Iterator[Embeddings]:
    """The pieces of a file as one, in the order given. Numbers are copied through spools, so memory does not grow with them."""
    whole: Embeddings | None = None
    spools: list[Spool] = []
    kinds = ("mean", "bos", "per_tok")
    rows: dict[tuple[str, int], tuple[Spool, int]] = {}
    try:
        for path in paths:
            piece = Embeddings(**torch.load(path, weights_only=True, mmap=True))
            whole = whole or replace(piece, ids=[], headers=[], lengths=[], notes=[])
            for name in ("ids", "headers", "lengths", "notes"):
                getattr(whole, name).extend(getattr(piece, name))
            for kind in kinds:
                for layer, tensor in getattr(piece, kind).items():
                    if (kind, layer) not in rows:
                        spools.append(Spool(tensor.shape[1], directory))
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
