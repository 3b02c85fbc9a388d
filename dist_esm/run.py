"""The whole run: every rank plans alike, embeds its bin, and rank 0 reports."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from dist_esm.attempt import attempt
from dist_esm.config import Config, Format, to_dict
from dist_esm.embed import RankResult, embed_units
from dist_esm.engine import Engine, default_toks_per_batch, make_engine, num_cores
from dist_esm.journal import Entry, Journal, check_settings, clean, entry_of, lock, new_launch, start_over, write_settings
from dist_esm.journal import read as read_journal
from dist_esm.kernels import Kernels, choose_device, choose_dtype, choose_kernels
from dist_esm.plan import Plan, find_files, refuse_nested
from dist_esm.records import Failure, FastaFile, JoinedFile, Tally, UnitResult, WorkerStatus
from dist_esm.report import RankSummary, fail_what_vanished, failures_by_file, make_report, summary, versions, write_report
from dist_esm.spool import atomically, join, written_file
from dist_esm.stop import Stop
from dist_esm.survey import agree_on_plan, results_of
from dist_esm.weights import RANDOM, architecture, fetch, locate, weights_id
from dist_esm.world import World, together
from dist_esm.writers import write_output

log = logging.getLogger("dist_esm")


def run(config: Config, world: World) -> int:
    """Embed all inputs with all ranks.

    Returns
    -------
    int
        Rank 0: 0 if every file is embedded, 2 if some failed, 1 if the run was aborted. Other ranks: 0.

    Raises
    ------
    RefusedError
        On every rank, if the run cannot start on one of them.
    """
    started = time.monotonic()
    files = together(world, lambda: find_inputs(config))
    setup = prepare(config, world)
    with output_directory(config, setup, world) as journal:
        entries = read_journal(config.output_dir) if config.resume else []
        plan = agree_on_plan(config, files, world, entries)
        units = [plan.units[index] for index in plan.bins[world.rank]]
        engine = together(world, lambda: load_engine(config, setup, world) if units else None)
        loaded = time.monotonic()
        num_files, num_proteins = len({unit.file for unit in units}), sum(unit.count.sequences for unit in units)
        log.info("bin: %d units of %d files, %d proteins", len(units), num_files, num_proteins)
        stop, result = Stop(), RankResult()
        world.set_status(WorkerStatus.PROCESSING)
        with interrupts(stop, engine), world.watching(stop.set):
            if engine is not None:
                result = embed_units(units, files, config, engine, world.rank, stop, setup.provenance, journal_writer(journal, files, plan))
                engine.close()
            if stop.reason is not None and not stop.at_once:
                world.request_stop(stop.reason)
            status = WorkerStatus.COMPLETED if stop.reason is None else WorkerStatus.FAILED
            mine = account(world, setup, status, result, engine)
            if not stop.at_once:
                world.set_status(status)
                world.wait_until_complete(unless=lambda: stop.at_once)
            if stop.at_once:
                ranks = world.collect_in_haste(mine)
                joined: Mapping[int, JoinedFile | Failure] = plan.joined
            else:
                ranks = world.all_gather(mine)
                joined = join_cut_files(config, plan, ranks, journal, world)
        if not world.is_main:
            return 0
        now = time.monotonic()
        reason = stop.reason or (None if stop.at_once else world.stop_reason())
        return conclude(config, setup, plan, ranks, joined, journal, reason, now - started, now - loaded)


def account(world: World, setup: Setup, status: WorkerStatus, result: RankResult, engine: Engine | None) -> RankSummary:
    """This rank's own account of its work."""
    waits = result.waits if result.device_idle is None else {**result.waits, "device_idle": result.device_idle}
    startup = engine.startup if engine is not None else {}
    if result.first_pack_at is not None:
        startup = {**startup, "first_pack_at": result.first_pack_at}
    work = (result.seconds, result.num_tokens, result.num_split_packs, result.num_recomputed, waits, startup, result.outcomes)
    return RankSummary(world.rank, world.host, describe(setup.device), status.name, *work)


def find_inputs(config: Config) -> list[FastaFile]:
    """The input files; a ValueError if their outputs would get into each other's way."""
    files = find_files(config.input_list())
    if config.format is Format.fair_esm:
        refuse_nested(files)
    return files


