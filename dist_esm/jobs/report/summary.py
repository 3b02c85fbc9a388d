"""The text at the end of a run."""

from __future__ import annotations

from pathlib import Path

from dist_esm.jobs.report.content import OUTCOMES, Report
from dist_esm.model.checkpoints.locate import RANDOM

MAX_SHOWN = 20
"""Failures, and files with warnings, in the summary."""


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
