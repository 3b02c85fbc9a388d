"""One rank's work, end to end on one device; no process group.

The reader turns units into packs, this thread runs them on the device, the collector brings embeddings and
records together, and the writers write what is complete. Bounded queues join them, so the device waits for
none of them and memory does not grow. Packs cross file borders. A failure is a value that names its file, and
the work goes on; a thread that ends early stops the rank with a reason that names it, and what is done stays
done.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_esm.attempt import as_value, ending_of
from dist_esm.config import Compression, Config
from dist_esm.model.engine import AHEAD, Engine, Submitted
from dist_esm.outputs.builder import OutputSettings
from dist_esm.outputs.in_hand import InHand
from dist_esm.outputs.row_buffer import Memory
from dist_esm.pipeline.assembly import Assembly
from dist_esm.pipeline.collector import Collector
from dist_esm.pipeline.failures import Failures
from dist_esm.pipeline.reader import Reader
from dist_esm.pipeline.retry import finish
from dist_esm.pipeline.threads import describe_ending
from dist_esm.pipeline.writer_pool import WriterPool
from dist_esm.pipeline.writer_processes import WriterProcesses, num_writers
from dist_esm.progress import Progress, RankProgress
from dist_esm.stop import Stop
from dist_esm.types import Failure, FastaFile, Pack, RankResult, TakenUnit, UnitFailure, UnitResult

log = logging.getLogger("dist_esm")
TURN_SECONDS = 5e-5
"""How long a thread keeps Python's interpreter when another wants it; measured in LOG.md."""


@dataclass(frozen=True)
class Destination:
    """Where a rank's outputs go, and who is told of them."""

    output_dir: Path
    scratch: Path
    """Folder of this rank's temporary files."""
    in_hand: InHand
    """Notes of what may kill this process."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the numbers depend on; goes into every output."""
    record: Callable[[Sequence[UnitResult]], None] = lambda results: None
    """Called with results as soon as their outputs are in place; an exception fails their units."""
    record_failure: Callable[[UnitFailure], None] = lambda failure: None
    """Called with each unit that failed."""
    progress: Progress = field(default_factory=Progress)
    """Is told how far this rank is."""
    processes: WriterProcesses = field(default_factory=WriterProcesses)
    """Write outputs, if they were started; else threads do."""


def embed_units(
    units: Iterable[TakenUnit | None],
    files: Sequence[FastaFile],
    config: Config,
    engine: Engine,
    rank: int,
    stop: Stop,
    destination: Destination,
) -> RankResult:
    """Embed units in order and write their outputs.

    Parameters
    ----------
    units
        What to do; the next one is asked for, in the reader's thread, when there is room for it. None:
        finish all that is in hand before the next one is asked for.
    files
        The plan's files.
    config
        Checked configuration.
    engine
        The model on its device.
    rank
        Recorded with results and failures.
    stop
        Ends the work early. It is set here when `max_consecutive_failures` is reached, or a thread ended
        early.
    destination
        Where outputs go.

    Returns
    -------
    RankResult
        Units without an outcome were not attempted, or not finished.
    """
    began = time.monotonic()
    result = RankResult()
    ending = ending_of(_run_threads, units, files, config, engine, rank, stop, destination, result)
    if ending is not None:
        stop.set_crash(describe_ending("the main thread", rank, ending))
        log.error("%s", stop.reason, exc_info=ending)
    if stop.crash is None:
        destination.in_hand.leave()
    else:
        destination.in_hand.blame(stop.crash)
    result.seconds = time.monotonic() - began
    result.device_idle = engine.idle_seconds if engine.is_gpu else None
    return result


