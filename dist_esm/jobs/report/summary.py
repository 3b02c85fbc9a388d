"""The text at the end of a run: it fits a screen, and report.json has the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_esm.config import Verbosity
from dist_esm.jobs.report.again import command_again
from dist_esm.jobs.report.content import OUTCOMES, Report
from dist_esm.model.checkpoints.locate import RANDOM
from dist_esm.names import printable

MAX_RANKS, MAX_FAILURES, MAX_REMARKS, MAX_REASONS = 8, 5, 3, 6
"""Lines of a kind that are shown."""
MAX_LETTERS = 400
"""Letters of a line that a file's name or a message may take."""
TIMES = (
    ("load", "loading"),
    ("compile", "compiling"),
    ("count", "counting"),
    ("join", "joining"),
)
"""Words for phases of rank 0."""
EMBEDDED = ("ok", "truncated", "windowed")
"""Outcomes of records that have an embedding."""
NOTHING = "nothing was embedded: the inputs hold no protein that the policies let pass"
INDENT = "    "
REMEDIES = {
    "FastaError": "mend these files, or leave them out",
    "FileNotFoundError": "put these files back, or leave them out",
    "PermissionError": "make these files readable",
    "OutOfMemoryError": "give a smaller truncation_seq_length, or long=window",
    "FloatingPointError": "give dtype=fp32 and save_dtype=float32, and look at the weights",
}
"""What to do about a kind of failure, before the same command is given again."""


def summary(report: Report, output_dir: Path, verbosity: Verbosity = Verbosity.normal) -> str:
    """Return the run in a few lines, for people; under `quiet` one, if all went well."""
    head = lines_on_files(report, output_dir)
    if verbosity is Verbosity.quiet and report.status == "complete":
        return in_lines([*head[:1], *lines_on_nothing(report), *lines_on_weights(report)])
    lines = [
        *head,
        *lines_on_nothing(report),
        *lines_on_letters(report),
        *lines_on_ranks(report),
        *lines_on_time(report),
        *lines_on_weights(report),
        *lines_on_failures(report, output_dir),
        *lines_on_what_is_left(report),
        *lines_on_what_is_next(report, output_dir),
    ]
    return in_lines(lines)


def in_lines(lines: Iterable[str]) -> str:
    """Join lines, each of which stays one and is not too long, whatever names are in it.

    What is set in is for a shell or for Python, and stays whole.
    """
    return "\n".join(printable(line if line.startswith(INDENT) else clipped(line)) for line in lines)


def clipped(text: str) -> str:
    """Return the two ends of a text that is too long."""
    half = MAX_LETTERS // 2
    return text if len(text) <= MAX_LETTERS else f"{text[:half]} ... {text[-half:]}"


def lines_on_files(report: Report, output_dir: Path) -> list[str]:
    """Say how the run ended, and what became of files and proteins."""
    records = report.records
    resumed = sum(entry.resumed for entry in report.files)
    earlier = f" ({resumed} by earlier launches)" if resumed else ""
    in_parts = report.unfinished.get("sequences", 0)
    shown = {**records, "not_attempted": records["not_attempted"] - in_parts}
    outcomes = [f"{shown[outcome]} {outcome.replace('_', ' ')}" for outcome in OUTCOMES if shown[outcome]]
    lines = [
        f"{report.status}: {len(report.files)} of {report.num_files} files embedded{earlier} "
        f"in {report.seconds:.1f} s, outputs in {output_dir}"
    ]
    if records["in"]:
        residues = f"; {records['residues']} residues embedded" if records["residues"] else ""
        lines.append(f"proteins: {records['in']} read, {', '.join(outcomes) or '0 embedded'}{residues}")
    if in_parts:
        lines.append(
            f"in parts of {report.unfinished['files']} files that are not whole yet: {in_parts} proteins, "
            f"{report.unfinished['residues']} residues embedded and kept"
        )
    if records["deduplicated"]:
        lines.append(
            f"identical sequences: {records['deduplicated']} proteins took the embedding of one "
            "already computed"
        )
    return lines


def lines_on_nothing(report: Report) -> list[str]:
    """Say that a run came to its end and embedded nothing."""
    embedded = sum(report.records[outcome] for outcome in EMBEDDED)
    return [NOTHING] if report.status == "complete" and not embedded else []


def lines_on_letters(report: Report) -> list[str]:
    """Say what was changed in letters, which records were skipped, and which files a person should look
    at."""
    lines = []
    records = report.records
    if changed := {what: number for what, number in records["changed"].items() if what != "records"}:
        what_changed = ", ".join(f"{number} {what}" for what, number in changed.items() if number)
        lines.append(f"letters changed in {records['changed']['records']} proteins: {what_changed}")
    if skipped := records["skipped_by_reason"]:
        lines.append("skipped: " + most_common(skipped))
    remarks = [f"{entry.path}: {remark}" for entry in report.files for remark in entry.remarks]
    lines += [f"warning: {remark}" for remark in remarks[:MAX_REMARKS]]
    if len(remarks) > MAX_REMARKS:
        lines.append(f"and {len(remarks) - MAX_REMARKS} more warnings, all in report.json")
    if report.passed_over.get("files"):
        lines.append(f"passed over while searching: {report.passed_over['files']}, listed in report.json")
    return lines


