"""What became of every file and record: report.json, failed_files.txt and the text at the end.

The counts of `records` add up: in = ok + truncated + windowed + skipped + failed + not_attempted.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dist_esm.atomic import atomically
from dist_esm.planning.units import Plan
from dist_esm.types import Failure, JoinedFile, RankSummary, RecordOutcome, Tally, UnitFailure, UnitOutcome


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
        Outcomes of ranks that can no longer speak for themselves.
    """
    outcomes = [*plan.done, *others, *(outcome for rank in ranks for outcome in rank.outcomes)]
    resumed = {(result.file, result.ordinal) for result in plan.done}
    failed = failures_by_file(outcomes) | {
        file: end for file, end in joined.items() if isinstance(end, Failure)
    }
    done: dict[int, list[Any]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.file, outcome.ordinal)):
        if not isinstance(outcome, UnitFailure):
            done.setdefault(outcome.file, []).append(outcome)
    total = Tally(outcomes={outcome.name: 0 for outcome in RecordOutcome})
    files, not_attempted, num_not_attempted = [], [], 0
    for number, file in enumerate(plan.files):
        units = plan.units_of(number)
        num_records = sum(unit.count.sequences for unit in units)
        results = done.get(number, [])
        if number in failed:
            total.outcomes["failed"] += num_records
        elif len(results) < len(units) or (units[0].is_shard and number not in joined):
            not_attempted.append(str(file.path))
            num_not_attempted += num_records
        else:
            tally = Tally()
            for result in results:
                tally.add(result.tally)
            whole = joined.get(number)
            if isinstance(whole, JoinedFile):
                tally.duplicate_ids = whole.duplicate_ids
            total.add(tally)
            pieces = [piece for result in results for piece in result.pieces]
            outputs = (
                [whole.written.path] if isinstance(whole, JoinedFile) else [piece.path for piece in pieces]
            )
            took = sum(result.seconds for result in results)
            truncated = tally.outcomes.get("truncated", 0)
            files.append(
                FileReport(
                    path=str(file.path),
                    output=outputs[0],
                    outputs=outputs,
                    sequences=tally.sequences,
                    residues=tally.residues,
                    truncated=truncated,
                    rank=results[0].rank,
                    seconds=round(took, 3),
                    units=len(units),
                    resumed=all((result.file, result.ordinal) in resumed for result in results),
                    tally=tally,
                    remarks=remarks_on(tally),
                )
            )
    status = "aborted" if reason is not None else "partial" if failed else "complete"
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
    failures, entries = [failed[file] for file in sorted(failed)], [rank_entry(rank) for rank in ranks]
    return Report(
        status,
        reason,
        files,
        failures,
        not_attempted,
        records,
        entries,
        round(seconds, 3),
        max(0.001, round(embedding_seconds, 3)),
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
    """Turn files whose outputs are no longer there into failures: nothing is called done that is not on disk."""
    for entry in list(report.files):
        gone = [output for output in entry.outputs if not (output_dir / output).exists()]
        if gone:
            report.files.remove(entry)
            report.failed.append(
                Failure(
                    entry.path,
                    "FileNotFoundError",
                    f"its output {gone[0]} was removed while the run was under way",
                    entry.rank,
                )
            )
            for outcome, number in entry.tally.outcomes.items():
                report.records[outcome] -= number
            report.records["failed"] += entry.tally.sequences
            report.records["residues"] -= entry.tally.residues
            report.records["in"] -= entry.tally.more_chains
            report.records["failed"] -= entry.tally.more_chains
            report.status = "partial" if report.status == "complete" else report.status


def rank_entry(rank: RankSummary) -> dict[str, Any]:
    """A rank's account as report.json has it."""
    results = [outcome for outcome in rank.outcomes if not isinstance(outcome, UnitFailure)]
    return {
        "rank": rank.rank,
        "host": rank.host,
        "device": rank.device,
        "status": rank.status,
        "files": len({result.file for result in results}),
        "sequences": sum(result.tally.sequences for result in results),
        "tokens": rank.tokens,
        "seconds": round(rank.seconds, 3),
        "tokens_per_second": round(rank.tokens / rank.seconds, 1) if rank.seconds else 0.0,
        "split_packs": rank.split_packs,
        "recomputed": rank.recomputed,
        **{name: round(seconds, 3) for name, seconds in (rank.waits | rank.startup).items()},
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("dist_esm", "torch", "fair-esm", "biopython", "hydra-core", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_report(report: Report, output_dir: Path) -> None:
    """Write report.json, and failed_files.txt with a line ``path|error_type|error_message`` for each failure."""
    with atomically(output_dir / "failed_files.txt") as beside:
        lines = [
            f"{failure.path}|{failure.error_type}|{failure.error_message}\n" for failure in report.failed
        ]
        beside.write_text(
            "".join(lines), encoding="utf-8", errors="backslashreplace"
        )  # a path may be any bytes
    content = asdict(report)
    for entry in content["files"]:
        tally = entry.pop("tally")
        entry["records"] = tally["outcomes"]
        entry |= {
            key: tally[key]
            for key in (
                "skipped",
                "changed",
                "replaced",
                "duplicate_ids",
                "unnamed",
                "windows",
                "deduplicated",
            )
        }
    with atomically(output_dir / "report.json") as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(report: Report, output_dir: Path) -> str:
    """The run in a few lines, for people."""
    records = report.records
    num_files = len(report.files) + len(report.failed) + len(report.not_attempted)
    tokens = sum(rank["tokens"] for rank in report.ranks)
    resumed = sum(entry.resumed for entry in report.files)
    earlier = f" ({resumed} by earlier launches)" if resumed else ""
    lines = [
        f"{report.status}: {len(report.files)} of {num_files} files embedded{earlier} in {report.seconds:.1f} s, outputs in {output_dir}",
        f"proteins: {records['in']} read, "
        + ", ".join(
            f"{records[key]} {key}"
            for key in ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")
            if records[key] or key == "ok"
        )
        + f"; {records['residues']} residues embedded",
    ]
    if records["deduplicated"]:
        lines.append(
            f"identical sequences: {records['deduplicated']} proteins took the embedding of one already computed"
        )
    if changed := {key: number for key, number in records["changed"].items() if key != "records"}:
        lines.append(
            f"letters changed in {records['changed']['records']} proteins: "
            + ", ".join(f"{number} {key}" for key, number in changed.items() if number)
        )
    if skipped := records["skipped_by_reason"]:
        lines.append("skipped: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()))
    remarked = [entry for entry in report.files if entry.remarks]
    lines += [f"warning: {entry.path}: {remark}" for entry in remarked[:20] for remark in entry.remarks]
    if len(remarked) > 20:
        lines.append(f"and {len(remarked) - 20} more files with warnings, all in report.json")
    if report.passed_over.get("files"):
        lines.append(f"passed over while searching: {report.passed_over['files']}, listed in report.json")
    for rank in report.ranks:
        split = f", {rank['split_packs']} packs split" if rank["split_packs"] else ""
        speed = (
            f"{rank['tokens']} tokens in {rank['seconds']:.1f} s, {rank['tokens_per_second']:.0f} tokens/s"
        )
        lines += [
            f"rank {rank['rank']} ({rank['device']}): {rank['status']}, {rank['sequences']} proteins, {speed}{split}"
        ]
    if tokens:
        lines.append(
            f"all ranks: {tokens} tokens, {tokens / report.embedding_seconds:.0f} tokens/s until all outputs were in place"
        )
    if report.model.get("weights") == "random":
        lines.append("WEIGHTS ARE RANDOM: these embeddings mean nothing; they are for tests and benchmarks")
    if report.reason:
        lines += [
            f"stopped: {report.reason}",
            "what is embedded is kept: run the same command again to go on from there",
        ]
    lines += [
        f"failed: {failure.path}: {failure.error_type}: {failure.error_message}"
        for failure in report.failed[:20]
    ]
    if len(report.failed) > 20:
        lines.append(f"and {len(report.failed) - 20} more failures, all in failed_files.txt")
    if report.not_attempted:
        lines.append(f"not attempted: {len(report.not_attempted)} files, listed in report.json")
    return "\n".join(lines)