def _run_threads(
    units: Iterable[TakenUnit | None],
    files: Sequence[FastaFile],
    config: Config,
    engine: Engine,
    rank: int,
    stop: Stop,
    destination: Destination,
    result: RankResult,
) -> None:
    failures = Failures(config.max_consecutive_failures, rank, stop)
    in_hand = destination.in_hand

    def on_results(results: Sequence[UnitResult]) -> None:
        failures.end(len(results))
        error = as_value(destination.record, results)
        if not isinstance(error, Exception):
            result.outcomes += results
            return
        for unit in results:
            failure = Failure.of(files[unit.file].path, error, rank)
            note_failure(UnitFailure(unit.file, unit.ordinal, failure, unit.seconds))

    def on_failure(key: int, failed: UnitFailure) -> None:
        failures.end(1)
        note_failure(failed)
        failures.add(key, failed.failure)

    def note_failure(failed: UnitFailure) -> None:
        result.outcomes.append(failed)
        destination.progress.now.failed += 1
        destination.record_failure(failed)

    at_once, processes = num_writers(engine.num_threads), destination.processes
    with (
        short_turns() if engine.is_gpu else nullcontext(),
        ExitStack() as threads,
    ):  # torn down in reverse, whatever happens
        copiers = threads.enter_context(ThreadPoolExecutor(max(1, at_once // 2), "copier"))
        memory, progress = Memory(copiers=copiers, arena=processes.arena), destination.progress.now
        assembly = Assembly(files, output_settings(config, destination), rank, memory, progress)
        writers = threads.enter_context(
            WriterPool(destination.output_dir, destination.scratch, at_once, rank, stop, processes.lines)
        )
        collector = Collector(assembly, writers, rank, stop, on_results, on_failure)
        threads.enter_context(collector)
        toks = engine.toks_per_batch, engine.toks_of_last
        reader = Reader(units, files, config, *toks, collector, failures, in_hand, rank, stop)
        threads.enter_context(reader)
        run_packs(reader, collector, engine, in_hand, stop, result, progress)
        last_pack = time.monotonic()
    result.write_seconds = time.monotonic() - last_pack


def run_packs(
    reader: Reader,
    collector: Collector,
    engine: Engine,
    in_hand: InHand,
    stop: Stop,
    result: RankResult,
    progress: RankProgress,
) -> None:
    """Run the reader's packs on the device and pass their embeddings on, `AHEAD` packs ahead of the
    answers."""
    ahead: deque[tuple[Pack, Submitted | Exception]] = deque()

    def settle() -> None:
        """Wait for the oldest pack that was submitted, and pass its embeddings on."""
        pack, submitted = ahead.popleft()
        if stop.at_once:
            return
        with computing(result):
            embeddings = finish(engine, pack, submitted, result)
        in_hand.settle(segment.protein for segment in pack.segments)
        if stop.at_once:
            return
        result.num_tokens += pack.num_tokens
        if engine.is_gpu:
            result.num_padding += max(0, engine.num_rows(pack) - pack.num_tokens)
        with waiting(result, "waited_for_output"):
            collector.add_embeddings(pack.segments, embeddings)
        progress.tokens = result.num_tokens
        progress.waited_for_input = result.waits["waited_for_input"]
        progress.waited_for_output = result.waits["waited_for_output"]

    while True:
        while ahead and (len(ahead) >= AHEAD or not reader.has_pack):
            settle()
        with waiting(result, "waited_for_input"):
            pack = reader.next_pack()
        if pack is None:
            break
        if not stop.at_once:
            result.first_pack_at = result.first_pack_at or time.time()
            in_hand.submit([segment.protein for segment in pack.segments])
            with computing(result):
                ahead.append((pack, as_value(engine.submit, pack)))
            while ahead and in_hand.is_alone:  # one pack at a time, so that the one that kills can be told
                settle()
    while ahead:
        settle()


def output_settings(config: Config, destination: Destination) -> OutputSettings:
    """What to write, and where, as the configuration has it."""
    return OutputSettings(
        output_dir=destination.output_dir,
        scratch=destination.scratch,
        format=config.format,
        include=config.include,
        main_layer=config.resolved_layers()[-1],
        representations=config.output_representations(),
        width=config.model.embed_dim,
        dtype=np.dtype(config.save_dtype.name),
        max_proteins_per_output=config.max_proteins_per_output,
        provenance=destination.provenance,
        is_compressed=config.compression is not Compression.none,
    )


@contextmanager
def waiting(result: RankResult, for_what: str) -> Iterator[None]:
    """Count the time that the block takes as waiting."""
    began = time.monotonic()
    try:
        yield
    finally:
        result.waits[for_what] += time.monotonic() - began


@contextmanager
def computing(result: RankResult) -> Iterator[None]:
    """Count the time that the block takes as the device's."""
    began = time.monotonic()
    try:
        yield
    finally:
        result.compute_seconds += time.monotonic() - began


@contextmanager
def short_turns() -> Iterator[None]:
    """While the block runs, a thread that works in Python gives the interpreter away after `TURN_SECONDS`.

    On a GPU the main thread wants it back after each kernel that it launches; others keep it for up to 5 ms.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
