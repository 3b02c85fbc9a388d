"""`job=embed`: every rank plans alike, embeds its bin, and rank 0 reports."""

from __future__ import annotations

import gc
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dist_esm.atomic import commit_together, discard
from dist_esm.attempt import as_value
from dist_esm.config import Compression, Config, ReportKind, Writers
from dist_esm.distributed import LostRankError, World
from dist_esm.jobs.plan.checks import problems_of
from dist_esm.jobs.plan.room import remark_on_room, room_in
from dist_esm.jobs.plan.short import short_lines
from dist_esm.jobs.plan.work import Work, content_size, count_of, output_of, work_of
from dist_esm.jobs.progress.ticker import Ticker
from dist_esm.jobs.report.content import Ending, Report
from dist_esm.jobs.report.draw import draw_page
from dist_esm.jobs.report.make import fail_what_vanished, failures_by_file, make_report
from dist_esm.jobs.report.summary import lines_on_nothing, summary
from dist_esm.jobs.report.write import about_launch, describe_launch, write_report, write_running_report
from dist_esm.jobs.setup import MakeEngine, Setup, choose_setup, describe, find_inputs, load_engine
from dist_esm.logs import logging_to
from dist_esm.model.engine import Engine
from dist_esm.names import few
from dist_esm.outputs.builder import shards_name
from dist_esm.outputs.events import start_details
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.in_hand import acquit, name_of, note_death, notes_of
from dist_esm.outputs.journal import Entry, entry_of
from dist_esm.outputs.output_dir import OutputDir, inside
from dist_esm.outputs.shards import assemble_output
from dist_esm.pipeline.worker import Destination, embed_units
from dist_esm.pipeline.writer_processes import WriterProcesses
from dist_esm.planning.agree import agree_on_output_dir, agree_on_plan, results_in_journal
from dist_esm.planning.claims import ClaimOrder
from dist_esm.planning.inputs import Inputs
from dist_esm.planning.pipes import remove_copies, remove_leftovers
from dist_esm.planning.units import Plan
from dist_esm.progress import Phase, RankProgress
from dist_esm.stop import Stop, stopping
from dist_esm.types import (
    Failure,
    JoinedFile,
    RankResult,
    RankSummary,
    TakenUnit,
    Tally,
    Unit,
    UnitFailure,
    UnitOutcome,
    UnitResult,
    WorkerStatus,
    WrittenFile,
)

log = logging.getLogger("dist_esm")

BY_SIGNAL = ("by SIGTERM", "by SIGINT")
"""End of what is said of signals that come from people, schedulers and torchrun."""
OUTCOME_TYPES = (UnitResult, UnitFailure, Failure, Tally, WrittenFile)


