"""What `job=plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dist_esm.config import Config
from dist_esm.jobs.plan.calibration import Calibration
from dist_esm.jobs.plan.reading import Reading
from dist_esm.jobs.plan.room import Room
from dist_esm.jobs.plan.short import (
    balance_of,
    line_on_output,
    lines_on_done,
    lines_on_long,
    number_of,
)
from dist_esm.jobs.plan.work import Output, Work, count_of
from dist_esm.jobs.progress.lines import duration
from dist_esm.jobs.report.summary import MAX_FAILURES, MAX_RANKS, MAX_REMARKS, clipped, most_common
from dist_esm.model.memory import size_in_words
from dist_esm.model.speed import SOURCE, flops_of, known_figures
from dist_esm.model.weights import architecture
from dist_esm.names import printable
from dist_esm.planning.inputs import Inputs
from dist_esm.planning.units import Plan
from dist_esm.types import LENGTH_EDGES, Tally

BAR = 40
"""Signs of the longest bar of the histogram."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank says of its part."""

    host: str
    device: str
    reading: Reading
    calibration: Calibration | None
    """None if it has nothing to do."""
    memory_total: int | None
    memory_free: int | None
    model_bytes: int
    pack_bytes: int
    """Beside the model, about."""


@dataclass(frozen=True)
class Outlook:
    """All that is known of the run to come."""

    plan: Plan
    inputs: Inputs
    work: Work
    output: Output
    room: Room
    config: Config
    weights: str
    """In words."""
    ranks: Sequence[RankPlan]


def plan_text(outlook: Outlook) -> str:
    """Return the plan for people, a line for each thing worth knowing."""
    lines = [
        *lines_on_inputs(outlook),
        *lines_on_lengths(outlook.plan),
        *lines_on_done(outlook.plan, outlook.work),
        *lines_on_policies(outlook),
        *lines_on_failures(outlook),
        *lines_on_remarks(outlook),
        f"weights: {outlook.weights}",
        line_on_output(outlook.output, outlook.work, outlook.room, outlook.config),
        *lines_on_ranks(outlook),
        *lines_on_memory(outlook.ranks),
        *lines_on_time(outlook),
    ]
    return "\n".join(printable(clipped(line)) for line in lines)


def lines_on_inputs(outlook: Outlook) -> list[str]:
    """Say what the inputs hold, and what a search passed over."""
    plan = outlook.plan
    total = count_of(plan, range(len(plan.units)))
    lines = [
        f"inputs: {number_of(len(plan.files), 'file')}, {number_of(total.sequences, 'protein')}, "
        f"{total.residues:,} residues, the longest {plan.lengths.longest:,}"
    ]
    summary = outlook.inputs.summary()
    return [*lines, summary] if summary else lines


def lines_on_lengths(plan: Plan) -> list[str]:
    """Return a histogram of the lengths of all records, as the scan sees them."""
    bins = plan.lengths.bins
    most = max(bins)
    if not most:
        return []
    edges = (0, *LENGTH_EDGES)
    names = [f"{first}-{stop - 1}" for first, stop in pairwise(edges)]
    names = ["0", *names[1:], f"{edges[-1]}+"]
    first = next(place for place, number in enumerate(bins) if number)
    last = max(place for place, number in enumerate(bins) if number)
    widest = len(f"{most:,}")
    return ["lengths:"] + [
        f"{names[place]:>13} {bins[place]:>{widest},} {'#' * round(BAR * bins[place] / most)}".rstrip()
        for place in range(first, last + 1)
    ]


def lines_on_policies(outlook: Outlook) -> list[str]:
    """Say what becomes of records that are not embedded as they are, exactly or by a sample."""
    work, config = outlook.work, outlook.config
    if not work.count.sequences:
        return []
    readings = [rank.reading for rank in outlook.ranks]
    tally = tally_of(readings)
    tokens = sum(reading.tokens for reading in readings)
    saved = sum(reading.saved_tokens for reading in readings)
    is_all = all(reading.is_all for reading in readings)
    scope = "all that is left to do was read"
    if not is_all:
        share = tally.sequences / work.count.sequences
        scope = f"by a sample of {tally.sequences:,} of {work.count.sequences:,} proteins, {share:.1%}"
    lines = [*lines_on_long(work, config), f"letters, skipped and identical proteins: {scope}"]
    changed = {what: number for what, number in tally.changed.items() if what != "records" and number}
    if changed:
        letters = ", ".join(f"{number:,} {what}" for what, number in changed.items())
        lines.append(f"  changed: {number_of(tally.changed['records'], 'protein')} ({letters})")
    if tally.skipped:
        number = sum(tally.skipped.values())
        lines.append(f"  skipped: {number_of(number, 'protein')} ({most_common(tally.skipped)})")
    if not changed and not tally.skipped:
        lines.append("  none is changed or skipped")
    if tally.deduplicated:
        least = "" if is_all else "at least "
        share = saved / max(1, saved + tokens)
        lines.append(
            f"  identical: {least}{number_of(tally.deduplicated, 'protein')} with the sequence of one before "
            f"on the same rank, which saves {share:.1%} of the tokens"
        )
    return lines


def tally_of(readings: Sequence[Reading]) -> Tally:
    """Return the counts of all ranks together."""
    tally = Tally()
    for reading in readings:
        tally.add(reading.tally)
    return tally


