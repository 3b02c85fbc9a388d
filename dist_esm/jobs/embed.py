"""The whole run: every rank plans alike, embeds its bin, and rank 0 reports."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from dist_esm.atomic import atomically, written_file
from dist_esm.attempt import as_value
from dist_esm.config import Config, to_dict
from dist_esm.distributed import World
from dist_esm.jobs.report import (
    fail_what_vanished,
    failures_by_file,
    make_report,
    summary,
    versions,
    write_report,
)
from dist_esm.jobs.setup import Setup, choose_setup, describe, find_inputs, load_engine
from dist_esm.model.engine import Engine
from dist_esm.model.weights import locate
from dist_esm.outputs.formats.registry import write_output
from dist_esm.outputs.journal import (
    Entry,
    Journal,
    check_settings,
    clean,
    entry_of,
    finished_outputs,
    lock,
    new_launch,
    start_over,
    write_settings,
)
from dist_esm.outputs.journal import read as read_journal
from dist_esm.outputs.shards import join
from dist_esm.pipeline.worker import embed_units
from dist_esm.planning.agree import agree_on_plan, results_in_journal
from dist_esm.planning.inputs import Inputs
from dist_esm.planning.pipes import remove_copies, remove_leftovers
from dist_esm.planning.units import Plan
from dist_esm.stop import Stop, on_signals
from dist_esm.types import Failure, JoinedFile, RankResult, RankSummary, Tally, Unit, UnitResult, WorkerStatus

log = logging.getLogger("dist_esm")


def run(config: Config, world: World) -> int:
    """Embed all inputs with all ranks.

    Returns
    -------
    int
        Rank 0: 0 if every file is embedded, 2 if some failed, 1 if the run was aborted. Other ranks: 0, or 1 if they were interrupted.

    Raises
    ------
    RefusedError
        On every rank, if the run cannot start on one of them.
    KeyboardInterrupt
        If it is interrupted before it is known what there is to do.
    """
    started = loaded = time.monotonic()
    inputs = find_inputs(config, world)
    files = inputs.files
    setup = choose_setup(config, world)
    with output_directory(config, setup, world) as journal:
        if world.is_main:
            remove_leftovers(config.output_dir, files)
        entries = read_journal(config.output_dir) if config.resume else []
        plan = agree_on_plan(config, files, entries, world)
        units = [plan.units[index] for index in plan.bins[world.rank]]
        stop, mine = Stop(), account(world, setup, WorkerStatus.FAILED)
        try:
            engine = world.all_or_none(lambda: load_engine(config, setup, world) if units else None)
            loaded = time.monotonic()
            mine = embed_bin(config, setup, world, plan, units, engine, journal, stop)
            if not stop.at_once:
                ranks = world.all_gather(mine)
                joined = join_cut_files(config, plan, ranks, journal, world)
        except KeyboardInterrupt as interrupt:  # while there is no engine yet, or no longer
            stop.set(str(interrupt), at_once=True)
        if stop.at_once:
            ranks, joined = world.collect_in_haste(mine), dict(plan.joined)
        if not world.is_main:
            return int(stop.at_once)  # a rank that was interrupted alone must not look as if it were done
        now = time.monotonic()
        reason = stop.reason or (None if stop.at_once else world.stop_reason())
        return conclude(
            config, setup, inputs, plan, ranks, joined, journal, reason, now - started, now - loaded
        )


def embed_bin(
    config: Config,
    setup: Setup,
    world: World,
    plan: Plan,
    units: list[Unit],
    engine: Engine | None,
    journal: Journal,
    stop: Stop,
) -> RankSummary:
    """Embed this rank's units, and wait until all ranks have done so or the run is to end at once."""
    num_files, num_proteins = len({unit.file for unit in units}), sum(unit.count.sequences for unit in units)
    log.info("bin: %d units of %d files, %d proteins", len(units), num_files, num_proteins)
    result = RankResult()
    world.set_status(WorkerStatus.PROCESSING)
    with on_signals(partial(stop.set, at_once=True)), world.watching(stop.set):
        if engine is not None:
            stop.when_at_once(engine.abandon)
            result = embed_units(
                units,
                plan.files,
                config,
                engine,
                world.rank,
                stop,
                setup.provenance,
                journal_writer(journal, plan),
            )
            engine.close()
        if stop.reason is not None and not stop.at_once:
            world.request_stop(stop.reason)
        status = WorkerStatus.COMPLETED if stop.reason is None else WorkerStatus.FAILED
        mine = account(world, setup, status, result, engine)
        if not stop.at_once:
            world.set_status(status)
            world.wait_until_complete(unless=lambda: stop.at_once)
    return mine