def run(
    config: Config,
    world: World,
    make_engine: MakeEngine = load_engine,
    processes: WriterProcesses | None = None,
) -> int:
    """Embed all inputs with all ranks.

    Parameters
    ----------
    config
        Checked configuration.
    world
        The ranks.
    make_engine
        Makes the model on this rank's device; tests and benchmarks give another.
    processes
        Write outputs on a GPU, or where `config.writers` asks for it; None: threads do.

    Returns
    -------
    int
        Rank 0: 0 if every file is embedded, 2 if some failed, 1 if the run was aborted. Other ranks: 0, or 1
        if they were interrupted.

    Raises
    ------
    RefusedError
        On every rank, if the run cannot start on one of them.
    KeyboardInterrupt
        If it is interrupted before it is known what there is to do.
    """
    clock, processes = Clock(), processes or WriterProcesses()
    world.progress.enter(Phase.counting)
    with Ticker(config, world) as ticker, ExitStack() as held:
        inputs = find_inputs(config, world)
        setup = choose_setup(config, world, inputs)
        if config.writers is Writers.auto and setup.device.type == "cpu":
            processes.end()
        if processes.problem is not None:
            log.warning("threads write the outputs, no processes can be started: %s", processes.problem)
        words = setup.provenance["weights_in_words"]
        out = held.enter_context(OutputDir.open(config, setup.settings, world, words))
        held.enter_context(keeping_records(out, setup, world))
        stop = held.enter_context(stopping())
        held.enter_context(world.watching(stop.set))
        ticker.note_output_dir(out)
        agree_on_output_dir(out, world)
        if world.is_main:
            remove_leftovers(config.output_dir, inputs.files)
        plan = agree_on_plan(config, inputs.files, out.entries, world, out.deaths)
        ticker.note_plan(plan)
        say_what_is_to_do(plan, config, setup, world, loads_model=make_engine is load_engine)
        about = about_launch(plan, config, setup, inputs, clock.started)
        world.all_or_none(out.record_inputs, plan.files, about)
        if world.is_main:
            write_running_report(plan, about, out)
        mine = account(world, setup, WorkerStatus.FAILED)
        try:
            with engine_for(plan, config, setup, world, make_engine, processes) as engine:
                held.enter_context(no_garbage_collection_of_modules())
                clock.loaded = time.monotonic()
                mine = embed_bin(plan, engine, config, setup, out, world, stop, processes)
            processes.end()
            if not stop.at_once:
                with stop.patiently():
                    ranks = world.all_gather(mine, RankSummary, *OUTCOME_TYPES)
                    ticker.note_last(world.all_gather(world.progress.now, RankProgress))
                world.progress.enter(Phase.joining)
                joined = join_cut_files(plan, ranks, config, out, world)
        except (KeyboardInterrupt, LostRankError) as interrupt:
            stop.set(str(interrupt), at_once=True)
        with stop.patiently():
            world.progress.enter(Phase.reporting)
            out.events.write("summary", **vars(replace(mine, outcomes=[])))
            if stop.at_once:
                note_deaths(out, world)
                ranks, joined = gather_what_is_left(mine, world), dict(plan.joined)
            if not world.is_main:
                return int(stop.at_once)  # a rank that was interrupted alone must not look as if it were done
            reason = reason_of(stop, world)
            report = conclude(plan, ranks, joined, about, inputs, out, reason, clock, world.progress.seconds)
            ticker.end(report.status)
            return tell(report, out, config)


@contextmanager
def no_garbage_collection_of_modules() -> Iterator[None]:
    """Spare the garbage collector what is there now: torch's modules are a million objects, and stay."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Clock:
    """When the run began, and when this rank had its model; seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.began = self.loaded = time.monotonic()
        self.started = time.time()
        """Unix time."""


@contextmanager
def keeping_records(out: OutputDir, setup: Setup, world: World) -> Iterator[None]:
    """While the block runs, keep this rank's log file and its record of phases."""
    world.progress.now.device = describe(setup.device)
    name = f"{out.launch:020d}.{world.rank:05d}.log"
    details = {"rank": world.rank, "host": world.host, "device": world.progress.now.device}
    out.events.write("start", **start_details(), **details)
    world.progress.on_phase = lambda phase: out.events.write("phase", phase=phase.name)
    world.progress.on_phase(Phase[world.progress.now.phase])
    with logging_to(inside(out.path) / "logs" / name, world.rank):
        log.debug("launch %d, %s", out.launch, ", ".join(f"{key} {value}" for key, value in details.items()))
        try:
            yield
        finally:
            world.progress.on_phase = lambda phase: None


def say_what_is_to_do(plan: Plan, config: Config, setup: Setup, world: World, loads_model: bool) -> None:
    """Log the plan in short, of what is known already. A model that is not loaded has to fit.

    Raises
    ------
    RefusedError
        On every rank, if the outputs cannot have the room that they need, or the model does not fit on one.
    """
    work = work_of(plan)
    output, room = output_of(work, config), room_in(config.output_dir)
    if world.is_main:
        for line in short_lines(plan, work, output, room, config, setup, describe(setup.device)):
            log.info("%s", line)
    problems = problems_of(plan, output, room, config, setup, world, loads_model)
    world.agree("; ".join(problems) or None)
    if world.is_main and (remark := remark_on_room(output, room)):
        log.warning("%s", remark)


