"""`job=report`: the report of the last launch, made again of what its output directory holds.

After a run that ended in order it is the same report. After a crash it says what the journal has as done, as
`load` does, what failed, and how far each rank was. Nothing is read but the records in `.dist_esm` and what
the page shows of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dist_esm.config import Config, ReportKind
from dist_esm.distributed import World
from dist_esm.jobs.report.content import Ending, Report
from dist_esm.jobs.report.draw import draw_page
from dist_esm.jobs.report.make import fail_what_vanished, make_report
from dist_esm.jobs.report.summary import summary
from dist_esm.jobs.report.write import UNDER_WAY, describe_launch, write_report
from dist_esm.outputs import events, journal, launches
from dist_esm.outputs.format_version import REMEDY
from dist_esm.outputs.journal import Entry
from dist_esm.outputs.output_dir import lock
from dist_esm.outputs.trust import refuse_strange_files
from dist_esm.planning.agree import results_in_journal
from dist_esm.planning.recorded import plan_of
from dist_esm.progress import Phase
from dist_esm.types import Failure, RankSummary, UnitFailure, UnitOutcome, WorkerStatus

DIED = "it ended without a word: its processes were killed, or their host went down"


def rebuild(config: Config, world: World) -> int:
    """Write the report of the last launch into `output_dir` again, on rank 0.

    Returns
    -------
    int
        0.

    Raises
    ------
    RefusedError
        On every rank, if there is nothing to report on, or the report cannot be written.
    """
    report = world.all_or_none(lambda: rebuild_report(config.output_dir) if world.is_main else None)
    if report is not None:
        print(summary(report, config.output_dir, config.verbosity), flush=True)
        if config.report is ReportKind.html:
            draw_page(report, config.output_dir)
    return 0


def rebuild_report(output_dir: Path) -> Report:
    """Make the report of the last launch, and write it.

    A run that is under way writes a report of its own at its end, which must not be lost: so what it has told
    by then is looked at once more.

    Raises
    ------
    ValueError
        If there is no launch to report on, or one that cannot be understood.
    OSError
        If the report cannot be written.
    """
    refuse_strange_files(output_dir)
    launched = launches.launch_files(output_dir)
    if not launched:
        remedy = "name the output_dir of a run that has begun to embed"
        raise ValueError(f"output_dir={output_dir} holds no run to report on: {remedy}")
    with ExitStack() as held:
        try:
            held.enter_context(lock(output_dir))
            is_running = False
        except ValueError:
            is_running = True
        while True:
            try:
                report = report_of(output_dir, launched[-1], is_running)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"({type(error).__name__}: {error})"
                raise ValueError(
                    f"{launched[-1]}, or the events of that launch, cannot be understood {problem}: {REMEDY}"
                ) from None
            write_report(report, output_dir)
            if report.status != "running" or Told.of(output_dir, report.launch).ending is None:
                return report


@dataclass(frozen=True)
class Told:
    """What the ranks of a launch told in their events."""

    ranks: list[RankSummary]
    failures: list[tuple[str, int | None, Failure, float]]
    """Output, unit, failure and seconds; without a unit, of a file that could not be joined."""
    ending: Ending | None
    """None if rank 0 did not come to its end."""
    last: float
    """Unix time of the last event."""

    @classmethod
    def of(cls, output_dir: Path, launch: int) -> Told:
        """Read what was told.

        Raises
        ------
        ValueError
            If it cannot be understood, in one line that names the folder.
        """
        try:
            return cls._of(output_dir, launch)
        except (KeyError, TypeError, AttributeError) as error:
            where = events.folder(output_dir)
            problem = f"{where} cannot be understood ({type(error).__name__}: {error})"
            raise ValueError(f"{problem}: {REMEDY}") from None

    @classmethod
    def _of(cls, output_dir: Path, launch: int) -> Told:
        by_rank = events.read(output_dir, launch)
        everything = [event for told in by_rank.values() for event in told]
        failures = [
            (event["file"], event.get("unit"), Failure(**event["failure"]), event.get("seconds", 0.0))
            for event in everything
            if event["event"] == "fail"
        ]
        names = [field.name for field in fields(Ending)]
        endings = [event for event in everything if event["event"] == "conclude"]
        ending = Ending(**{name: endings[-1][name] for name in names}) if endings else None
        ranks = [summary_of(rank, told) for rank, told in by_rank.items() if told]
        return cls(ranks, failures, ending, max((event["at"] for event in everything), default=0.0))


def summary_of(rank: int, told: Sequence[Mapping[str, Any]]) -> RankSummary:
    """Return a rank's own account of its work; of a rank that died, what its events say of it."""
    of_kind = {event["event"]: event for event in told}
    names = [field.name for field in fields(RankSummary)]
    if "summary" in of_kind:
        told_of_itself = of_kind["summary"]
        return RankSummary(**{name: told_of_itself[name] for name in names if name in told_of_itself})
    start, sample = of_kind.get("start", {}), of_kind.get("sample", {})
    began = [event["at"] for event in told if event.get("phase") == Phase.embedding.name]
    return RankSummary(
        rank=rank,
        host=start.get("host", ""),
        device=start.get("device", ""),
        status=WorkerStatus.FAILED.name,
        seconds=round(told[-1]["at"] - began[0], 3) if began else 0.0,
        tokens=sample.get("tokens", 0),
        split_packs=0,
        recomputed=0,
        waits={name: sample.get(name, 0.0) for name in ("waited_for_input", "waited_for_output")},
        startup={},
        outcomes=[],
    )


def report_of(output_dir: Path, launch_file: Path, is_running: bool) -> Report:
    """Make the report of a launch.

    Raises
    ------
    ValueError
        If its records cannot be understood.
    """
    about = launches.read_launch(launch_file)
    if "plan" not in about:
        remedy = "start the same command again, which writes a report"
        raise ValueError(f"{launch_file} is of an earlier dist_esm, which kept too little of it: {remedy}")
    launch = about["launch"]
    told = Told.of(output_dir, launch)
    entries = journal.read(output_dir)
    of_launch = journal.read(output_dir, launch)
    earlier = [entry for entry in entries[: len(entries) - len(of_launch)] if is_there(entry, output_dir)]
    plan = plan_of(about["plan"], launches.read_inputs(launch_file), earlier)
    results, joined_now = results_in_journal(of_launch, plan)
    joined = {**plan.joined, **joined_now}
    outcomes: list[UnitOutcome] = list(results)
    places = {str(file.output): index for index, file in enumerate(plan.files)}
    not_joined: dict[int, Failure] = {}
    for output, unit, failure, seconds in told.failures:
        if unit is None:
            not_joined[places[output]] = failure
        else:
            outcomes.append(UnitFailure(places[output], unit, failure, seconds))
    ending = told.ending or ending_without_word(about, told, is_running)
    report = make_report(plan, told.ranks, {**joined, **not_joined}, ending, outcomes)
    if told.ending is None and is_running:
        report.status = "running"
    describe_launch(report, about, launch)
    fail_what_vanished(report, output_dir)
    return report


def is_there(entry: Entry, output_dir: Path) -> bool:
    """Tell whether all outputs of an entry are there, or its shards, which go once they are joined."""
    return all((output_dir / written.path).exists() for written in entry.written)


def ending_without_word(about: Mapping[str, Any], told: Told, is_running: bool) -> Ending:
    """Say of a launch that has not come to its end what can be said: it ended with its last event."""
    began = [rank.seconds for rank in told.ranks]
    seconds = max(0.0, told.last - about["started"])
    return Ending(UNDER_WAY if is_running else DIED, seconds, max(began, default=0.0), {})
