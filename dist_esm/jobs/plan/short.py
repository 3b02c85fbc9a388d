"""The first lines of every run: what there is to do, of what the scan knows already."""

from __future__ import annotations

from dist_esm.config import Config, Long
from dist_esm.jobs.plan.room import Room
from dist_esm.jobs.plan.work import Output, Work, count_of
from dist_esm.jobs.progress.lines import duration
from dist_esm.jobs.setup import Setup
from dist_esm.launcher import num_cores
from dist_esm.model.memory import size_in_words
from dist_esm.model.speed import CPU_FLOPS, SOURCE, flops_of, known_figures
from dist_esm.model.weights import architecture
from dist_esm.planning.units import Plan
from dist_esm.types import LENGTH_EDGES

GROUPS = (100, 300, 500, 1000)
"""Lengths at which the short histogram is cut; all of them are edges of the long one."""
FATE_OF_LONG = {
    Long.truncate: "will be truncated",
    Long.skip: "will be skipped",
    Long.fail: "fail their files",
    Long.window: "will be embedded in windows",
}


def short_lines(
    plan: Plan, work: Work, output: Output, room: Room, config: Config, setup: Setup, device_name: str
) -> list[str]:
    """Return what a run is about to do, in a handful of lines.

    Parameters
    ----------
    plan
        What there is to do.
    work, output
        What is left of it, and what its outputs take.
    room
        What their file system has.
    config, setup
        Of the run.
    device_name
        Name of this rank's device.
    """
    return [
        line_on_inputs(plan),
        *lines_on_long(work, config),
        *lines_on_done(plan, work),
        line_on_output(output, work, room, config),
        line_on_ranks(plan, work, config, setup, device_name),
    ]


def line_on_inputs(plan: Plan) -> str:
    """Say what the inputs hold, and how long proteins are."""
    total = count_of(plan, range(len(plan.units)))
    head = f"{number_of(len(plan.files), 'file')}, {number_of(total.sequences, 'protein')}"
    if not total.sequences:
        return f"inputs: {head}"
    bins, edges = plan.lengths.bins, (0, *LENGTH_EDGES)
    shares = []
    for first, stop in zip((0, *GROUPS), (*GROUPS, None), strict=True):
        number = sum(
            records
            for records, edge in zip(bins, edges, strict=True)
            if edge >= first and (stop is None or edge < stop)
        )
        if number:
            name = f"{first}+" if stop is None else f"{first}-{stop - 1}"
            shares.append(f"{name}: {number / total.sequences:.0%}")
    return (
        f"inputs: {head}, {total.residues:,} residues, the longest {plan.lengths.longest:,}; "
        f"lengths {', '.join(shares)}"
    )


def lines_on_long(work: Work, config: Config) -> list[str]:
    """Say what becomes of long proteins, if there are any."""
    if not work.count.num_long:
        return []
    long = number_of(work.count.num_long, "protein")
    return [
        f"long: {long} of more than {config.truncation_seq_length} residues {FATE_OF_LONG[config.long]} "
        f"(long={config.long.name})"
    ]


def lines_on_done(plan: Plan, work: Work) -> list[str]:
    """Say what earlier launches did, and what is set aside."""
    lines = []
    if plan.done:
        before = count_of(plan, range(len(plan.units))).sequences - work.count.sequences
        lines.append(
            f"done by earlier launches: {len(plan.files) - work.files:,} of {len(plan.files):,} files, "
            f"{number_of(before, 'protein')}"
        )
    if plan.suspects:
        lines.append(f"alone, at the end: {number_of(len(plan.suspects), 'unit')} whose processes died")
    return lines


def line_on_output(output: Output, work: Work, room: Room, config: Config) -> str:
    """Say what will be written, and what room there is for it."""
    free = "" if room.num_bytes is None else f"; {size_in_words(room.num_bytes)} free"
    if output.files > work.outputs and room.inodes is not None:
        free += f" for {room.inodes:,} files"
    files = number_of(output.files, "file")
    return f"outputs: about {size_in_words(output.num_bytes)} in {files}, format={config.format.name}{free}"


def line_on_ranks(plan: Plan, work: Work, config: Config, setup: Setup, device_name: str) -> str:
    """Say how the work is shared out, and how long it takes on a device that is known."""
    units = [len(own) for own in plan.bins]
    ranks = f"{number_of(len(units), 'rank')}, {min(units)} to {max(units)} units each"
    if len(units) == 1:
        ranks = f"1 rank, {number_of(units[0], 'unit')}"
    else:
        ranks += f", {balance_of(plan):.0%} balanced"
    seconds, source = seconds_on_known(work, config, setup, len(units), device_name)
    time = f"; about {duration(seconds)} to embed ({source})" if seconds is not None else ""
    return f"ranks: {ranks}{time}"


def seconds_on_known(
    work: Work, config: Config, setup: Setup, num_ranks: int, device_name: str
) -> tuple[float | None, str]:
    """Return how long a device takes whose speed is known, and where that is from; None for others."""
    tokens = work.count.seen + 2 * work.count.sequences
    if setup.device.type == "cuda":
        figures = known_figures(config.model.name, device_name)
        if not figures or setup.precision.itemsize != 2:
            return None, ""
        return tokens / (figures[0].tokens_per_second * num_ranks), f"from {SOURCE}"
    arch = architecture(config.model)
    flops = flops_of(arch, max(config.resolved_layers()), tokens, work.count.squares)
    return flops / (CPU_FLOPS * num_cores()), f"by the speed of a CPU in {SOURCE}"


def balance_of(plan: Plan) -> float:
    """Return the mean cost of a bin as a share of the largest; 1 if there is nothing to do."""
    costs = [sum(plan.costs[index] for index in own) for own in plan.bins]
    return sum(costs) / (len(costs) * max(costs)) if max(costs, default=0) else 1.0


def number_of(number: int, what: str) -> str:
    """Return a number with what it counts, in the plural where it is one."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