def engine_for(
    plan: Plan,
    config: Config,
    setup: Setup,
    world: World,
    make_engine: MakeEngine,
    processes: WriterProcesses,
) -> Engine | nullcontext[None]:
    """The engine of every rank that has work to do; all ranks that need one get it, or all refuse.

    Beside the loading of the model the format's packages are imported, and memory is got for rows.
    """

    def engine_if_needed() -> Engine | nullcontext[None]:
        if not plan.bins[world.rank] and not plan.suspects:
            return nullcontext()
        processes.get_memory(row_bytes_of(plan, world.rank, config))
        with ThreadPoolExecutor(1, "format") as thread:
            prepared = thread.submit(FORMATS[config.format.name].codec.prepare)
            engine = make_engine(config, setup, world)
            prepared.result()
            return engine

    return world.all_or_none(engine_if_needed)


def row_bytes_of(plan: Plan, rank: int, config: Config) -> int:
    """Return the bytes of the numbers that processes may write for a rank: of all units that do not write
    them to their places in a file that was cut."""
    whole = [index for index in plan.bins[rank] if plan.units[index].layout is None]
    return content_size(Work(0, count_of(plan, whole), 0), config).number_bytes


def embed_bin(
    plan: Plan,
    engine: Engine | None,
    config: Config,
    setup: Setup,
    out: OutputDir,
    world: World,
    stop: Stop,
    processes: WriterProcesses,
) -> RankSummary:
    """Embed what this rank claims, and wait until all ranks are done or the run is to end at once."""
    units = [plan.units[index] for index in plan.bins[world.rank]]
    num_files, num_proteins = len({unit.file for unit in units}), sum(unit.count.sequences for unit in units)
    log.info("bin: %d units of %d files, %d proteins", len(units), num_files, num_proteins)
    result, taken_over = RankResult(), TakenOver()
    world.set_status(WorkerStatus.PROCESSING)
    world.progress.enter(Phase.embedding)
    with stop.patiently():
        if engine is not None:
            stop.when_at_once(engine.abandon)
            destination = Destination(
                out.path,
                out.scratch,
                out.in_hand,
                setup.provenance,
                record_results(plan, out, world.progress.now),
                record_failures(plan, out),
                world.progress,
                processes,
            )
            taken = take_units(plan, config, out, world, stop, taken_over)
            result = embed_units(taken, plan.files, config, engine, world.rank, stop, destination)
        if stop.reason is not None:
            how = f"rank {world.rank} was {stop.reason}" if stop.is_by_signal else stop.reason
            world.request_stop(how, stop.at_once)
        status = WorkerStatus.COMPLETED if stop.reason is None else WorkerStatus.FAILED
        world.progress.enter(Phase.waiting)
        mine = account(world, setup, status, result, engine, taken_over.num_units)
        if not stop.at_once:
            world.set_status(status)
            world.wait_until_complete(unless=lambda: stop.at_once)
    return mine


@dataclass
class TakenOver:
    """How many units a rank took that the assignment had given to others."""

    num_units: int = 0


