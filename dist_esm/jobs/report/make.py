"""Combine what the ranks say to one report.

The counts of `records` add up: in = ok + truncated + windowed + skipped + failed + not_attempted. They decide
the status, not the absence of errors: a run is complete only if every record has an outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_esm.jobs.report.content import OUTCOMES, Ending, FileReport, Report
from dist_esm.planning.units import Plan
from dist_esm.types import (
    Failure,
    JoinedFile,
    RankSummary,
    RecordOutcome,
    Tally,
    UnitFailure,
    UnitOutcome,
    UnitResult,
)


def failures_by_file(outcomes: Sequence[UnitOutcome]) -> dict[int, Failure]:
    """The first failure of each file that has one."""
    failed: dict[int, Failure] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.file, outcome.ordinal)):
        if isinstance(outcome, UnitFailure):
            failed.setdefault(outcome.file, outcome.failure)
    return failed


def make_report(
    plan: Plan,
    ranks: Sequence[RankSummary],
    joined: Mapping[int, JoinedFile | Failure],
    ending: Ending,
    others: Sequence[UnitOutcome] = (),
) -> Report:
    """Combine what the ranks say.

    Parameters
    ----------
    plan
        What there was to do.
    ranks
        What each rank did.
    joined
        For each file that was cut and joined, its output, or why it could not be joined.
    ending
        How the launch ended, and when.
    others
        Outcomes of this launch that no rank has told.

    Returns
    -------
    Report
        Its status is `complete` only if no file failed and every record has an outcome.
    """
    of_this_launch = [*others, *plan.quarantined, *(outcome for rank in ranks for outcome in rank.outcomes)]
    outcomes = sorted([*plan.done, *of_this_launch], key=lambda outcome: (outcome.file, outcome.ordinal))
    resumed = {(result.file, result.ordinal) for result in plan.done}
    failed = failures_by_file(outcomes)
    failed |= {file: output for file, output in joined.items() if isinstance(output, Failure)}
    done: dict[int, list[UnitResult]] = {}
    for outcome in outcomes:
        if isinstance(outcome, UnitResult):
            done.setdefault(outcome.file, []).append(outcome)
    total = Tally(outcomes={outcome.name: 0 for outcome in RecordOutcome})
    files, not_attempted, num_not_attempted = [], [], 0
    unfinished = {"files": 0, "sequences": 0, "residues": 0}
    for index, file in enumerate(plan.files):
        units = plan.units_of(index)
        num_records = sum(unit.count.sequences for unit in units)
        results, whole = done.get(index, []), joined.get(index)
        if index in failed:
            total.outcomes["failed"] += num_records
        elif len(results) < len(units) or (units[0].is_shard and whole is None):
            not_attempted.append(str(file.path))
            num_not_attempted += num_records
            unfinished["files"] += bool(results)
            unfinished["sequences"] += sum(result.tally.sequences for result in results)
            unfinished["residues"] += sum(result.tally.residues for result in results)
        else:
            is_resumed = all((result.file, result.ordinal) in resumed for result in results)
            entry = file_entry(str(file.path), results, whole, is_resumed)
            total.add(entry.tally)
            files.append(entry)
    records = {
        "in": sum(unit.count.sequences for unit in plan.units) + total.more_chains,
        **total.outcomes,
        "not_attempted": num_not_attempted,
        "skipped_by_reason": total.skipped,
        "changed": total.changed,
        "replaced_letters": total.replaced,
        "residues": total.residues,
        "duplicate_ids": total.duplicate_ids,
        "unnamed": total.unnamed,
        "windows": total.windows,
        "more_chains": total.more_chains,
        "latin1_headers": total.latin1,
        "nucleotides": total.nucleotides,
        "deduplicated": total.deduplicated,
    }
    reason = ending.reason or records_without_outcome(records, num_not_attempted)
    return Report(
        status="aborted" if reason is not None else "partial" if failed else "complete",
        reason=reason,
        files=files,
        failed=[failed[file] for file in sorted(failed)],
        not_attempted=not_attempted,
        records=records,
        ranks=[rank_entry(rank, of_this_launch) for rank in ranks],
        seconds=round(ending.seconds, 3),
        embedding_seconds=max(0.001, round(ending.embedding_seconds, 3)),
        phases={phase: round(seconds, 3) for phase, seconds in ending.phases.items()},
        unfinished=unfinished,
    )


def records_without_outcome(records: Mapping[str, Any], num_not_attempted: int) -> str | None:
    """Why a run that nobody stopped is not complete all the same; None if every record has an outcome."""
    accounted = sum(records[outcome] for outcome in OUTCOMES)
    if num_not_attempted:
        return (
            f"{num_not_attempted} of {records['in']} records have no outcome, though nothing stopped the run"
        )
    if accounted != records["in"]:
        return f"{records['in']} records were counted, but {accounted} have an outcome"
    return None


def file_entry(
    path: str, results: Sequence[UnitResult], whole: JoinedFile | Failure | None, is_resumed: bool
) -> FileReport:
    """A file that is done, given the results of its units, and its one output if it was cut and joined."""
    tally = Tally()
    for result in results:
        tally.add(result.tally)
    outputs = [written.path for result in results for written in result.files]
    if isinstance(whole, JoinedFile):
        tally.duplicate_ids = whole.duplicate_ids
        outputs = [whole.written.path]
    return FileReport(
        path=path,
        output=outputs[0],
        outputs=outputs,
        sequences=tally.sequences,
        residues=tally.residues,
        truncated=tally.outcomes.get("truncated", 0),
        rank=results[0].rank,
        seconds=round(sum(result.seconds for result in results), 3),
        units=len(results),
        resumed=is_resumed,
        tally=tally,
        remarks=remarks_on(tally),
    )


def remarks_on(tally: Tally) -> list[str]:
    """Return what a person should look at in a file: that it is empty, or text that is probably no
    protein."""
    num_embedded = tally.sequences - tally.outcomes.get("skipped", 0)
    remarks = [] if tally.sequences else ["holds no record"]
    if 2 * tally.nucleotides > num_embedded:
        remarks.append(f"looks like DNA: {tally.nucleotides:,} of {num_embedded:,} records")
    if tally.latin1:
        remarks.append(f"headers read as Latin-1, not UTF-8: {tally.latin1:,}")
    return remarks


def fail_what_vanished(report: Report, output_dir: Path) -> None:
    """Turn files whose outputs are no longer there into failures: nothing is called done that is not on
    disk."""
    for entry in list(report.files):
        gone = [output for output in entry.outputs if not (output_dir / output).exists()]
        if gone:
            message = f"its output {gone[0]} was removed while the run was under way"
            report.files.remove(entry)
            report.failed.append(Failure(entry.path, "FileNotFoundError", message, entry.rank))
            for outcome, num_records in entry.tally.outcomes.items():
                report.records[outcome] -= num_records
            report.records["failed"] += entry.tally.sequences
            report.records["residues"] -= entry.tally.residues
            report.records["in"] -= entry.tally.more_chains
            report.records["failed"] -= entry.tally.more_chains
            report.status = "partial" if report.status == "complete" else report.status


def rank_entry(rank: RankSummary, outcomes: Sequence[UnitOutcome]) -> dict[str, Any]:
    """A rank's account as report.json has it, given all outcomes of the launch."""
    results = [
        outcome for outcome in outcomes if isinstance(outcome, UnitResult) and outcome.rank == rank.rank
    ]
    return {
        "rank": rank.rank,
        "host": rank.host,
        "device": rank.device,
        "status": rank.status,
        "files": len({result.file for result in results}),
        "sequences": sum(result.tally.sequences for result in results),
        "taken_over": rank.taken_over,
        "tokens": rank.tokens,
        "seconds": round(rank.seconds, 3),
        "tokens_per_second": round(rank.tokens / rank.seconds, 1) if rank.seconds else 0.0,
        "split_packs": rank.split_packs,
        "recomputed": rank.recomputed,
        "ended_at": round(rank.ended_at, 3),
        "peak_memory_mib": round(rank.peak_memory_mib, 1),
        "padding": rank.padding,
        "compute_seconds": round(rank.compute_seconds, 3),
        "write_seconds": round(rank.write_seconds, 3),
        "phases": {phase: round(seconds, 3) for phase, seconds in rank.phases.items()},
        **{name: round(seconds, 3) for name, seconds in (rank.waits | rank.startup).items()},
    }
