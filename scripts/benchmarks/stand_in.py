"""The real run over an engine without a model: all that is measured is what stands around the device.

The engine gives every segment numbers that were made beforehand, at once or at a set pace. The rest is
real: plan, reader, packs, collector, writers, hashing, syncing, joining, report.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch

from benchmarks.harness import cpu_seconds, peak_mib, processes_below, written_bytes
from dist_esm.config import Config, Writers
from dist_esm.distributed import World
from dist_esm.jobs.embed import run
from dist_esm.jobs.setup import Setup
from dist_esm.model.engine import Engine
from dist_esm.pipeline.writer_processes import WriterProcesses, num_writers
from dist_esm.types import Pack, Segment, SegmentEmbedding

TOKS_PER_BATCH = 16384
NUM_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StandInEngine:
    """An engine without a model.

    Parameters
    ----------
    answer
        Gives a segment its embedding.
    tokens_per_second
        The pace at which packs are done; None: at once.
    num_threads
        Cores that the run may think are the engine's.
    num_launches
        Calls of torch for each pack: each gives Python's interpreter away, as launches of kernels do. With
        any, the run takes it for a GPU.
    """

    toks_per_batch = TOKS_PER_BATCH

    @property
    def toks_of_last(self) -> int:
        """Tokens of the last packs: fewer where the run takes it for a GPU."""
        return self.toks_per_batch // 4 if self.is_gpu else self.toks_per_batch

    def __init__(
        self,
        answer: Callable[[Segment], SegmentEmbedding],
        tokens_per_second: float | None = None,
        num_threads: int = NUM_THREADS,
        num_launches: int = 0,
    ) -> None:
        self.answer = answer
        self.tokens_per_second = tokens_per_second
        self.num_threads = num_threads
        self.is_gpu = num_launches > 0
        self.idle_seconds = 0.0
        self.num_segments = 0
        """Segments answered so far."""
        self.startup: dict[str, float] = {}
        self.launch_seconds: list[float] = []
        """What the launches of each pack took."""
        self._launched = torch.zeros(64) if num_launches else None
        self._num_launches = num_launches
        self._free_at = 0.0

    def __enter__(self) -> StandInEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, pack: Pack, num_rows: int | None = None) -> StandInPack:
        """Begin with a pack as soon as the one before it is done."""
        if self._launched is not None:
            began = time.perf_counter()
            for _ in range(self._num_launches):
                self._launched.add_(1)
            self.launch_seconds.append(time.perf_counter() - began)
        if self.tokens_per_second is not None:
            began = max(time.monotonic(), self._free_at)
            self._free_at = began + pack.num_tokens / self.tokens_per_second
        return StandInPack(self, pack, self._free_at)

    def run(self, pack: Pack, num_rows: int | None = None) -> list[SegmentEmbedding]:
        """Return the embeddings of a pack."""
        return self.submit(pack).result()

    def num_rows(self, pack: Pack) -> int:
        """Return the rows that a pack of any size has."""
        return self.toks_per_batch

    def recompute(self, segment: Segment) -> SegmentEmbedding:
        """Return the same numbers again: there is no wider dtype."""
        return self.answer(segment)

    def free_memory(self) -> None:
        """Do nothing: nothing is cached."""

    def abandon(self) -> None:
        """Do nothing: no pack takes long."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


@dataclass(frozen=True)
class StandInPack:
    """A pack that is done at a set time."""

    engine: StandInEngine
    pack: Pack
    done_at: float

    def result(self) -> list[SegmentEmbedding]:
        """Wait until the pack is done, and return its embeddings."""
        time.sleep(max(0.0, self.done_at - time.monotonic()))
        self.engine.num_segments += len(self.pack.segments)
        return [self.engine.answer(segment) for segment in self.pack.segments]


@dataclass(frozen=True)
class RunCost:
    """What one run took, and its report."""

    seconds: float
    plan_seconds: float
    """From the beginning until there was a plan and the engine was asked for."""
    plan_peak_mib: float
    """Peak memory of the process at that moment."""
    peak_mib: float
    """Peak memory of the process at the end."""
    cpu_seconds: float
    """Seconds of all threads since there was a plan, and of the processes that write, from their start."""
    written_bytes: int
    """What was given to the system to write, by those processes, too."""
    report: dict[str, Any]


class CountedProcesses(WriterProcesses):
    """Processes that write, whose cost is looked at before they end."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_seconds = 0.0
        self.written_bytes = 0

    def end(self) -> None:
        """Look, and end them."""
        for process in processes_below(os.getpid()):
            self.cpu_seconds += cpu_seconds(process)
            self.written_bytes += written_bytes(process)
        super().end()


def run_without_model(config: Config, engine: StandInEngine) -> RunCost:
    """Do `job=embed` as a world of one rank, with a stand-in for the model.

    Raises
    ------
    RuntimeError
        If the run is not complete.
    """
    began, written_before = time.perf_counter(), written_bytes()
    planned: list[tuple[float, float, float]] = []

    def make_engine(config: Config, setup: Setup, world: World) -> Engine:
        """Note what the plan took: the engine is asked for as soon as there is one."""
        planned.append((time.perf_counter() - began, peak_mib(), cpu_seconds()))
        return cast(Engine, engine)

    with CountedProcesses() as processes:
        if config.writers is Writers.processes:
            processes.start(num_writers(engine.num_threads), config.format)
        exit_code = run(config, World(None, 0, 1, 0, 1), make_engine, processes)
    seconds = time.perf_counter() - began
    report = json.loads((config.output_dir / "report.json").read_text(encoding="utf-8"))
    if exit_code != 0 or report["status"] != "complete":
        raise RuntimeError(
            f"exit code {exit_code}, {report['status']}: {report['reason']} {report['failed'][:3]}"
        )
    ((plan_seconds, plan_peak, cpu_before),) = planned
    return RunCost(
        seconds,
        plan_seconds,
        plan_peak,
        peak_mib(),
        cpu_seconds() - cpu_before + processes.cpu_seconds,
        written_bytes() - written_before + processes.written_bytes,
        report,
    )