def take_units(
    plan: Plan, config: Config, out: OutputDir, world: World, stop: Stop, taken_over: TakenOver
) -> Iterator[TakenUnit | None]:
    """Claim units for this rank, one when it is asked for: its own bin, then what others have not begun.

    None, between the two, asks the caller to finish all that it has in hand. It reads ahead of its device,
    and would else take over what others are just about to begin.

    Units that may kill their process come last, behind None, which asks the caller to finish all that it
    has in hand: the next one is given out when every rank has done so.
    """
    order = ClaimOrder(plan.bins, plan.costs)

    def take(unit: Unit) -> TakenUnit:
        begin(unit, plan, out, world)
        return TakenUnit(unit)

    for claim in order.own_claims(world.rank, world.claim):
        yield take(plan.units[claim.unit])
    if config.steal and world.world_size > 1:
        yield None
        for claim in order.claims_of_others(world.rank, world.claim, world.count_claims):
            unit = plan.units[claim.unit]
            taken_over.num_units += 1
            log.debug("takes %s over from rank %d", plan.files[unit.file].path, claim.bin)
            yield take(unit)
    if plan.suspects:
        yield None
        world.wait_for_all_at("suspects", unless=lambda: stop.reason is not None)
    while stop.reason is None and (place := world.claim(world.world_size)) < len(plan.suspects):
        unit = plan.units[plan.suspects[place]]
        log.warning("%s was in hand when a process died: it runs alone", plan.files[unit.file].path)
        begin(unit, plan, out, world)
        yield TakenUnit(unit, is_alone=True)


def begin(unit: Unit, plan: Plan, out: OutputDir, world: World) -> None:
    """Say that a unit is about to be read: to the other ranks, in the record of events, and in the log."""
    file = plan.files[unit.file]
    world.set_in_hand(str(file.path))
    out.events.write("begin", file=str(file.output), unit=unit.ordinal)
    log.debug("begins %s", describe_unit(unit, plan))


def describe_unit(unit: Unit | UnitResult | UnitFailure, plan: Plan) -> str:
    """Name a unit for people: its file, and which part of it if it was cut."""
    num_units = len(plan.units_of(unit.file))
    part = f", unit {unit.ordinal + 1} of {num_units}" if num_units > 1 else ""
    return f"{plan.files[unit.file].path}{part}"


def account(
    world: World,
    setup: Setup,
    status: WorkerStatus,
    result: RankResult | None = None,
    engine: Engine | None = None,
    taken_over: int = 0,
) -> RankSummary:
    """This rank's own account of its work."""
    result = result or RankResult()
    waits = (
        result.waits if result.device_idle is None else {**result.waits, "device_idle": result.device_idle}
    )
    startup = engine.startup if engine is not None else {}
    if result.first_pack_at is not None:
        startup = {**startup, "first_pack_at": result.first_pack_at}
    return RankSummary(
        rank=world.rank,
        host=world.host,
        device=describe(setup.device),
        status=status.name,
        seconds=result.seconds,
        tokens=result.num_tokens,
        split_packs=result.num_split_packs,
        recomputed=result.num_recomputed,
        waits=waits,
        startup=startup,
        outcomes=result.outcomes,
        taken_over=taken_over,
        ended_at=time.time(),
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        padding=result.num_padding,
        compute_seconds=result.compute_seconds,
        write_seconds=result.write_seconds,
        phases=dict(world.progress.seconds),
    )


def record_failures(plan: Plan, out: OutputDir) -> Callable[[UnitFailure], None]:
    """Make a function that notes units that failed."""

    def record(failed: UnitFailure) -> None:
        output, failure = str(plan.files[failed.file].output), failed.failure
        details = {"seconds": failed.seconds, "failure": vars(failure)}
        out.events.write("fail", file=output, unit=failed.ordinal, **details)
        log.debug("fails %s: %s: %s", describe_unit(failed, plan), failure.error_type, failure.error_message)

    return record


def record_results(
    plan: Plan, out: OutputDir, progress: RankProgress
) -> Callable[[Sequence[UnitResult]], None]:
    """Make a function that puts finished units into this rank's journal, and then says so."""

    def entry(result: UnitResult) -> Entry:
        return entry_of(
            plan.files[result.file],
            [plan.unit(result.file, result.ordinal)],
            len(plan.units_of(result.file)),
            [result.text_digest],
            list(result.files),
            result.tally,
            result.rank,
            result.seconds,
        )

    def record(results: Sequence[UnitResult]) -> None:
        out.journal.append([entry(result) for result in results])
        for result in results:
            progress.files += 1 / len(plan.units_of(result.file))
            output, number = str(plan.files[result.file].output), result.tally.sequences
            out.events.write("end", file=output, unit=result.ordinal, sequences=number)
            log.debug("ends %s, %d proteins in %.1f s", describe_unit(result, plan), number, result.seconds)

    return record


