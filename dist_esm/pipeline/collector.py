"""Answers to outputs: one thread that owns the state of every unit in flight.

The reader announces proteins, the device answers segments, in whatever order suits them; here both meet, each vector finds its
protein's place in file order, and what is complete is written. Everything arrives as a message through one bounded queue and is
handled by one thread, so there is nothing to lock; `outputs` writes what is complete beside it, and a slow disk, in the end, fills
the queue and slows the others down.

Memory is the announced proteins that are not answered yet, the answers kept for identical sequences (`DEDUPE_BYTES`), and the
in-memory part of the buffers of the units in flight.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dist_esm.atomic import remove
from dist_esm.attempt import as_value
from dist_esm.config import Include
from dist_esm.model.pool import ProteinEmbedding, combine
from dist_esm.outputs.records_tsv import note
from dist_esm.outputs.row_buffer import Memory, RowBuffer, are_finite
from dist_esm.pipeline.writer_pool import Job, OutputBuilder, OutputSettings, Writers, write_built
from dist_esm.types import (
    Failure,
    FastaFile,
    RecordOutcome,
    RecordRead,
    Row,
    Segment,
    SegmentEmbedding,
    Tally,
    Unit,
    UnitFailure,
    UnitResult,
    WrittenFile,
)

Message = tuple[Callable[..., None], tuple[Any, ...]]
MAX_ANSWERED = 3
"""Packs whose answers wait here; with per-residue output each may be hundreds of megabytes."""


@dataclass
class UnitState:
    """One unit in flight."""

    unit: Unit
    started: float
    pieces: list[OutputBuilder] = field(default_factory=list)
    written: dict[int, WrittenFile] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    num_records: int = 0
    digest: str = ""
    is_closed: bool = False


@dataclass
class Waiting:
    """A protein that has a place and no answer yet."""

    unit: int
    piece: OutputBuilder
    index: int
    row: int
    num_embedded: int
    answers: list[SegmentEmbedding | None]

    @property
    def name(self) -> str | None:
        """The protein's id; None if its unit has failed and it is asked only for others."""
        return self.piece.rows[self.index].id if self.index < len(self.piece.rows) else None