def most_common(counts: Mapping[str, int]) -> str:
    """List reasons with their numbers, the most common first."""
    ordered = Counter(counts).most_common()
    more = len(ordered) - MAX_REASONS
    shown = [f"{number} {reason}" for reason, number in ordered[:MAX_REASONS] if number]
    return ", ".join(shown) + (f", and {more} other reasons" if more > 0 else "")


def lines_on_ranks(report: Report) -> list[str]:
    """Say how fast each rank was, the slowest if there are many, and all together."""
    tokens = sum(rank["tokens"] for rank in report.ranks)
    if not tokens:
        return []
    slowest = sorted(report.ranks, key=lambda rank: rank["tokens_per_second"])[:MAX_RANKS]
    shown = sorted(slowest, key=lambda rank: rank["rank"])
    lines = [line_on_rank(rank) for rank in shown]
    if len(report.ranks) > MAX_RANKS:
        lines.append(f"and {len(report.ranks) - MAX_RANKS} faster ranks, all in report.json")
    rate = f"{tokens / report.embedding_seconds:.0f} tokens/s"
    padding = sum(rank["padding"] for rank in report.ranks)
    padded = f"; {padding / (padding + tokens):.1%} padding" if padding else ""
    return [*lines, f"all ranks: {tokens} tokens, {rate} until all outputs were in place{padded}"]


def line_on_rank(rank: Mapping[str, Any]) -> str:
    """Say what a rank did, and where its time went."""
    split = f", {rank['split_packs']} packs split" if rank["split_packs"] else ""
    return (
        f"rank {rank['rank']} ({rank['device']}): {rank['status']}, {rank['sequences']} proteins, "
        f"{rank['tokens']} tokens in {rank['seconds']:.1f} s, {rank['tokens_per_second']:.0f} tokens/s{split}"
    )


def lines_on_time(report: Report) -> list[str]:
    """Say where the time went: of the steps of rank 0, and of the work of the mean rank."""
    num_ranks = len(report.ranks)
    times = [(word, report.phases.get(phase, 0.0)) for word, phase in TIMES]
    if num_ranks:
        waits = ("waited_for_input", "waited_for_output")
        of_ranks = {
            "compute": [rank["compute_seconds"] for rank in report.ranks],
            "write": [rank["write_seconds"] for rank in report.ranks],
            "wait": [sum(rank.get(name, 0.0) for name in waits) + report_wait(rank) for rank in report.ranks],
        }
        times += [(word, sum(seconds) / num_ranks) for word, seconds in of_ranks.items()]
    shown = [f"{word} {seconds:.1f} s" for word, seconds in times if seconds >= 0.05]
    mean = " (mean of the ranks for compute, write and wait)" if num_ranks > 1 else ""
    return [f"time{mean}: {', '.join(shown)}"] if shown else []


def report_wait(rank: Mapping[str, Any]) -> float:
    """Return the seconds for which a rank waited for the others at the end."""
    return float(rank["phases"].get("waiting", 0.0))


def lines_on_weights(report: Report) -> list[str]:
    """Warn if the numbers mean nothing."""
    if report.config.get("model", {}).get("weights") != RANDOM:
        return []
    return ["WEIGHTS ARE RANDOM: these embeddings mean nothing; they are for tests and benchmarks"]


def lines_on_failures(report: Report, output_dir: Path) -> list[str]:
    """Say what failed and why."""
    lines = [
        f"failed: {failure.path}: {failure.error_type}: {failure.error_message}"
        for failure in report.failed[:MAX_FAILURES]
    ]
    if len(report.failed) > MAX_FAILURES:
        kinds = most_common(Counter(failure.error_type for failure in report.failed))
        more = len(report.failed) - MAX_FAILURES
        lines.append(f"and {more} more failures, all in {output_dir / 'failed_files.txt'} ({kinds})")
    return lines


def lines_on_what_is_left(report: Report) -> list[str]:
    """Say why the run was stopped, and what it did not come to."""
    lines = []
    if report.reason:
        lines.append(f"stopped: {report.reason}")
    if report.not_attempted:
        lines.append(f"not attempted: {len(report.not_attempted)} files, listed in report.json")
    return lines


def lines_on_what_is_next(report: Report, output_dir: Path) -> list[str]:
    """Say what to do next: about failures, to go on, or to read the result."""
    lines = []
    again = command_again(report.config, len(report.ranks))
    if report.reason:
        lines += [
            "what is embedded is kept: run the same command again to go on from there:",
            f"{INDENT}{again}",
        ]
    elif report.failed:
        remedies = dict.fromkeys(
            REMEDIES[failure.error_type] for failure in report.failed if failure.error_type in REMEDIES
        )
        first = f"{'; '.join(remedies)}; then " if remedies else ""
        lines += [f"to try what failed again, {first}run the same command:", f"{INDENT}{again}"]
    page = output_dir / f"report.{report.config.get('report', 'json')}"
    lines.append(f"report: {page}, logs: {output_dir / '.dist_esm' / 'logs'}")
    if report.files:
        lines += ["read it back:", *(INDENT + line for line in reading(output_dir))]
    return lines


def reading(output_dir: Path) -> Sequence[str]:
    """Return three lines of Python that read the result."""
    return (
        "import dist_esm",
        f"run = dist_esm.load({str(output_dir)!r})",
        "run.ids, run.vectors  # N ids, and float32 of shape (N, D)",
    )
