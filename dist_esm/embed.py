"""One rank's work, end to end on one device; no process group.

Three threads, joined by bounded queues: the reader turns units into packs, this thread runs them, the collector writes what is
complete. The device waits for neither. Packs cross file borders; a failure is a value that names its file, and the work goes on.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from dist_esm.alphabet import tokenize
from dist_esm.attempt import attempt
from dist_esm.collect import Announcement, Collector
from dist_esm.config import Config, Include, Long
from dist_esm.engine import Engine, is_out_of_memory
from dist_esm.fasta import read_proteins
from dist_esm.outputs import OutputSettings
from dist_esm.pack import Packer, windows
from dist_esm.records import Answer, Failure, FastaFile, Pack, Protein, RecordOutcome, Segment, Unit, UnitFailure, UnitOutcome, UnitResult
from dist_esm.scan import FastaError

T = TypeVar("T")
PACKS_AHEAD = 4
DEDUPE_BYTES = 256 << 20
"""Bytes of answers that are kept for identical sequences."""
LEADER_BYTES = 1024
"""What keeping one answer costs beside its numbers."""
MAX_HELD = 1 << 14
"""Records that may pass before packs that do not fill are let go: when all that comes is copies, no pack fills."""
MAX_BATCH = 512
"""Records announced at once."""


class Stop:
    """Why a rank should stop, if it should. Set from any thread; the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.at_once = False
        """Drop what is in flight, rather than finish what has been read."""
        self._lock = threading.Lock()

    def set(self, reason: str, at_once: bool = False) -> None:
        """Ask for a stop."""
        with self._lock:
            self.reason = self.reason or reason
            self.at_once = self.at_once or at_once


