"""Outputs in the making: a piece gathers its rows, and a few threads write pieces that are complete.

Writing, syncing and hashing run beside the collector and the device. No more than `MAX_WRITING` pieces are written at once: when
the disk is slower than the device, the collector waits here, its inbox fills, and the device is held up; memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_esm.attempt import attempt
from dist_esm.config import Format, Include
from dist_esm.records import FastaFile, Row, Unit, WrittenFile
from dist_esm.spool import Embeddings, Spool, torch_dtype, write_piece, written_file
from dist_esm.writers import write_output

MAX_WRITING = 3


@dataclass(frozen=True)
class OutputSettings:
    """What to write, and where."""

    output_dir: Path
    format: Format
    include: Sequence[Include]
    layers: Sequence[int]
    width: int
    """D."""
    dtype: np.dtype[Any]
    """float32 or float16."""
    max_proteins_per_output: int
    """Records of one numbered part."""
    provenance: dict[str, Any]
    """Goes into every output."""

    @property
    def main_layer(self) -> int:
        """The last layer requested, whose mean is always written."""
        return self.layers[-1]

    @property
    def scratch(self) -> Path:
        """Where spools and pieces wait."""
        return self.output_dir / ".dist_esm"

    @cached_property
    def wanted(self) -> list[tuple[Include, int]]:
        """Kinds and layers to write: those included, and the mean of the main layer."""
        kinds = {(kind, layer): None for kind in self.include for layer in self.layers}
        return list({**kinds, (Include.mean, self.main_layer): None})


@dataclass
class Piece:
    """One output in the making."""

    number: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spools: dict[tuple[Include, int], Spool] = field(default_factory=dict)
    num_residues: int = 0
    num_answered: int = 0
    is_closed: bool = False
    """No further record will come."""
    is_being_written: bool = False
    is_second_try: bool = False

    def close(self) -> None:
        """Give its rows up."""
        for spool in self.spools.values():
            spool.close()


def write_piece_of(settings: OutputSettings, file: FastaFile, unit: Unit, piece: Piece) -> WrittenFile:
    """Write a piece: a whole output, a numbered part of one, or what `join` will make one of."""
    tensors: dict[Include, dict[int, Tensor]] = {kind: {} for kind in Include}
    for kind, layer in settings.wanted:
        spool = piece.spools.get((kind, layer))
        tensors[kind][layer] = spool.tensor() if spool else torch.empty(0, settings.width, dtype=torch_dtype(settings.dtype))
    embeddings = Embeddings(
        source=file.source,
        provenance=settings.provenance,
        include=[kind.name for kind in settings.include],
        main_layer=settings.main_layer,
        rows=piece.rows,
        mean=tensors[Include.mean],
        bos=tensors[Include.bos],
        per_tok=tensors[Include.per_tok],
        notes=piece.notes,
    )
    stem = settings.output_dir / file.output
    if unit.first_part is not None:
        path = write_output(settings.format, embeddings, stem.with_name(f"{stem.name}.part{unit.first_part + piece.number + 1:05d}"))
    elif unit.is_whole:
        path = write_output(settings.format, embeddings, stem)
    else:
        path = write_piece(embeddings, settings.scratch / "pieces" / f"{file.output}.{unit.ordinal:06d}.pt")
    return written_file(settings.output_dir, path)


class Writers:
    """Threads that write pieces."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_WRITING, "writer")
        self._pending: dict[Future[WrittenFile | Exception], tuple[int, Piece]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether any piece is not yet taken from `finished`."""
        return bool(self._pending)

    def submit(self, key: int, piece: Piece, work: Callable[[], WrittenFile]) -> None:
        """Write a piece of a unit, which `key` names."""
        self._pending[self._threads.submit(partial(attempt, work))] = (key, piece)

    def finished(self, until_room: bool = False, until_idle: bool = False) -> Iterator[tuple[int, Piece, WrittenFile | Exception]]:
        """Pieces that are written, or the error in their place; waits until there is room for another, or until all are."""
        while self._pending:
            must_wait = until_idle or (until_room and len(self._pending) >= MAX_WRITING)
            done, _ = wait(self._pending, timeout=None if must_wait else 0, return_when=FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                key, piece = self._pending.pop(future)
                yield key, piece, future.result()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