def account(
    world: World,
    setup: Setup,
    status: WorkerStatus,
    result: RankResult | None = None,
    engine: Engine | None = None,
) -> RankSummary:
    """This rank's own account of its work."""
    result = result or RankResult()
    waits = (
        result.waits if result.device_idle is None else {**result.waits, "device_idle": result.device_idle}
    )
    startup = engine.startup if engine is not None else {}
    if result.first_pack_at is not None:
        startup = {**startup, "first_pack_at": result.first_pack_at}
    work = (
        result.seconds,
        result.num_tokens,
        result.num_split_packs,
        result.num_recomputed,
        waits,
        startup,
        result.outcomes,
    )
    return RankSummary(world.rank, world.host, describe(setup.device), status.name, *work)


@contextmanager
def output_directory(config: Config, setup: Setup, world: World) -> Iterator[Journal]:
    """Hold the output directory, refuse to mix settings in it, clear what killed runs left, and open this rank's journal."""
    held = world.all_or_none(lambda: hold(config, setup.settings) if world.is_main else None)
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
        there = finished_outputs(config.output_dir)
        if there:
            shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            log.warning(
                "resume=false: starting over, %d finished outputs in %s are removed: %s",
                len(there),
                config.output_dir,
                shown,
            )
        start_over(config.output_dir)
    write_settings(config.output_dir, settings)
    clean(config.output_dir, (one.path for entry in read_journal(config.output_dir) for one in entry.written))
    return held


def journal_writer(journal: Journal, plan: Plan) -> Callable[[Sequence[UnitResult]], None]:
    """What records finished units."""

    def entry(result: UnitResult) -> Entry:
        pieces = [plan.unit(result.file, result.ordinal).slice]
        output = str(plan.files[result.file].output)
        return entry_of(
            output, pieces, [result.digest], list(result.pieces), result.tally, result.rank, result.seconds
        )

    def record(results: Sequence[UnitResult]) -> None:
        journal.append([entry(result) for result in results])

    return record


def join_cut_files(
    config: Config, plan: Plan, ranks: list[RankSummary], journal: Journal, world: World
) -> dict[int, JoinedFile | Failure]:
    """Join the pieces of every file that was cut, is whole again and is small enough for one output; the ranks share the files."""
    outcomes = [*plan.done, *(outcome for rank in ranks for outcome in rank.outcomes)]
    failed = failures_by_file(outcomes)
    results: dict[int, dict[int, UnitResult]] = {}
    for outcome in outcomes:
        unit = plan.unit(outcome.file, outcome.ordinal)
        if isinstance(outcome, UnitResult) and outcome.file not in failed and unit.is_shard:
            results.setdefault(outcome.file, {})[outcome.ordinal] = outcome
    ready = sorted(
        file
        for file, found in results.items()
        if len(found) == len(plan.units_of(file)) and file not in plan.joined
    )
    joined: dict[int, JoinedFile | Failure] = {}
    for file in ready[world.rank :: world.world_size]:
        parts = [results[file][ordinal] for ordinal in sorted(results[file])]
        output = as_value(lambda file=file, parts=parts: join_file(config, plan, file, parts, journal))  # type: ignore[misc]
        joined[file] = (
            Failure.of(plan.files[file].path, output, world.rank) if isinstance(output, Exception) else output
        )
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
    journal.append(
        [
            entry_of(
                str(plan.files[file].output),
                slices,
                digests,
                [written],
                tally,
                journal.rank,
                seconds,
                is_joined=True,
            )
        ]
    )
    for path in paths:
        path.unlink(missing_ok=True)
    return JoinedFile(written, duplicate_ids)


def conclude(
    config: Config,
    setup: Setup,
    inputs: Inputs,
    plan: Plan,
    ranks: list[RankSummary],
    joined: Mapping[int, JoinedFile | Failure],
    journal: Journal,
    reason: str | None,
    seconds: float,
    embedding_seconds: float,
) -> int:
    """Write the report, print the summary, and return the exit code."""
    others: list[UnitResult] = []
    if reason is not None:
        # Ranks that died can no longer say what they finished; what they journaled still stands.
        known = {(outcome.file, outcome.ordinal) for rank in ranks for outcome in rank.outcomes}
        found, joined_since = results_in_journal(read_journal(config.output_dir, journal.launch), plan)
        others = [result for result in found if (result.file, result.ordinal) not in known]
        joined = {**joined, **joined_since}
    report = make_report(plan, ranks, joined, reason, seconds, embedding_seconds, others)
    fail_what_vanished(report, config.output_dir)
    remove_copies(inputs.files)
    report.passed_over = inputs.report()
    report.config = to_dict(config)
    report.model = {
        "name": config.model.name,
        "weights": config.model.weights or str(locate(config.model)),
        **setup.provenance,
    }
    report.kernels = str(setup.kernels)
    report.versions = versions()
    try:
        with atomically(config.output_dir / ".dist_esm" / "config.json") as beside:
            beside.write_text(json.dumps(report.config, indent=1) + "\n", encoding="utf-8")
        write_report(report, config.output_dir)
    except OSError as error:
        report.status, report.reason = (
            "aborted",
            f"the report cannot be written to {config.output_dir} ({error.strerror})",
        )
    print(summary(report, config.output_dir), flush=True)
    return report.exit_code
