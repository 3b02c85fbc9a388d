"""One rank's work, end to end on one device; no process group.

Three threads, joined by bounded queues: the reader turns units into packs, this thread runs them, the collector writes what is
complete. The device waits for neither. Packs cross file borders; a failure is a value that names its file, and the work goes on.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.model.engine import AHEAD, Engine, Submitted
from dist_esm.pipeline.collector import Collector
from dist_esm.pipeline.failures import Failures
from dist_esm.pipeline.reader import Reader
from dist_esm.pipeline.retry import finish
from dist_esm.pipeline.writer_pool import MAX_WRITERS, MIN_WRITERS, OutputSettings
from dist_esm.stop import Stop
from dist_esm.types import Failure, FastaFile, Pack, RankResult, Unit, UnitFailure, UnitResult

T = TypeVar("T")


def embed_units(
    units: Sequence[Unit],
    files: Sequence[FastaFile],
    config: Config,
    engine: Engine,
    rank: int,
    stop: Stop,
    scratch: Path,
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
    scratch
        Folder of this rank alone, for what is not committed yet.
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
        error = as_value(record, results)
        if not isinstance(error, Exception):
            result.outcomes += results
            return
        for one in results:
            on_failure(
                UnitFailure(one.file, one.ordinal, Failure.of(files[one.file].path, error, rank), one.seconds)
            )

    def on_failure(failed: UnitFailure) -> None:
        result.outcomes.append(failed)
        failures.add(keys[failed.file, failed.ordinal], failed.failure)

    settings = OutputSettings(
        output_dir=config.output_dir,
        format=config.format,
        include=config.include,
        main_layer=config.resolved_layers()[-1],
        wanted=config.output_representations(),
        width=config.model.embed_dim,
        dtype=np.dtype(config.save_dtype.name),
        max_proteins_per_output=config.max_proteins_per_output,
        provenance=provenance or {},
        scratch=scratch,
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
            ahead.append((pack, as_value(engine.submit, pack)))
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
