"""One rank's work, end to end on one device; no process group.

Three threads, joined by bounded queues: the reader turns units into packs, this thread runs them, the collector writes what is
complete. The device waits for neither. Packs cross file borders; a failure is a value that names its file, and the work goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from dist_esm.attempt import attempt
from dist_esm.collect import Collector
from dist_esm.config import Config
from dist_esm.engine import Engine, is_out_of_memory
from dist_esm.feed import Reader
from dist_esm.outputs import OutputSettings
from dist_esm.records import Answer, Failure, FastaFile, Pack, Unit, UnitFailure, UnitOutcome, UnitResult
from dist_esm.stop import Failures, Stop

T = TypeVar("T")


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
    keys = {(unit.file, unit.ordinal): key for key, unit in enumerate(units)}
    failures = Failures(units, config.max_consecutive_failures, rank, stop)

    def on_outcome(outcome: UnitOutcome) -> None:
        if isinstance(outcome, UnitResult):
            error = attempt(partial(record, outcome))
            if isinstance(error, Exception):
                outcome = UnitFailure(outcome.file, outcome.ordinal, Failure.of(files[outcome.file].path, error, rank), outcome.seconds)
        result.outcomes.append(outcome)
        if isinstance(outcome, UnitFailure):
            failures.add(keys[outcome.file, outcome.ordinal], outcome.failure)

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
    reader = Reader(units, files, config, engine.toks_per_batch, collector, failures, stop)
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
