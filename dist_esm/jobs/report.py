"""What became of every file and record: report.json, failed_files.txt and the text at the end.

The counts of `records` add up: in = ok + truncated + windowed + skipped + failed + not_attempted. They decide
the status, not the absence of errors: a run is complete only if every record has an outcome.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dist_esm.atomic import atomically
from dist_esm.config import Config, plain_values
from dist_esm.jobs.setup import Setup
from dist_esm.model.checkpoints.locate import RANDOM, locate
from dist_esm.outputs.output_dir import OutputDir
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
from dist_esm.version import code_version

FORMAT_VERSION = 2
"""Of report.json; reports without one are of version 1. Raise it when a key changes its meaning or goes."""
MAX_SHOWN = 20
"""Failures, and files with warnings, in the summary."""
OUTCOMES = ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")


@dataclass(frozen=True)
class FileReport:
    """A file whose output is in place."""

    path: str
    output: str
    """Relative to `output_dir`; of a file in numbered parts, the first."""
    outputs: list[str]
    """All of them, in order."""
    sequences: int
    residues: int
    truncated: int
    rank: int
    seconds: float
    units: int
    resumed: bool
    """An earlier launch finished it."""
    tally: Tally
    remarks: list[str]
    """Things about its records that a person should look at."""


@dataclass
class Report:
    """The whole run, as rank 0 writes it."""

    status: str
    """`running`, `complete`, `partial` or `aborted`."""
    reason: str | None
    files: list[FileReport]
    failed: list[Failure]
    not_attempted: list[str]
    records: dict[str, Any]
    ranks: list[dict[str, Any]]
    seconds: float
    embedding_seconds: float
    """From when every rank had its model until every output was in place."""
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    kernels: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    launch: int = 0
    """Counts the launches into the output directory."""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    """Unix time."""
    passed_over: dict[str, Any] = field(default_factory=dict)
    """Files that a search for inputs saw and did not take: how many, by reason, and the first of them."""

    @property
    def exit_code(self) -> int:
        """0 complete, 2 partial, 1 aborted."""
        return {"complete": 0, "partial": 2, "aborted": 1}[self.status]


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
    reason: str | None,
    seconds: float,
    embedding_seconds: float,
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
    reason
        Why the run was stopped, if it was.
    seconds
        Wall time of the run.
    embedding_seconds
        Of it, without finding files, loading and planning.
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
    for index, file in enumerate(plan.files):
        units = plan.units_of(index)
        num_records = sum(unit.count.sequences for unit in units)
        results, whole = done.get(index, []), joined.get(index)
        if index in failed:
            total.outcomes["failed"] += num_records
        elif len(results) < len(units) or (units[0].is_shard and whole is None):
            not_attempted.append(str(file.path))
            num_not_attempted += num_records
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
    reason = reason or records_without_outcome(records, num_not_attempted)
    return Report(
        status="aborted" if reason is not None else "partial" if failed else "complete",
        reason=reason,
        files=files,
        failed=[failed[file] for file in sorted(failed)],
        not_attempted=not_attempted,
        records=records,
        ranks=[rank_entry(rank, of_this_launch) for rank in ranks],
        seconds=round(seconds, 3),
        embedding_seconds=max(0.001, round(embedding_seconds, 3)),
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
    """Return what a person should look at in a file: text that is probably no protein."""
    num_embedded = tally.sequences - tally.outcomes.get("skipped", 0)
    remarks = []
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
        **{name: round(seconds, 3) for name, seconds in (rank.waits | rank.startup).items()},
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "fair-esm", "biopython", "hydra-core", "numpy")
    ours = {"python": platform.python_version(), "dist_esm": code_version()}
    return ours | {name: version(name) for name in names}


def describe_run(report: Report, config: Config, setup: Setup, out: OutputDir) -> None:
    """Add what the run was: configuration, model, kernels and versions."""
    report.launch = out.launch
    report.config = plain_values(config)
    weights = config.model.weights or str(locate(config.model))
    report.model = {"name": config.model.name, "weights_from": weights, **setup.provenance}
    report.kernels = str(setup.kernels)
    report.versions = versions()


def write_running_report(plan: Plan, out: OutputDir, setup: Setup, config: Config) -> None:
    """Put a report of status `running` in the place of an earlier one, until this launch has one of its own.

    It stays when rank 0 dies, so that nobody takes an earlier launch's report for this one's.
    """
    report = make_report(plan, [], plan.joined, "under way, or rank 0 died", 0.0, 0.0)
    report.status = "running"
    report.host, report.pid, report.started = socket.gethostname(), os.getpid(), round(time.time(), 3)
    describe_run(report, config, setup, out)
    (out.path / "failed_files.txt").unlink(missing_ok=True)
    write_json(report, out.path, out.scratch)


def write_report(report: Report, output_dir: Path, scratch: Path | None = None) -> None:
    """Write report.json, and failed_files.txt with a line ``path|error_type|error_message`` for each
    failure."""
    lines = [f"{failure.path}|{failure.error_type}|{failure.error_message}\n" for failure in report.failed]
    with atomically(output_dir / "failed_files.txt", scratch) as beside:
        # A path may be any bytes.
        beside.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    write_json(report, output_dir, scratch)


def write_json(report: Report, output_dir: Path, scratch: Path | None) -> None:
    """Write report.json."""
    content = {"format_version": FORMAT_VERSION, **asdict(report)}
    for entry in content["files"]:
        tally = entry.pop("tally")
        entry["records"] = tally["outcomes"]
        for key in (
            "skipped",
            "changed",
            "replaced",
            "duplicate_ids",
            "unnamed",
            "windows",
            "deduplicated",
        ):
            entry[key] = tally[key]
    with atomically(output_dir / "report.json", scratch) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def lines_on_letters(report: Report) -> list[str]:
    """What the summary says of letters, of skipped records, and of files that a person should look at."""
    lines = []
    records = report.records
    if changed := {what: number for what, number in records["changed"].items() if what != "records"}:
        what_changed = ", ".join(f"{number} {what}" for what, number in changed.items() if number)
        lines.append(f"letters changed in {records['changed']['records']} proteins: {what_changed}")
    if skipped := records["skipped_by_reason"]:
        lines.append("skipped: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()))
    remarked = [entry for entry in report.files if entry.remarks]
    lines += [
        f"warning: {entry.path}: {remark}" for entry in remarked[:MAX_SHOWN] for remark in entry.remarks
    ]
    if len(remarked) > MAX_SHOWN:
        lines.append(f"and {len(remarked) - MAX_SHOWN} more files with warnings, all in report.json")
    if report.passed_over.get("files"):
        lines.append(f"passed over while searching: {report.passed_over['files']}, listed in report.json")
    return lines


def summary(report: Report, output_dir: Path) -> str:
    """The run in a few lines, for people."""
    records = report.records
    num_files = len(report.files) + len(report.failed) + len(report.not_attempted)
    tokens = sum(rank["tokens"] for rank in report.ranks)
    resumed = sum(entry.resumed for entry in report.files)
    earlier = f" ({resumed} by earlier launches)" if resumed else ""
    outcomes = [
        f"{records[outcome]} {outcome}" for outcome in OUTCOMES if records[outcome] or outcome == "ok"
    ]
    lines = [
        f"{report.status}: {len(report.files)} of {num_files} files embedded{earlier} "
        f"in {report.seconds:.1f} s, outputs in {output_dir}",
        f"proteins: {records['in']} read, {', '.join(outcomes)}; {records['residues']} residues embedded",
    ]
    if records["deduplicated"]:
        lines.append(
            f"identical sequences: {records['deduplicated']} proteins took the embedding of one "
            "already computed"
        )
    lines += lines_on_letters(report)
    for rank in report.ranks:
        split = f", {rank['split_packs']} packs split" if rank["split_packs"] else ""
        who = f"rank {rank['rank']} ({rank['device']}): {rank['status']}, {rank['sequences']} proteins"
        speed = (
            f"{rank['tokens']} tokens in {rank['seconds']:.1f} s, {rank['tokens_per_second']:.0f} tokens/s"
        )
        lines.append(f"{who}, {speed}{split}")
    if tokens:
        rate = f"{tokens / report.embedding_seconds:.0f} tokens/s"
        lines.append(f"all ranks: {tokens} tokens, {rate} until all outputs were in place")
    if report.model.get("weights_from") == RANDOM:
        lines.append("WEIGHTS ARE RANDOM: these embeddings mean nothing; they are for tests and benchmarks")
    if report.reason:
        lines.append(f"stopped: {report.reason}")
        lines.append("what is embedded is kept: run the same command again to go on from there")
    shown = report.failed[:MAX_SHOWN]
    lines += [f"failed: {failure.path}: {failure.error_type}: {failure.error_message}" for failure in shown]
    if len(report.failed) > MAX_SHOWN:
        lines.append(f"and {len(report.failed) - MAX_SHOWN} more failures, all in failed_files.txt")
    if report.not_attempted:
        lines.append(f"not attempted: {len(report.not_attempted)} files, listed in report.json")
    return "\n".join(lines)