def gather_what_is_left(mine: RankSummary, world: World) -> list[RankSummary]:
    """What ranks can still say of a run that ends at once: their failures, and how far they came.

    What they finished is in the journal, and there may be too much of it for the store.
    """
    failures: list[UnitOutcome] = [outcome for outcome in mine.outcomes if isinstance(outcome, UnitFailure)]
    _, *others = world.gather_in_haste(replace(mine, outcomes=failures), RankSummary, *OUTCOME_TYPES)
    return [mine, *others]


def note_deaths(out: OutputDir, world: World) -> None:
    """Write down which processes this rank saw end before their work was done, for the next launch.

    No protein is to blame for a signal. But torchrun's own may come before this rank has noticed the death
    that it answers.
    """
    world.wait_for_news_of_deaths()
    for rank, how in world.lost_ranks.items():
        notes = notes_of(out.path, out.launch, rank)
        if notes.exists() and not how.endswith(BY_SIGNAL):
            note_death(notes, how)


def reason_of(stop: Stop, world: World) -> str | None:
    """Why the run was stopped, if it was.

    A signal, to this rank or another, may be torchrun's answer to what happened to a rank: then that is the
    reason, also if it was seen after the signal came.
    """
    told = [stop.reason, world.stop_reason(), *world.lost_ranks.values()]
    reasons = [reason for reason in told if reason is not None]
    others = [reason for reason in reasons if not reason.endswith(BY_SIGNAL)]
    return next(iter(others or reasons), None)


def join_cut_files(
    plan: Plan, ranks: Sequence[RankSummary], config: Config, out: OutputDir, world: World
) -> dict[int, JoinedFile | Failure]:
    """Join the shards of every file that was cut, is whole again and is small enough for one output.

    The ranks share the files.
    """
    outcomes = [*plan.done, *(outcome for rank in ranks for outcome in rank.outcomes)]
    failed = failures_by_file([*outcomes, *plan.quarantined])
    results: dict[int, dict[int, UnitResult]] = {}
    for outcome in outcomes:
        unit = plan.unit(outcome.file, outcome.ordinal)
        if isinstance(outcome, UnitResult) and outcome.file not in failed and unit.is_shard:
            results.setdefault(outcome.file, {})[outcome.ordinal] = outcome
    ready = sorted(
        file
        for file, shards in results.items()
        if len(shards) == len(plan.units_of(file)) and file not in plan.joined
    )
    joined: dict[str, JoinedFile | Failure] = {}
    for file in ready[world.rank :: world.world_size]:
        shards = [results[file][ordinal] for ordinal in sorted(results[file])]
        output = as_value(join_file, plan, file, shards, config, out)
        if isinstance(output, Exception):
            failure = Failure.of(plan.files[file].path, output, world.rank)
            out.events.write("fail", file=str(plan.files[file].output), failure=vars(failure))
            joined[str(file)] = failure
        else:
            joined[str(file)] = output
    everyone = world.all_gather(joined, JoinedFile, Failure, WrittenFile)
    return {**plan.joined, **{int(file): output for share in everyone for file, output in share.items()}}