def lines_on_failures(outlook: Outlook) -> list[str]:
    """Say which files will fail, and why."""
    failures = dict(failure for rank in outlook.ranks for failure in rank.reading.failures)
    failures |= {item.failure.path: item.failure.error_message for item in outlook.plan.quarantined}
    lines = [f"will fail: {path}: {reason}" for path, reason in sorted(failures.items())[:MAX_FAILURES]]
    more = len(failures) - MAX_FAILURES
    return [*lines, f"and {number_of(more, 'more file')}"] if more > 0 else lines


def lines_on_remarks(outlook: Outlook) -> list[str]:
    """Say which files look as if they held no proteins, and which hold nothing."""
    remarks = {str(outlook.plan.files[file].path): remark for file, remark in outlook.plan.remarks.items()}
    found: dict[str, list[int]] = {}
    for rank in outlook.ranks:
        for path, numbers in rank.reading.nucleotides.items():
            known = found.setdefault(path, [0, 0])
            found[path] = [mine + more for mine, more in zip(known, numbers, strict=True)]
    read = {
        path: f"looks like DNA: {number:,} of {of:,} records; embed its proteins instead"
        for path, (number, of) in found.items()
        if 2 * number > of
    }
    remarks |= read
    for index, file in enumerate(outlook.plan.files):
        units = outlook.plan.units_of(index)
        if not any(unit.count.sequences for unit in units) and not units[0].unreadable:
            remarks[str(file.path)] = "holds no record"
    lines = [f"warning: {path} {remark}" for path, remark in sorted(remarks.items())[:MAX_REMARKS]]
    more = len(remarks) - MAX_REMARKS
    return [*lines, f"and {number_of(more, 'more warning')}"] if more > 0 else lines


def lines_on_ranks(outlook: Outlook) -> list[str]:
    """Say what each rank gets, the most loaded if there are many, and how even that is."""
    plan, unit = outlook.plan, outlook.config.assign_by.name
    costs = [sum(plan.costs[index] for index in own) for own in plan.bins]
    shown = sorted(sorted(range(len(costs)), key=lambda rank: -costs[rank])[:MAX_RANKS])
    lines = [
        f"rank {rank} ({outlook.ranks[rank].device}): {number_of(len(plan.bins[rank]), 'unit')}, "
        f"{cost_in_words(costs[rank], unit)}"
        for rank in shown
    ]
    if len(costs) > 1:
        lines.append(f"balance: {balance_of(plan):.1%} (the mean of the ranks' costs over the largest)")
    return lines


def cost_in_words(cost: int, unit: str) -> str:
    """Return a cost, exact unless it is too long to read."""
    return f"{cost:,} {unit}" if cost < 10**12 else f"{cost:.3g} {unit}"


def lines_on_memory(ranks: Sequence[RankPlan]) -> list[str]:
    """Say what a rank needs of its device's memory, and what that has."""
    rank = ranks[0]
    peak = rank.calibration.peak_bytes if rank.calibration is not None else None
    if peak is not None:
        needed = f"{size_in_words(peak)} with packs on their way (measured)"
    else:
        needed = f"about {size_in_words(rank.model_bytes + rank.pack_bytes)} with what is in hand"
    has = "" if rank.memory_total is None else f"; {rank.device} has {size_in_words(rank.memory_total)}"
    free = "" if rank.memory_free is None else f", {size_in_words(rank.memory_free)} free"
    each = " for each rank" if len(ranks) > 1 else ""
    return [f"memory{each}: {size_in_words(rank.model_bytes)} for the model, {needed}{has}{free}"]


def lines_on_time(outlook: Outlook) -> list[str]:
    """Say how long embedding will take, as measured here and on devices that are known."""
    plan, config = outlook.plan, outlook.config
    arch, depth = architecture(config.model), max(1, *config.resolved_layers())
    flops, tokens = [], 0.0
    for rank, own in zip(outlook.ranks, plan.bins, strict=True):
        reading, seen = rank.reading, count_of(plan, own).seen
        scale = 1.0 if reading.is_all else seen / max(1, reading.seen)
        flops.append(scale * flops_of(arch, depth, reading.tokens, reading.squares))
        tokens += scale * reading.tokens
    if not tokens:
        return ["time: nothing to embed"]
    lines = []
    measured = [rank.calibration for rank in outlook.ranks if rank.calibration is not None]
    if measured and all(calibration.flops_per_second for calibration in measured):
        speeds = [rank.calibration.flops_per_second if rank.calibration else 0.0 for rank in outlook.ranks]
        busy = [work / speed for work, speed in zip(flops, speeds, strict=True) if speed]
        seconds = sum(flops) / sum(speeds) if config.steal else max(busy)
        first = measured[0]
        part = "" if first.layers == first.of_layers else f" of {first.layers} of {first.of_layers} layers"
        lines.append(
            f"time: about {duration(seconds)} to embed {tokens:,.0f} tokens at {tokens / seconds:,.0f} "
            f"tokens/s (measured here for {first.seconds:.1f} s{part} on random weights; without the start)"
        )
    elif measured:
        lines.append(
            "time: not known, a pack does not fit in memory and would be split: set a smaller toks_per_batch"
        )
    name = outlook.ranks[0].device
    for figure in known_figures(config.model.name):
        if figure.device not in name:
            seconds = tokens / figure.tokens_per_second
            lines.append(
                f"time on one {figure.device}: about {duration(seconds)} at "
                f"{figure.tokens_per_second:,} tokens/s in bf16 (from {SOURCE})"
            )
    return lines
