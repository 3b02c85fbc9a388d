"""Outputs in the making: a piece gathers its rows, and a few threads write pieces that are complete.

Writing, syncing and hashing run beside the collector and the device. No more pieces than there are writers are written at once, and only
small ones wait: when the disk is slower than the device, the collector waits here, its inbox fills, and the device is held up; memory
does not grow. What syncing costs does not depend on size, so small pieces are synced many at a time.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_esm.atomic import Staged, commit_together
from dist_esm.attempt import as_value
from dist_esm.config import Format, Include
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.formats.registry import write_output
from dist_esm.outputs.row_buffer import RowBuffer, torch_dtype
from dist_esm.outputs.shards import write_shard
from dist_esm.types import FastaFile, Row, Unit, WrittenFile

MIN_WRITERS, MAX_WRITERS = 3, 8
"""One writes and hashes about 0.5 GB/s; a rank gets one for every two of its cores, within these bounds."""
MAX_PENDING = 64
PENDING_BYTES = 64 << 20
"""Pieces that are written or wait for it, beyond one for each writer."""
MAX_TOGETHER = 16
TOGETHER_BYTES = 4 << 20
"""Pieces that are written before the first of them is synced."""


@dataclass(frozen=True)
class OutputSettings:
    """What to write, and where."""

    output_dir: Path
    format: Format
    include: Sequence[Include]
    main_layer: int
    """The last layer requested, whose mean is always written."""
    wanted: Sequence[tuple[Include, int]]
    """Kinds and layers to write."""
    width: int
    """D."""
    dtype: np.dtype[Any]
    """float32 or float16."""
    max_proteins_per_output: int
    """Records of one numbered part."""
    provenance: dict[str, Any]
    """Goes into every output."""
    scratch: Path
    """Folder of this rank alone, where buffers and files that are not committed wait."""
    num_writers: int = MIN_WRITERS

    @property
    def residue_bytes(self) -> int:
        """What the representations of one residue take."""
        return self.width * self.dtype.itemsize * sum(kind is Include.per_tok for kind, _ in self.wanted)


@dataclass
class OutputBuilder:
    """One output in the making."""

    number: int
    rows: list[Row] = field(default_factory=list)
    tsv_lines: list[str] = field(default_factory=list)
    buffers: dict[tuple[Include, int], RowBuffer] = field(default_factory=dict)
    num_residues: int = 0
    num_answered: int = 0
    is_closed: bool = False
    """No further record will come."""
    is_being_written: bool = False
    is_wanted: bool = True
    """Its unit has not failed."""

    @property
    def num_bytes(self) -> int:
        """Size of its numbers."""
        return sum(buffer.num_bytes for buffer in self.buffers.values())

    def close(self) -> None:
        """Give its rows up."""
        for buffer in self.buffers.values():
            buffer.close()


def write_built(settings: OutputSettings, file: FastaFile, unit: Unit, piece: OutputBuilder) -> Staged:
    """Write a piece: a whole output, a numbered part of one, or what `join` will make one of."""
    tensors: dict[Include, dict[int, Tensor]] = {kind: {} for kind in Include}
    for kind, layer in settings.wanted:
        buffer = piece.buffers.get((kind, layer))
        tensors[kind][layer] = (
            buffer.tensor() if buffer else torch.empty(0, settings.width, dtype=torch_dtype(settings.dtype))
        )
    embeddings = OutputTable(
        source=file.source,
        provenance=settings.provenance,
        include=[kind.name for kind in settings.include],
        main_layer=settings.main_layer,
        rows=piece.rows,
        mean=tensors[Include.mean],
        bos=tensors[Include.bos],
        per_tok={layer: ChunkedTensor([tensor]) for layer, tensor in tensors[Include.per_tok].items()},
        tsv_lines=piece.tsv_lines,
    )
    stem = settings.output_dir / file.output
    if unit.first_part is not None:
        return write_output(
            settings.format,
            embeddings,
            stem.with_name(f"{stem.name}.part{unit.first_part + piece.number + 1:05d}"),
            settings.scratch,
        )
    if unit.is_whole:
        return write_output(settings.format, embeddings, stem, settings.scratch)
    shards = settings.output_dir / ".dist_esm" / "shards"
    return write_shard(embeddings, shards / f"{file.output}.{unit.ordinal:06d}.pt", settings.scratch)


def is_disk_full(written: WrittenFile | Exception) -> bool:
    """Whether a piece could not be written for want of room."""
    return isinstance(written, OSError) and written.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Job:
    """A piece of a unit to write; `key` names the unit."""

    key: int
    piece: OutputBuilder
    write: Callable[[], Staged]
    is_second_try: bool = False


class Writers:
    """Threads that write pieces, small ones together.

    A piece for which the disk had no room is tried again when nothing else is being written: another may have taken it for a moment.

    Parameters
    ----------
    output_dir
        What paths are relative to.
    num_writers
        Threads.
    on_written
        Called in a writer's thread when `finished` has something new.
    """

    def __init__(self, output_dir: Path, num_writers: int, on_written: Callable[[], None]) -> None:
        self.output_dir = output_dir
        self.on_written = on_written
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Job, WrittenFile | Exception]] = SimpleQueue()
        self._put_off: deque[Job] = deque()
        self._num_pending = 0
        self._pending_bytes = 0
        self._threads = [Thread(target=self._work, name="writer", daemon=True) for _ in range(num_writers)]
        for thread in self._threads:
            thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether any piece is not yet taken from `finished`."""
        return self._num_pending > 0 or bool(self._put_off)

    @property
    def has_room(self) -> bool:
        """Whether another piece may be submitted."""
        return self._num_pending < len(self._threads) or (
            self._num_pending < MAX_PENDING and self._pending_bytes < PENDING_BYTES
        )

    def submit(self, job: Job) -> None:
        """Write a piece."""
        self._num_pending += 1
        self._pending_bytes += job.piece.num_bytes
        self._jobs.put(job)

    def finished(
        self, until: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, OutputBuilder, WrittenFile | Exception]]:
        """Pieces that are written, or the error in their place; waits for more until something holds or nothing is being written."""
        while True:
            if self._put_off and not self._num_pending:
                self.submit(self._put_off.popleft())
            must_wait = self._num_pending > 0 and not until()
            if self._done.empty() and not must_wait:
                return
            job, written = self._done.get()
            self._num_pending -= 1
            self._pending_bytes -= job.piece.num_bytes
            if is_disk_full(written) and job.piece.is_wanted and not job.is_second_try:
                self._put_off.append(replace(job, is_second_try=True))
            else:
                yield job.key, job.piece, written

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job, *self._more(job.piece.num_bytes)]
            staged = [as_value(job.write) for job in jobs]
            for done in zip(jobs, commit_together(staged, self.output_dir), strict=True):
                self._done.put(done)
            self.on_written()

    def _more(self, num_bytes: int) -> Iterator[Job]:
        """What waits and is small enough to be written together with what has so many bytes."""
        for _ in range(MAX_TOGETHER - 1):
            if num_bytes > TOGETHER_BYTES or self._jobs.empty():
                return
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is None:
                self._jobs.put(None)
                return
            num_bytes += job.piece.num_bytes
            yield job