@dataclass
class RankResult:
    """What one rank did."""

    outcomes: list[UnitOutcome] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens that went through the model."""
    seconds: float = 0.0
    num_split_packs: int = 0
    """Packs that did not fit, or failed, and were tried again in halves."""
    waits: dict[str, float] = field(default_factory=lambda: {"waited_for_input": 0.0, "waited_for_output": 0.0})
    """Seconds in which the device had nothing to do: for the reader, and for outputs to be taken off its hands."""

    def wait(self, what: str, work: Callable[[], T]) -> T:
        """Do something that may have to wait, and count the time."""
        began = time.monotonic()
        value = work()
        self.waits[what] += time.monotonic() - began
        return value


def embed_units(
    units: Sequence[Unit],
    files: Sequence[FastaFile],
    config: Config,
    engine: Engine,
    rank: int,
    stop: Stop,
    provenance: dict[str, Any] | None = None,
    record: Callable[[UnitResult], None] = lambda result: None,
) -> RankResult:
    """Embed a rank's units in order and write their outputs.

    Parameters
    ----------
    units
        The rank's bin.
    files
        The plan's files.
    config
        Checked configuration.
    engine
        The model on its device.
    rank
        Recorded with results and failures.
    stop
        Ends the work early; set here when `max_consecutive_failures` is reached.
    provenance
        What the numbers depend on, for every output.
    record
        Called with each result as soon as its outputs are in place; what it raises fails the unit.

    Returns
    -------
    RankResult
        Units without an outcome were not attempted.
    """
    started = time.monotonic()
    result = RankResult()
    failed_files: set[int] = set()
    failed: set[int] = set()
    keys = {(unit.file, unit.ordinal): key for key, unit in enumerate(units)}

    def on_outcome(outcome: UnitOutcome) -> None:
        if isinstance(outcome, UnitResult):
            error = attempt(partial(record, outcome))
            if isinstance(error, Exception):
                outcome = UnitFailure(outcome.file, outcome.ordinal, Failure.of(files[outcome.file].path, error, rank), outcome.seconds)
        result.outcomes.append(outcome)
        if isinstance(outcome, UnitFailure):
            failed.add(keys[outcome.file, outcome.ordinal])
            failed_files.add(outcome.file)
            streak = {units[key].file for key in run_around(failed, keys[outcome.file, outcome.ordinal])}
            if len(streak) >= config.max_consecutive_failures:
                last = outcome.failure
                stop.set(f"{len(streak)} files in a row failed on rank {rank}, the last, {last.path}, with {last.error_type}: {last.error_message}")

    settings = OutputSettings(
        output_dir=config.output_dir,
        format=config.format,
        include=config.include,
        layers=config.resolved_layers(),
        width=config.model.embed_dim,
        dtype=np.dtype(config.save_dtype.name),
        max_proteins_per_output=config.max_proteins_per_output,
        provenance=provenance or {},
    )
    collector = Collector(files, settings, rank, on_outcome)
    reader = Reader(units, files, config, engine.toks_per_batch, collector, failed_files, stop)
    reader.start()
    while (pack := result.wait("waited_for_input", reader.packs.get)) is not None:
        if stop.at_once:
            continue
        answers, num_splits = embed_pack(engine, pack)
        if stop.at_once:
            continue
        result.num_tokens += pack.num_tokens
        result.num_split_packs += num_splits
        result.wait("waited_for_output", partial(collector.answer, pack.segments, answers))
        if collector.crash is not None:
            stop.set(f"rank {rank} cannot go on: {collector.crash}", at_once=True)
    reader.join()
    collector.close()
    if reader.crash is not None:
        raise reader.crash
    result.seconds = time.monotonic() - started
    return result


def run_around(failed: set[int], key: int) -> range:
    """The longest run of neighbouring failed units around one of them."""
    first = last = key
    while first - 1 in failed:
        first -= 1
    while last + 1 in failed:
        last += 1
    return range(first, last + 1)


def embed_pack(engine: Engine, pack: Pack) -> tuple[list[Answer | Exception], int]:
    """Answer a pack; one that fails is split and tried again, down to single segments, whose error takes the answer's place.

    Returns
    -------
    answers in the order of the segments, and the number of splits
    """
    answers = attempt(lambda: engine.run(pack))
    if not isinstance(answers, Exception):
        return list(answers), 0
    if is_out_of_memory(answers):
        engine.free_memory()
    if len(pack.segments) == 1:
        return [answers], 0
    left, right = pack.halves()
    first, splits_first = embed_pack(engine, left)
    second, splits_second = embed_pack(engine, right)
    return first + second, 1 + splits_first + splits_second


def shape(protein: Protein, config: Config) -> tuple[Protein, RecordOutcome, list[tuple[int, int, int, int]]]:
    """Apply the policy for long proteins.

    Returns
    -------
    the protein, skipped perhaps; what becomes of it; and (start, stop, first kept, one past the last kept) of each of its segments

    Raises
    ------
    FastaError
        If it is too long and ``long=fail``.
    """
    if protein.skipped is not None:
        return protein, RecordOutcome.skipped, []
    num_residues, limit = len(protein.residues), config.truncation_seq_length
    if limit is None or num_residues <= limit:
        return protein, RecordOutcome.ok, [(0, num_residues, 0, num_residues)]
    if config.long is Long.truncate:
        return protein, RecordOutcome.truncated, [(0, limit, 0, limit)]
    if config.long is Long.window:
        return protein, RecordOutcome.windowed, windows(num_residues, limit, config.window_overlap)
    if config.long is Long.fail:
        raise FastaError(f"{protein.id} has {num_residues} residues, more than truncation_seq_length={limit}: use long=truncate, skip or window")
    return replace(protein, skipped="too long"), RecordOutcome.skipped, []


class Reader(threading.Thread):
    """Reads units, announces their records to the collector, and fills packs ahead of the device.

    Identical residues are embedded once: later records point to the first, as long as its answer is kept.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        files: Sequence[FastaFile],
        config: Config,
        toks_per_batch: int,
        collector: Collector,
        failed_files: set[int],
        stop: Stop,
    ) -> None:
        super().__init__(name="reader", daemon=True)
        self.units = units
        self.files = files
        self.config = config
        self.collector = collector
        self.failed_files = failed_files
        self.stop = stop
        self.packs: queue.Queue[Pack | None] = queue.Queue(maxsize=PACKS_AHEAD)
        self.crash: Exception | None = None
        self._packer = Packer(toks_per_batch)
        self._batch: list[Announcement] = []
        self._next_ticket = 0
        self._leaders: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._kept_bytes = 0
        self._num_held = 0

    def run(self) -> None:
        """Read all units, then say so with None in `packs`."""
        crash = attempt(self._read_all)
        self.crash = crash if isinstance(crash, Exception) else None
        self.packs.put(None)

    def _read_all(self) -> None:
        for key, unit in enumerate(self.units):
            if self.stop.reason is not None:
                break
            if unit.file in self.failed_files:
                continue
            self.collector.begin(key, unit)
            digest = attempt(lambda key=key, unit=unit: self._read(key, unit))  # type: ignore[misc]
            self._flush_batch()
            if isinstance(digest, Exception):
                self.collector.fail(key, digest)
            elif digest is None:
                self.collector.abandon(key)
            else:
                self.collector.end(key, digest)
        for pack in self._packer.flush():
            self._emit(pack)

    def _read(self, key: int, unit: Unit) -> str | None:
        """Announce and pack the records of a unit, and give the sha256 of its text; None if the run was stopped half way."""
        num_records = 0
        digest = hashlib.sha256()
        for protein in read_proteins(unit, self.config.residues, digest.update):
            if self.stop.reason is not None:
                return None
            num_records += 1
            for segment in self._announce(key, protein):
                for pack in self._packer.add(segment):
                    self._emit(pack)
            self._num_held += 1
            if self._num_held > MAX_HELD:
                for pack in self._packer.flush():
                    self._emit(pack)
                self._num_held = 0
        file = self.files[unit.file]
        stat = os.stat(file.path)
        if num_records != unit.count.sequences or (stat.st_size, stat.st_mtime_ns) != (file.num_bytes, file.mtime_ns):
            raise FastaError("the file was changed while the run was under way: start the run again")
        return digest.hexdigest()

    def _announce(self, key: int, protein: Protein) -> Iterator[Segment]:
        """Tell the collector of a record, and give the segments that the device has to see for it."""
        ticket = self._next_ticket
        self._next_ticket += 1
        protein, outcome, spans = shape(protein, self.config)
        num_embedded = sum(stop - first for _, _, first, stop in spans)
        like = self._leader(ticket, protein.residues[:num_embedded], len(spans)) if spans and self.config.dedupe else None
        forgotten = tuple(self._forgotten())
        self._batch.append(Announcement(ticket, key, protein, outcome, num_embedded, len(spans), like, forgotten))
        if len(self._batch) >= MAX_BATCH:
            self._flush_batch()
        if like in (None, ticket):
            for part, (start, stop, first, last) in enumerate(spans):
                yield Segment(ticket, part, tokenize(protein.residues[start:stop]), (first - start, last - start))

    def _leader(self, ticket: int, residues: bytes, num_segments: int) -> int | None:
        """The ticket of the first protein with the same residues, which may be this one; None if keeping its answer is not cheap."""
        include, layers = self.config.include, len(self.config.repr_layers)
        rows = sum(len(residues) if kind is Include.per_tok else 1 for kind in include)
        num_bytes = LEADER_BYTES + 4 * self.config.model.embed_dim * layers * rows
        if num_bytes > DEDUPE_BYTES // 16:
            return None
        digest = hashlib.blake2b(residues, digest_size=16, salt=num_segments.to_bytes(8, "little")).digest()
        if digest in self._leaders:
            self._leaders.move_to_end(digest)
            return self._leaders[digest][0]
        self._leaders[digest] = (ticket, num_bytes)
        self._kept_bytes += num_bytes
        return ticket

    def _forgotten(self) -> Iterator[int]:
        """Leaders that make room for newer ones, the least recently asked for first."""
        while self._kept_bytes > DEDUPE_BYTES:
            _, (ticket, num_bytes) = self._leaders.popitem(last=False)
            self._kept_bytes -= num_bytes
            yield ticket

    def _emit(self, pack: Pack) -> None:
        self._num_held = 0
        self._flush_batch()
        self.packs.put(pack)

    def _flush_batch(self) -> None:
        if self._batch:
            self.collector.announce(self._batch)
            self._batch = []