def join_file(
    plan: Plan, file: int, shards: Sequence[UnitResult], config: Config, out: OutputDir
) -> JoinedFile:
    """Make one output of a file's shards, record it, and remove the shards.

    Numbers that are in their places stay there; others are written from the shards to the output.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    paths = [out.path / shard.files[0].path for shard in shards]
    is_compressed = config.compression is not Compression.none
    stem = out.path / plan.files[file].output
    staged, ids = assemble_output(paths, config.format, stem, out.scratch, is_compressed)
    (written,) = commit_together([staged], out.path)
    if isinstance(written, Exception):
        raise written
    tally = Tally()
    for shard in shards:
        tally.add(shard.tally)
    tally.duplicate_ids = len(ids) - len(set(ids))
    units = plan.units_of(file)
    digests = [shard.text_digest for shard in shards]
    seconds = sum(shard.seconds for shard in shards)
    entry = entry_of(
        plan.files[file],
        units,
        len(units),
        digests,
        [written],
        tally,
        out.rank,
        seconds,
        is_joined=True,
    )
    out.journal.append([entry])
    # Also those of a launch that cut the file in other places.
    for path in {*paths, *out.shards.glob(f"{shards_name(plan.files[file])}.*")}:
        discard(path)
    return JoinedFile(written, tally.duplicate_ids)


def conclude(
    plan: Plan,
    ranks: Sequence[RankSummary],
    joined: Mapping[int, JoinedFile | Failure],
    about: Mapping[str, Any],
    inputs: Inputs,
    out: OutputDir,
    reason: str | None,
    clock: Clock,
    phases: Mapping[str, float],
) -> Report:
    """Make the report of what the ranks say, and write report.json and failed_files.txt."""
    now = time.monotonic()
    others: list[UnitResult] = []
    if reason is not None:
        # Ranks that died can no longer say what they finished; what they journaled still stands.
        known = {(outcome.file, outcome.ordinal) for rank in ranks for outcome in rank.outcomes}
        journaled, joined_since = results_in_journal(out.entries_of_this_launch(), plan)
        others = [result for result in journaled if (result.file, result.ordinal) not in known]
        joined = {**joined, **joined_since}
    done = [*others, *(outcome for rank in ranks for outcome in rank.outcomes)]
    finished = [plan.unit(unit.file, unit.ordinal) for unit in done if isinstance(unit, UnitResult)]
    acquit(out.path, (name_of(plan.files[unit.file], unit) for unit in finished))
    ending = Ending(reason, now - clock.began, now - clock.loaded, dict(phases))
    out.events.write("conclude", **vars(ending))
    report = make_report(plan, ranks, joined, ending, others)
    describe_launch(report, about, out.launch)
    fail_what_vanished(report, out.path)
    remove_superseded(plan, report, out)
    if report.status == "complete":
        removed = as_value(out.remove_useless_shards)
        if isinstance(removed, Exception):
            log.warning("shards of files that are complete are left in %s: %s", out.shards, removed)
    remove_copies(inputs.files)
    try:
        # Where output_dir was removed under way, its report is written all the same.
        write_report(report, out.path, out.scratch if out.scratch.is_dir() else None)
    except OSError as error:
        report.status = "aborted"
        report.reason = f"the report cannot be written to {out.path} ({error.strerror})"
    return report


def remove_superseded(plan: Plan, report: Report, out: OutputDir) -> None:
    """Remove outputs that files had before their texts changed, and that nothing was written over."""
    done = {file.path for file in report.files}
    finished = {str(file.output) for file in plan.files if str(file.path) in done}
    outputs = {output for file in report.files for output in file.outputs}
    removed = as_value(out.remove_superseded, finished, outputs)
    if isinstance(removed, Exception):
        log.warning("outputs of texts that inputs no longer have are left in %s: %s", out.path, removed)
    elif removed:
        log.warning("removed %d outputs of texts that inputs no longer have: %s", len(removed), few(removed))


def tell(report: Report, out: OutputDir, config: Config) -> int:
    """Print the summary, draw the page if it is wanted, and return the exit code."""
    for line in lines_on_nothing(report):
        log.warning("%s", line)
    print(summary(report, out.path, config.verbosity), flush=True)
    if config.report is ReportKind.html:
        draw_page(report, out.path)
    return report.exit_code
