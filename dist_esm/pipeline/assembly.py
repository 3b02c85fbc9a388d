"""Which embedding goes where: pure bookkeeping, without a thread or a queue.

The reader announces records, the device answers segments, in whatever order suits them. Here both meet: each
embedding finds its protein's place in file order, identical sequences share one, and an output whose places
are all filled is due to be written. The results are four lists that the caller empties: `to_write`,
`results`, `failures`, `to_remove`.

Memory is the announced proteins that are not embedded yet, the embeddings that are kept for identical
sequences, and the rows in memory of the outputs in the making.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dist_esm.attempt import as_value
from dist_esm.model.pool import combine
from dist_esm.outputs.builder import OutputBuilder, OutputSettings
from dist_esm.outputs.records_tsv import count_record, tsv_line
from dist_esm.outputs.row_buffer import Memory
from dist_esm.pipeline.writer_pool import WriteTask
from dist_esm.progress import RankProgress
from dist_esm.types import (
    Failure,
    FastaFile,
    ProteinEmbedding,
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


@dataclass
class UnitInProgress:
    """One unit between its first record and its last written output."""

    unit: Unit
    started: float
    builders: list[OutputBuilder] = field(default_factory=list)
    written: dict[int, WrittenFile] = field(default_factory=dict)
    """Part to its file."""
    tally: Tally = field(default_factory=Tally)
    num_records: int = 0
    text_digest: str = ""
    is_closed: bool = False
    flops: int = 0
    """What the plan says that it costs."""
    credited: float = 0.0
    """Of this, what is counted as done."""


@dataclass
class Place:
    """The place of a protein that is not embedded yet."""

    key: int
    """Its unit."""
    builder: OutputBuilder
    index: int
    """Its place among the proteins of its output."""
    first_row: int
    """The place of its first residue among those of its output."""
    num_embedded: int
    segments: list[SegmentEmbedding | None]

    @property
    def id(self) -> str | None:
        """The protein's id; None if its unit has failed and it is embedded only for others."""
        return self.builder.rows[self.index].id if self.index < len(self.builder.rows) else None