@dataclass(frozen=True)
class Setup:
    """What this rank runs on, and what its numbers depend on."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    provenance: dict[str, Any]
    """Goes into every output."""
    settings: dict[str, Any]
    """All that one output directory must not mix."""


def prepare(config: Config, world: World) -> Setup:
    """Choose the device and find the weights: all ranks can, or all refuse."""
    together(world, lambda: make_output_dir(config.output_dir))
    device = together(world, lambda: choose_device(config.device, world.local_rank, world.local_world_size, world.host))
    dtype = choose_dtype(config.dtype, device)
    head_dim = architecture(config.model).head_dim
    kernels = together(world, lambda: choose_kernels(config.attention, config.linear, device, dtype, head_dim))
    together(world, lambda: fetch(config.model) if world.local_rank == 0 else None)
    world.start_process_group(device)
    provenance = {
        "model": config.model.name,
        "weights": together(world, lambda: weights_id(config.model)),
        "layers": config.resolved_layers(),
        "dtype": str(dtype).removeprefix("torch."),
        "save_dtype": config.save_dtype.name,
        "truncation_seq_length": config.truncation_seq_length,
        "long": config.long.name,
        "dist_esm": version("dist_esm"),
    }
    values = to_dict(config)
    settings = {key: values[key] for key in ("format", "include", "window_overlap", "residues", "max_proteins_per_output")}
    # On a GPU the rows of a pack choose the matrix kernels, so they are part of what the bits depend on.
    shape = {"toks_per_batch": config.toks_per_batch or default_toks_per_batch("cuda", config.model.embed_dim)} if device.type == "cuda" else {}
    settings = {**provenance, **settings, **shape, "device": device.type, "attention": kernels.attention, "linear": kernels.linear.name}
    del settings["dist_esm"]
    return Setup(device, dtype, kernels, provenance, settings)


def load_engine(config: Config, setup: Setup, world: World) -> Engine:
    """The model on this rank's device, its kernels compiled."""
    began = time.monotonic()
    engine = make_engine(config, setup.device, setup.dtype, setup.kernels, max(1, num_cores() // world.local_world_size))
    loaded = time.monotonic()
    engine.warm_up()
    engine.startup = {"load_seconds": loaded - began, "kernels_seconds": time.monotonic() - loaded}
    log.info(
        "%s on %s in %s, loaded in %.1f s, kernels ready in %.1f s; %s, packs of %d tokens",
        config.model.name,
        describe(setup.device),
        setup.provenance["dtype"],
        *engine.startup.values(),
        setup.kernels,
        engine.toks_per_batch,
    )
    if world.is_main and config.model.weights == RANDOM:
        log.warning("WEIGHTS ARE RANDOM (seed %d): the embeddings will mean nothing", config.model.seed)
    return engine


@contextmanager
def output_directory(config: Config, setup: Setup, world: World) -> Iterator[Journal]:
    """Hold the output directory, refuse to mix settings in it, clear what killed runs left, and open this rank's journal."""
    held = together(world, lambda: hold(config, setup.settings) if world.is_main else None)
    (launch, *_) = world.exchange(new_launch())
    journal = Journal(config.output_dir, launch, world.rank)
    try:
        yield journal
    finally:
        journal.close()
        if held is not None:
            held.close()


def hold(config: Config, settings: dict[str, Any]) -> IO[str]:
    """Rank 0's part of `output_directory`."""
    held = lock(config.output_dir)
    check_settings(config.output_dir, settings, config.resume)
    if not config.resume:
        removed = start_over(config.output_dir)
        if removed:
            shown = ", ".join(removed[:3]) + (", ..." if len(removed) > 3 else "")
            log.warning("resume=false: starting over, %d finished outputs in %s are removed: %s", len(removed), config.output_dir, shown)
    write_settings(config.output_dir, settings)
    clean(config.output_dir, (one.path for entry in read_journal(config.output_dir) for one in entry.written))
    return held


def journal_writer(journal: Journal, files: list[FastaFile], plan: Plan) -> Callable[[Sequence[UnitResult]], None]:
    """What records finished units."""

    def entry(result: UnitResult) -> Entry:
        pieces = [plan.unit(result.file, result.ordinal).slice]
        output = str(files[result.file].output)
        return entry_of(output, pieces, [result.digest], list(result.pieces), result.tally, result.rank, result.seconds)

    def record(results: Sequence[UnitResult]) -> None:
        journal.append([entry(result) for result in results])

    return record


def make_output_dir(output_dir: Path) -> None:
    """Create the output directory and try to write to it.

    Raises
    ------
    ValueError
        If it cannot be written to.
    """
    scratch = output_dir / ".dist_esm"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with atomically(scratch / f"writable.{os.getpid()}") as beside:
            beside.write_text("")
        (scratch / f"writable.{os.getpid()}").unlink()
    except OSError as error:
        raise ValueError(f"output_dir={output_dir} cannot be written to ({error.strerror}): name a directory that can") from None


def join_cut_files(config: Config, plan: Plan, ranks: list[RankSummary], journal: Journal, world: World) -> dict[int, JoinedFile | Failure]:
    """Join the pieces of every file that was cut, is whole again and is small enough for one output; the ranks share the files."""
    outcomes = [*plan.done, *(outcome for rank in ranks for outcome in rank.outcomes)]
    failed = failures_by_file(outcomes)
    results: dict[int, dict[int, UnitResult]] = {}
    for outcome in outcomes:
        unit = plan.unit(outcome.file, outcome.ordinal)
        if isinstance(outcome, UnitResult) and outcome.file not in failed and not unit.is_whole and unit.first_part is None:
            results.setdefault(outcome.file, {})[outcome.ordinal] = outcome
    ready = sorted(file for file, found in results.items() if len(found) == len(plan.units_of(file)) and file not in plan.joined)
    joined: dict[int, JoinedFile | Failure] = {}
    for file in ready[world.rank :: world.world_size]:
        parts = [results[file][ordinal] for ordinal in sorted(results[file])]
        output = attempt(lambda file=file, parts=parts: join_file(config, plan, file, parts, journal))  # type: ignore[misc]
        joined[file] = Failure.of(plan.files[file].path, output, world.rank) if isinstance(output, Exception) else output
    return {**plan.joined, **{file: end for ends in world.all_gather(joined) for file, end in ends.items()}}


def join_file(config: Config, plan: Plan, file: int, parts: list[UnitResult], journal: Journal) -> JoinedFile:
    """Make one output of a file's pieces, record it, and remove the pieces."""
    paths = [config.output_dir / part.pieces[0].path for part in parts]
    with join(paths, config.output_dir / ".dist_esm") as embeddings:
        output = write_output(config.format, embeddings, config.output_dir / plan.files[file].output)
        duplicate_ids = len(embeddings.rows) - len(set(embeddings.ids))
    written = written_file(config.output_dir, output)
    tally = Tally()
    for part in parts:
        tally.add(part.tally)
    tally.duplicate_ids = duplicate_ids
    slices = [unit.slice for unit in plan.units_of(file)]
    seconds = sum(part.seconds for part in parts)
    digests = [part.digest for part in parts]
    journal.append([entry_of(str(plan.files[file].output), slices, digests, [written], tally, journal.rank, seconds, is_joined=True)])
    for path in paths:
        path.unlink(missing_ok=True)
    return JoinedFile(written, duplicate_ids)


def conclude(
    config: Config,
    setup: Setup,
    plan: Plan,
    ranks: list[RankSummary],
    joined: Mapping[int, JoinedFile | Failure],
    journal: Journal,
    reason: str | None,
    seconds: float,
    embedding_seconds: float,
) -> int:
    """Write the report, print the summary, and return the exit code."""
    if reason is not None:
        # Ranks that died can no longer say what they finished; what they journaled still stands.
        known = {(outcome.file, outcome.ordinal) for rank in ranks for outcome in rank.outcomes}
        found = results_of(read_journal(config.output_dir, journal.launch), plan)
        plan = replace(plan, done=(*plan.done, *(result for result in found if (result.file, result.ordinal) not in known)))
    report = make_report(plan, ranks, joined, reason, seconds, embedding_seconds)
    fail_what_vanished(report, config.output_dir)
    report.config = to_dict(config)
    report.model = {"name": config.model.name, "weights": config.model.weights or str(locate(config.model)), **setup.provenance}
    report.kernels = str(setup.kernels)
    report.versions = versions()
    with atomically(config.output_dir / ".dist_esm" / "config.json") as beside:
        beside.write_text(json.dumps(report.config, indent=1) + "\n", encoding="utf-8")
    write_report(report, config.output_dir)
    print(summary(report, config.output_dir), flush=True)
    return report.exit_code


@contextmanager
def interrupts(stop: Stop, engine: Engine | None) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM stop the work at once and keep what is written; a second signal ends the process."""

    def on_signal(number: int, _frame: object) -> None:
        stop.set(f"interrupted by {signal.Signals(number).name}", at_once=True)
        if engine is not None:
            engine.close()
        for one in previous:
            signal.signal(one, signal.SIG_DFL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not stop.at_once:
            for number, handler in previous.items():
                signal.signal(number, handler)


def describe(device: torch.device) -> str:
    """A device in words."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