class Collector:
    """Takes announcements and answers, writes outputs, and says what became of each unit.

    Parameters
    ----------
    files
        The plan's files.
    settings
        What to write, and where.
    rank
        For results and failures.
    on_results, on_failure
        Called in the collector's thread with what became of units.
    """

    def __init__(
        self,
        files: Sequence[FastaFile],
        settings: OutputSettings,
        rank: int,
        on_results: Callable[[Sequence[UnitResult]], None],
        on_failure: Callable[[UnitFailure], None],
    ) -> None:
        self.files = files
        self.settings = settings
        self.rank = rank
        self.on_results = on_results
        self.on_failure = on_failure
        self.crash: Exception | None = None
        self._units: dict[int, UnitState] = {}
        self._waiting: dict[int, Waiting] = {}
        self._followers: dict[int, list[int]] = {}
        self._kept: dict[int, ProteinEmbedding | Exception | None] = {}
        self._copiers = ThreadPoolExecutor(max(1, settings.num_writers // 2), "copier")
        self._memory = Memory(copiers=self._copiers)
        self._writers = Writers(settings.output_dir, settings.num_writers, self._on_written)
        self._room = threading.Semaphore(MAX_ANSWERED)
        self._inbox: queue.Queue[Message | None] = queue.Queue(maxsize=16)
        self._thread = threading.Thread(target=self._work, name="collector", daemon=True)
        self._thread.start()

    # What the other threads call.

    def begin(self, key: int, unit: Unit) -> None:
        """A unit is being read."""
        self._post(self._on_begin, key, unit, time.monotonic())

    def announce(self, batch: list[RecordRead]) -> None:
        """Records were read."""
        self._post(self._on_announce, batch)

    def end(self, key: int, digest: str) -> None:
        """All records of a unit were announced; `digest` is that of its text."""
        self._post(self._on_end, key, digest)

    def fail(self, key: int, error: Exception) -> None:
        """A unit cannot be read."""
        self._post(self._on_fail, key, error)

    def abandon(self, key: int) -> None:
        """A unit was not read to its end; it gets no outcome."""
        self._post(self._on_abandon, key)

    def answer(self, segments: Sequence[Segment], answers: Sequence[SegmentEmbedding | Exception]) -> None:
        """A pack was computed; an exception in an answer's place fails its protein's unit."""
        self._room.acquire()
        self._post(self._on_answers, segments, answers)

    def close(self) -> None:
        """Wait until every message is handled; units that are not complete by then have no outcome.

        Raises
        ------
        Exception
            What stopped the collector, if it is broken.
        """
        self._inbox.put(None)
        self._thread.join()
        for key in list(self._units):
            self._discard(key)
        if self.crash is not None:
            raise self.crash

    # What the collector's own thread does.

    def _post(self, handle: Callable[..., None], *args: Any) -> None:
        self._inbox.put((handle, args))

    def _work(self) -> None:
        while (message := self._inbox.get()) is not None:
            handle, args = message
            if handle == self._on_answers:
                self._room.release()
            if self.crash is None:
                crash = as_value(self._handle, handle, args)
                self.crash = crash if isinstance(crash, Exception) else None
        while self.crash is None and self._writers.is_busy:
            crash = as_value(lambda: self._take(self._writers.finished(lambda: False)))
            self.crash = crash if isinstance(crash, Exception) else None
        self._writers.close()
        self._copiers.shutdown()

    def _on_written(self) -> None:
        """Called by a writer. A full inbox needs no message: pieces that are written are taken before every one."""
        with suppress(queue.Full):
            self._inbox.put_nowait((lambda: None, ()))

    def _handle(self, handle: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._take(self._writers.finished())
        handle(*args)

    def _on_begin(self, key: int, unit: Unit, started: float) -> None:
        self._units[key] = UnitState(unit, started)

    def _on_announce(self, batch: list[RecordRead]) -> None:
        for record in batch:
            if record.duplicate_of == record.protein_index:
                self._kept[record.protein_index] = None
            state = self._units.get(record.unit)
            if state is not None:
                self._place(state, record)
            elif (
                record.duplicate_of == record.protein_index
            ):  # its unit has failed, yet records of others may wait for its answer
                self._waiting[record.protein_index] = Waiting(
                    record.unit, OutputBuilder(0), 0, 0, record.num_embedded, [None] * record.num_segments
                )
            for protein_index in record.evicted:
                self._kept.pop(protein_index, None)

    def _place(self, state: UnitState, record: RecordRead) -> None:
        """Give a record its place in its unit's output, and its answer if an identical sequence has one already."""
        piece = self._piece_for(state, record)
        note(record, state.unit.before.sequences + state.num_records, state.tally, piece.notes)
        if record.outcome is RecordOutcome.skipped:
            return
        self._waiting[record.protein_index] = Waiting(
            record.unit,
            piece,
            len(piece.rows),
            piece.num_residues,
            record.num_embedded,
            [None] * record.num_segments,
        )
        protein, number = record.protein, state.unit.before.sequences + state.num_records - 1
        row = Row(
            protein.id,
            protein.header,
            number,
            protein.num_residues,
            record.num_embedded,
            record.outcome.name,
            *protein.changes,
        )
        piece.rows.append(row)
        piece.num_residues += record.num_embedded
        if record.duplicate_of in (None, record.protein_index):
            return
        state.tally.deduplicated += 1
        answer = self._kept.get(record.duplicate_of)
        if isinstance(answer, Exception):
            self._on_fail(record.unit, answer, protein.id)
        elif answer is not None:
            self._settle(record.protein_index, answer)
        else:
            self._followers.setdefault(record.duplicate_of, []).append(record.protein_index)

    def _piece_for(self, state: UnitState, record: RecordRead) -> OutputBuilder:
        """The piece that the next record belongs to; a part that is full is closed."""
        unit = state.unit
        if record.protein.is_continued:  # a chain goes where the first one of its record went
            return state.pieces[-1]
        part, index = (
            divmod(state.num_records, self.settings.max_proteins_per_output)
            if unit.first_part is not None
            else (0, state.num_records)
        )
        if index == 0 and state.pieces:
            state.pieces[-1].is_closed = True
            self._write_if_complete(record.unit, state, state.pieces[-1])
        if part == len(state.pieces):
            state.pieces.append(OutputBuilder(part))
        state.num_records += 1
        return state.pieces[part]

    def _on_answers(
        self, segments: Sequence[Segment], answers: Sequence[SegmentEmbedding | Exception]
    ) -> None:
        # While outputs are being written their rows are about to leave memory; only what finds no room then has to wait on disk.
        num_bytes = (
            sum(stop - first for first, stop in (segment.keep for segment in segments))
            * self.settings.residue_bytes
        )
        self._take(self._writers.finished(lambda: self._memory.left >= num_bytes))
        for segment, answer in zip(segments, answers, strict=True):
            waiting = self._waiting.get(segment.protein)
            if waiting is None:
                continue
            if isinstance(answer, Exception):
                if segment.protein in self._kept:
                    self._kept[segment.protein] = answer
                for protein_index in [segment.protein, *self._followers.pop(segment.protein, [])]:
                    if protein_index in self._waiting:
                        self._on_fail(
                            self._waiting[protein_index].unit, answer, self._waiting[protein_index].name
                        )
                self._waiting.pop(segment.protein, None)
                continue
            waiting.answers[segment.part] = answer
            if all(waiting.answers):
                vectors = combine(
                    [one for one in waiting.answers if one is not None],
                    waiting.num_embedded,
                    self.settings.wanted,
                )
                if segment.protein in self._kept:
                    self._kept[segment.protein] = vectors
                followers = self._followers.pop(segment.protein, [])
                for protein_index in [segment.protein, *followers]:
                    self._settle(protein_index, vectors)

    def _settle(self, protein_index: int, vectors: ProteinEmbedding) -> None:
        """Put a protein's vectors in their place."""
        waiting = self._waiting.pop(protein_index, None)
        state = self._units.get(waiting.unit) if waiting else None
        if waiting is None or state is None:
            return
        with np.errstate(over="ignore"):  # what is too large for the dtype becomes infinite
            vectors = {key: rows.astype(self.settings.dtype, copy=False) for key, rows in vectors.items()}
        # In fp32 residues are finite if their sums are, and those were looked at before they came here; looking at every number takes time.
        looked_at = (
            rows
            for (kind, _), rows in vectors.items()
            if kind is not Include.per_tok or rows.dtype == np.float16
        )
        if not all(map(are_finite, looked_at)):
            problem = FloatingPointError(
                f"save_dtype={self.settings.dtype.name} cannot hold a number of its embedding: use save_dtype=float32"
            )
            self._on_fail(waiting.unit, problem, waiting.name)
            return
        error = as_value(self._spool, waiting, vectors)
        if isinstance(error, Exception):
            self._on_fail(waiting.unit, error)
            return
        waiting.piece.num_answered += 1
        self._write_if_complete(waiting.unit, state, waiting.piece)

    def _spool(self, waiting: Waiting, vectors: ProteinEmbedding) -> None:
        settings, count = self.settings, self._units[waiting.unit].unit.count
        for (kind, layer), rows in vectors.items():
            buffer = waiting.piece.buffers.get((kind, layer))
            if buffer is None:
                expected = count.residues if kind is Include.per_tok else count.sequences
                buffer = waiting.piece.buffers[kind, layer] = RowBuffer(
                    rows.shape[-1], settings.dtype, settings.scratch, self._memory, expected
                )
            buffer.write(waiting.row if kind is Include.per_tok else waiting.index, rows)

    def _on_end(self, key: int, digest: str) -> None:
        state = self._units.get(key)
        if state is None:
            return
        state.digest = digest
        if not state.pieces:
            state.pieces.append(OutputBuilder(0))
        state.is_closed = state.pieces[-1].is_closed = True
        self._write_if_complete(key, state, state.pieces[-1])

    def _on_fail(self, key: int, error: Exception, protein: str | None = None) -> None:
        state = self._discard(key)
        if state is not None:
            unit = state.unit
            failure = Failure.of(self.files[unit.file].path, error, self.rank, protein)
            self.on_failure(UnitFailure(unit.file, unit.ordinal, failure, time.monotonic() - state.started))

    def _on_abandon(self, key: int) -> None:
        self._discard(key)

    def _discard(self, key: int) -> UnitState | None:
        """Forget a unit and whatever is there of its output; a piece that is being written is removed when it is."""
        state = self._units.pop(key, None)
        if state is not None:
            for piece in state.pieces:
                piece.is_wanted = False
                if not piece.is_being_written:
                    piece.close()
            for written in state.written.values():
                remove(self.settings.output_dir / written.path)
        return state

    def _write_if_complete(self, key: int, state: UnitState, piece: OutputBuilder) -> None:
        if piece.is_closed and piece.num_answered == len(piece.rows) and not piece.is_being_written:
            piece.is_being_written = True
            self._take(self._writers.finished(lambda: self._writers.has_room))
            self._writers.submit(
                Job(
                    key,
                    piece,
                    partial(write_built, self.settings, self.files[state.unit.file], state.unit, piece),
                )
            )

    def _take(self, finished: Iterable[tuple[int, OutputBuilder, WrittenFile | Exception]]) -> None:
        """Pieces that were written, or were not. What they complete is passed on together."""
        results: list[UnitResult] = []
        for key, piece, written in finished:
            state = self._units.get(key)
            piece.close()
            if state is None:
                if not isinstance(written, Exception):
                    remove(self.settings.output_dir / written.path)
            elif isinstance(written, Exception):
                self._on_fail(key, written)
            else:
                state.written[piece.number] = written
                state.tally.duplicate_ids += len(piece.rows) - len({row.id for row in piece.rows})
                piece.rows, piece.notes = [], []
                if state.is_closed and len(state.written) == len(state.pieces):
                    results.append(self._complete(key, state))
        if results:
            self.on_results(results)

    def _complete(self, key: int, state: UnitState) -> UnitResult:
        del self._units[key]
        unit, seconds = state.unit, time.monotonic() - state.started
        pieces = tuple(state.written[number] for number in sorted(state.written))
        return UnitResult(unit.file, unit.ordinal, pieces, state.digest, state.tally, self.rank, seconds)
