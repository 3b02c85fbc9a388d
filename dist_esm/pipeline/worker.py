"""One rank's work, end to end on one device; no process group.

Three threads, joined by bounded queues: the reader turns units into packs, this thread runs them, the collector writes what is
complete. The device waits for neither. Packs cross file borders; a failure is a value that names its file, and the work goes on.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from dist_esm.attempt import attempt
from dist_esm.config import Config
from dist_esm.model.engine import AHEAD, Engine, Submitted, is_out_of_memory
from dist_esm.pipeline.collector import Collector
from dist_esm.pipeline.reader import Reader
from dist_esm.pipeline.writer_pool import MAX_WRITERS, MIN_WRITERS, OutputSettings
from dist_esm.stop import Failures, Stop
from dist_esm.types import Answer, Failure, FastaFile, Pack, Segment, Unit, UnitFailure, UnitOutcome, UnitResult

T = TypeVar("T")


@dataclass
class RankResult:
    """What one rank did."""

    outcomes: list[UnitOutcome] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens that went through the model."""
    seconds: float = 0.0
    first_pack_at: float | None = None
    """Unix time at which the first pack was submitted."""
    num_split_packs: int = 0
    """Packs that did not fit, or failed, and were tried again in halves."""
    num_recomputed: int = 0
    """Segments that were not finite, and were computed again in a wider dtype."""
    waits: dict[str, float] = field(default_factory=lambda: {"waited_for_input": 0.0, "waited_for_output": 0.0})
    """Seconds in which nothing was submitted to the device: for the reader, and for outputs to be taken off its hands."""
    device_idle: float | None = None
    """Seconds between one pack's end on a GPU and the next one's beginning, by the device's own clock."""

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
    record: Callable[[Sequence[UnitResult]], None] = lambda results: None,
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
        Called with results as soon as their outputs are in place; what it raises fails the units.

    Returns
    -------
    RankResult
        Units without an outcome were not attempted.
    """
    gc.freeze()  # the garbage collector need not go through torch's modules again and again
    started = time.monotonic()
    result = RankResult()
    keys = {(unit.file, unit.ordinal): key for key, unit in enumerate(units)}
    failures = Failures(units, config.max_consecutive_failures, rank, stop)

    def on_results(results: Sequence[UnitResult]) -> None:
        error = attempt(partial(record, results))
        if not isinstance(error, Exception):
            result.outcomes += results
            return
        for one in results:
            on_failure(UnitFailure(one.file, one.ordinal, Failure.of(files[one.file].path, error, rank), one.seconds))

    def on_failure(failed: UnitFailure) -> None:
        result.outcomes.append(failed)
        failures.add(keys[failed.file, failed.ordinal], failed.failure)

    settings = OutputSettings(
        output_dir=config.output_dir,
        format=config.format,
        include=config.include,
        main_layer=config.resolved_layers()[-1],
        wanted=config.wanted(),
        width=config.model.embed_dim,
        dtype=np.dtype(config.save_dtype.name),
        max_proteins_per_output=config.max_proteins_per_output,
        provenance=provenance or {},
        num_writers=max(MIN_WRITERS, min(MAX_WRITERS, engine.num_threads // 2)),
    )
    collector = Collector(files, settings, rank, on_results, on_failure)
    reader = Reader(units, files, config, engine.toks_per_batch, collector, failures, stop)
    reader.start()
    ahead: deque[tuple[Pack, Submitted | Exception]] = deque()

    def settle() -> None:
        """Wait for the oldest pack that was submitted, and pass its answers on."""
        pack, submitted = ahead.popleft()
        if stop.at_once:
            return
        answers = finish(engine, pack, submitted, result)
        if stop.at_once:
            return
        result.num_tokens += pack.num_tokens
        result.wait("waited_for_output", partial(collector.answer, pack.segments, answers))
        if collector.crash is not None:
            stop.set(f"rank {rank} cannot go on: {collector.crash}", at_once=True)

    while True:
        while ahead and (len(ahead) >= AHEAD or reader.packs.empty()):
            settle()
        pack = result.wait("waited_for_input", reader.packs.get)
        if pack is None:
            break
        if not stop.at_once:
            result.first_pack_at = result.first_pack_at or time.time()
            ahead.append((pack, attempt(partial(engine.submit, pack))))
    while ahead:
        settle()
    reader.join()
    collector.close()
    if reader.crash is not None:
        raise reader.crash
    result.seconds = time.monotonic() - started
    gc.unfreeze()
    result.device_idle = engine.idle_seconds if engine.is_gpu else None
    return result


def embed_pack(engine: Engine, pack: Pack, result: RankResult | None = None) -> list[Answer | Exception]:
    """Answer a pack at once; see `finish`."""
    return finish(engine, pack, attempt(lambda: engine.submit(pack)), result or RankResult())


def finish(engine: Engine, pack: Pack, submitted: Submitted | Exception, result: RankResult) -> list[Answer | Exception]:
    """The answers of a pack that was submitted, in the order of its segments.

    A pack that fails is split and tried again with half the rows, down to single segments, whose error takes the answer's place.
    An answer that is not finite is computed again in a wider dtype.
    """
    answers = submitted if isinstance(submitted, Exception) else attempt(submitted.result)
    if isinstance(answers, CancelledError):
        return [answers] * len(pack.segments)
    if isinstance(answers, Exception):
        return in_halves(engine, pack, answers, engine.num_rows(pack), result)
    if are_finite(answers):
        return list(answers)
    return [widen(engine, segment, answer, result) for segment, answer in zip(pack.segments, answers, strict=True)]


def in_halves(engine: Engine, pack: Pack, error: Exception, num_rows: int, result: RankResult) -> list[Answer | Exception]:
    """What `finish` does with a pack that failed in so many rows."""
    if is_out_of_memory(error):
        engine.free_memory()
    can_shrink = engine.is_gpu and is_out_of_memory(error) and num_rows > pack.num_tokens
    if len(pack.segments) == 1 and not can_shrink:
        return [error]
    result.num_split_packs += 1
    rows = num_rows // 2
    found: list[Answer | Exception] = []
    for part in pack.halves() if len(pack.segments) > 1 else (pack,):
        answers = attempt(partial(engine.run, part, rows))
        if isinstance(answers, Exception):
            found += in_halves(engine, part, answers, rows, result)
        else:
            found += [widen(engine, segment, answer, result) for segment, answer in zip(part.segments, answers, strict=True)]
    return found


def widen(engine: Engine, segment: Segment, answer: Answer, result: RankResult) -> Answer | Exception:
    """An answer, or what a wider dtype gives if it is not finite: a number that is not spoils the sum of its column."""
    if are_finite([answer]):
        return answer
    result.num_recomputed += 1
    wider = attempt(lambda: engine.recompute(segment))
    if isinstance(wider, Exception) or are_finite([wider]):
        return wider
    return FloatingPointError("its embedding is not finite, in a wider dtype neither: the weights may be damaged")


def are_finite(answers: Sequence[Answer]) -> bool:
    """Whether all sums and representations of BOS are finite numbers."""
    return bool(np.isfinite(np.concatenate([x for answer in answers for part in (answer.sums, answer.bos) for x in part.values()])).all())