class Assembly:
    """Takes records and embeddings, and says which outputs are due and what became of each unit.

    Parameters
    ----------
    files
        The plan's files.
    settings
        What to write, and where.
    rank
        Recorded with results and failures.
    memory
        Shared by the rows of all outputs in the making.
    progress
        Is told of proteins that are done.
    clock
        Seconds, for how long units take.
    """

    def __init__(
        self,
        files: Sequence[FastaFile],
        settings: OutputSettings,
        rank: int,
        memory: Memory,
        progress: RankProgress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = files
        self.settings = settings
        self.rank = rank
        self.memory = memory
        self.to_write: list[WriteTask] = []
        """Outputs that are complete."""
        self.results: list[UnitResult] = []
        """Units whose outputs are all written."""
        self.failures: list[tuple[int, UnitFailure]] = []
        """Units that failed, with their keys."""
        self.to_remove: list[WrittenFile] = []
        """Files of units that failed after these were written."""
        self._progress = progress or RankProgress()
        self._clock = clock
        self._units: dict[int, UnitInProgress] = {}
        self._places: dict[int, Place] = {}
        self._duplicates: dict[int, list[int]] = {}
        """First of its kind to the later ones that wait for its embedding."""
        self._kept: dict[int, ProteinEmbedding | Exception | None] = {}
        """First of its kind to its embedding, for later ones; None: it is not there yet."""

    def begin(self, key: int, unit: Unit) -> None:
        """A unit is being read; later calls name it by its key."""
        flops = unit.count.flops(self.settings.width)
        self._units[key] = UnitInProgress(unit, self._clock(), flops=flops)

    def add_records(self, records: Sequence[RecordRead]) -> None:
        """Records were read: give each its place, and its embedding if an identical sequence has one
        already."""
        for record in records:
            is_first = record.duplicate_of == record.protein_index
            if is_first:
                self._kept[record.protein_index] = None
            state = self._units.get(record.unit)
            if state is not None:
                self._add_record(state, record)
            elif is_first:  # its unit has failed, yet records of others may wait for its embedding
                self._places[record.protein_index] = self._place(record, OutputBuilder(0))
            for protein_index in record.evicted:
                self._kept.pop(protein_index, None)

    def add_embeddings(
        self, segments: Sequence[Segment], embeddings: Sequence[SegmentEmbedding | Exception]
    ) -> None:
        """A pack was computed; an exception in an embedding's place fails its protein's unit."""
        for segment, embedding in zip(segments, embeddings, strict=True):
            place = self._places.get(segment.protein)
            if place is None:
                continue
            if isinstance(embedding, Exception):
                self._fail_protein(segment.protein, embedding)
                continue
            place.segments[segment.part] = embedding
            parts = [part for part in place.segments if part is not None]
            if not embedding.rows_fit:
                self._fail_protein(segment.protein, self._too_large())
            elif len(parts) == len(place.segments):
                whole = combine(parts, place.num_embedded, self.settings.representations)
                if segment.protein in self._kept:
                    self._kept[segment.protein] = whole
                for protein_index in [segment.protein, *self._duplicates.pop(segment.protein, [])]:
                    self._fill_place(protein_index, whole)

    def end(self, key: int, text_digest: str) -> None:
        """All records of a unit were announced."""
        state = self._units.get(key)
        if state is None:
            return
        state.text_digest = text_digest
        if not state.builders:
            state.builders.append(self._new_builder(state, 0))
        state.is_closed = state.builders[-1].is_closed = True
        self._submit_if_complete(key, state, state.builders[-1])

    def fail(self, key: int, error: Exception, protein: str | None = None) -> None:
        """A unit cannot be done."""
        state = self._forget(key)
        if state is not None:
            unit = state.unit
            self._credit(state, state.flops - state.credited)
            failure = Failure.of(self.files[unit.file].path, error, self.rank, protein)
            seconds = self._clock() - state.started
            self.failures.append((key, UnitFailure(unit.file, unit.ordinal, failure, seconds)))

    def abandon(self, key: int) -> None:
        """A unit was not read to its end; it gets no outcome."""
        self._forget(key)

    def abandon_all(self) -> None:
        """Units that are not complete by now get no outcome."""
        for key in list(self._units):
            self._forget(key)

    def add_written(self, task: WriteTask, written: WrittenFile | Exception) -> None:
        """An output was written, or could not be."""
        state, builder = self._units.get(task.key), task.builder
        builder.close()
        if state is None:
            if not isinstance(written, Exception):
                self.to_remove.append(written)
        elif isinstance(written, Exception):
            self.fail(task.key, written)
        else:
            state.written[builder.part] = written
            state.tally.duplicate_ids += len(builder.rows) - len({row.id for row in builder.rows})
            builder.rows, builder.tsv_lines = [], []
            if state.is_closed and len(state.written) == len(state.builders):
                self._complete(task.key, state)

    def _add_record(self, state: UnitInProgress, record: RecordRead) -> None:
        builder = self._builder_for(state, record)
        number = state.unit.before.sequences + state.num_records
        count_record(record, state.tally)
        line = tsv_line(record, number)
        if line is not None:
            builder.tsv_lines.append(line)
        if record.outcome is RecordOutcome.skipped:
            self._credit_protein(state)
            return
        self._places[record.protein_index] = self._place(record, builder)
        protein = record.protein
        builder.rows.append(Row.of(protein, number - 1, record.num_embedded, record.outcome))
        builder.num_residues += record.num_embedded
        if record.duplicate_of in (None, record.protein_index):
            return
        state.tally.deduplicated += 1
        kept = self._kept.get(record.duplicate_of)
        if isinstance(kept, Exception):
            self.fail(record.unit, kept, protein.id)
        elif kept is not None:
            self._fill_place(record.protein_index, kept)
        else:
            self._duplicates.setdefault(record.duplicate_of, []).append(record.protein_index)

    def _place(self, record: RecordRead, builder: OutputBuilder) -> Place:
        segments: list[SegmentEmbedding | None] = [None] * record.num_segments
        return Place(
            record.unit, builder, len(builder.rows), builder.num_residues, record.num_embedded, segments
        )

    def _builder_for(self, state: UnitInProgress, record: RecordRead) -> OutputBuilder:
        """The output that the next record belongs to; a part that is full is closed."""
        if record.protein.is_continued:  # a chain goes where the first one of its record went
            return state.builders[-1]
        part, index = 0, state.num_records
        if state.unit.first_part is not None:
            part_size = state.unit.part_size or self.settings.max_proteins_per_output
            part, index = divmod(state.num_records, part_size)
        if index == 0 and state.builders:
            state.builders[-1].is_closed = True
            self._submit_if_complete(record.unit, state, state.builders[-1])
        if part == len(state.builders):
            state.builders.append(self._new_builder(state, part))
        state.num_records += 1
        return state.builders[part]

    def _new_builder(self, state: UnitInProgress, part: int) -> OutputBuilder:
        return OutputBuilder(part, self.settings.target(self.files[state.unit.file], state.unit, part))

    def _fail_protein(self, protein_index: int, error: Exception) -> None:
        """Fail the units of a protein and of all that are identical to it."""
        if protein_index in self._kept:
            self._kept[protein_index] = error
        for same in [protein_index, *self._duplicates.pop(protein_index, [])]:
            if same in self._places:
                self.fail(self._places[same].key, error, self._places[same].id)
        self._places.pop(protein_index, None)

    def _fill_place(self, protein_index: int, embedding: ProteinEmbedding) -> None:
        place = self._places.pop(protein_index, None)
        state = self._units.get(place.key) if place else None
        if place is None or state is None:
            return
        dtype = self.settings.dtype
        with np.errstate(over="ignore"):  # a number that is too large for the dtype becomes infinite
            rounded = {key: rows.astype(dtype) for key, rows in embedding.items() if rows.dtype != dtype}
        if not all(np.isfinite(rows).all() for rows in rounded.values()):
            self.fail(place.key, self._too_large(), place.id)
            return
        embedding = {**embedding, **rounded}  # residues were rounded, and checked, where they came from
        put = partial(place.builder.put, place.index, place.first_row, embedding)
        error = as_value(put, self.settings, self.memory, self.files[state.unit.file], state.unit)
        if isinstance(error, Exception):
            self.fail(place.key, error)
            return
        self._credit_protein(state)
        self._submit_if_complete(place.key, state, place.builder)

    def _too_large(self) -> FloatingPointError:
        name = self.settings.dtype.name
        return FloatingPointError(
            f"save_dtype={name} cannot hold a number of its embedding: use save_dtype=float32"
        )

    def _submit_if_complete(self, key: int, state: UnitInProgress, builder: OutputBuilder) -> None:
        if builder.is_complete and not builder.is_submitted:
            builder.is_submitted = True
            work = partial(builder.work, self.settings, self.files[state.unit.file], state.unit)
            self.to_write.append(WriteTask(key, builder, work))

    def _credit_protein(self, state: UnitInProgress) -> None:
        """Count a protein as done, with its share of its unit's cost."""
        self._progress.proteins += 1
        share = state.flops / max(1, state.unit.count.sequences)
        self._credit(state, min(share, state.flops - state.credited))

    def _credit(self, state: UnitInProgress, flops: float) -> None:
        state.credited += flops
        self._progress.cost += flops

    def _complete(self, key: int, state: UnitInProgress) -> None:
        del self._units[key]
        self._credit(state, state.flops - state.credited)
        unit, seconds = state.unit, self._clock() - state.started
        files = tuple(state.written[part] for part in sorted(state.written))
        self.results.append(
            UnitResult(unit.file, unit.ordinal, files, state.text_digest, state.tally, self.rank, seconds)
        )

    def _forget(self, key: int) -> UnitInProgress | None:
        """Forget a unit and what is there of its outputs; what is being written is removed when it is
        done."""
        state = self._units.pop(key, None)
        if state is not None:
            for builder in state.builders:
                builder.is_wanted = False
                if not builder.is_submitted:
                    builder.close()
            self.to_remove += state.written.values()
        return state
