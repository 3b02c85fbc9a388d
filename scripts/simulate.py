#!/usr/bin/env python3
"""Simulates how evenly work ends on 1 to 1,024 ranks, with the real assignment and claims; no model runs.

    scripts/simulate.py
    scripts/simulate.py --units 300000 --ranks 1024 --files uneven

Files of proteins are drawn from a fixed seed, with lengths of real proteins, and are cut, weighed and
assigned as a run does it. Each rank then works at the speed of its device: it claims a unit as soon as what
it has claimed and not embedded is less than a reader holds ahead of the device. The table has the share of
the ideal time, which is all work divided by the speed of all devices: 100% means that no device waited.
Files:

even        files of 100 proteins
uneven      files of 1 to thousands of proteins, 100 on average (log-normal, as files of metagenomes are)
few-large   three files with nine tenths of the proteins, which are cut into units as in a run, and small
            files with the rest

The work of a protein is that of its forward: linear and quadratic in its length, with the width of --width.
Reading, writing, start and the round trips of claims are left out. The lengths are those of the histogram
in this script, or of the FASTA file of --fasta. The goal is 98% for equal devices and up to 64 ranks over
`even` and `uneven` files; the exit code is 1 if it is missed. The last line is JSON.

What breaks first: on 64 ranks, large files that are cut into units of 1% of the bytes, because some ranks
get two of these and others one (--unit-share 0.001 mends it). With devices of unequal speed, what the
reader of a slow device has claimed ahead of it, because nobody can take that over (--ahead-tokens 0 shows
it).
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Table, begin, end, make_parser, parse_options
from dist_esm.config import AssignBy
from dist_esm.planning.assign import assign_to_bins, unit_cost
from dist_esm.planning.claims import ClaimOrder
from dist_esm.planning.units import unit_size
from dist_esm.types import Count, Slice, Unit

UNIREF90 = {
    13: 49, 50: 222, 75: 259, 100: 283, 125: 288, 150: 288, 175: 227, 200: 241, 225: 251, 250: 361,
    275: 330, 300: 280, 325: 194, 350: 304, 375: 169, 400: 277, 450: 239, 500: 175, 550: 127, 600: 144,
    700: 71, 800: 48, 900: 57, 1022: 52, 1200: 30, 1500: 22, 2000: 4, 4000: 8, 8001: 0,
}  # fmt: skip
"""Proteins from so many residues on, to the next key. 5,000 of UniRef90 (UniProt, CC BY 4.0), from the
sample in NVIDIA/bionemo-framework (esm2_native_te/train.parquet); mean 334, median 277."""
MAX_RESIDUES = 1022
PROTEINS_PER_FILE = 100
HEADER_BYTES = 60
AHEAD_TOKENS = 6 * 25_344
"""Read and not embedded yet, in packs of the 3B model: four in the reader's queue and two submitted."""
GOAL, GOAL_RANKS = 0.98, 64

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """The units of a run, and what each takes."""

    units: list[Unit]
    flops: list[float]
    """Of one layer, for each unit."""

    @property
    def total(self) -> float:
        """Of all units."""
        return math.fsum(self.flops)


def draw_lengths(num_proteins: int, rng: np.random.Generator, fasta: Path | None) -> Lengths:
    """Draw residues of proteins: from the histogram, or from the records of a file."""
    if fasta is not None:
        return rng.choice(fasta_lengths(fasta), num_proteins)
    least = np.array(list(UNIREF90))
    share = np.array(list(UNIREF90.values())[:-1])
    bins = rng.choice(len(share), num_proteins, p=share / share.sum())
    return rng.integers(least[bins], least[bins + 1])


def fasta_lengths(path: Path) -> Lengths:
    """Return the residues of each record of a plain FASTA file."""
    records = ("\n" + path.read_text(encoding="utf-8")).split("\n>")[1:]
    return np.array([sum(map(len, record.split("\n")[1:])) for record in records])


def even_files(num_files: int, rng: np.random.Generator) -> Lengths:
    """Return the proteins of each file: as many in each."""
    return np.full(num_files, PROTEINS_PER_FILE)


def uneven_files(num_files: int, rng: np.random.Generator) -> Lengths:
    """Return the proteins of each file: log-normal, 1 or more."""
    sigma = 1.3
    mean = math.log(PROTEINS_PER_FILE) - sigma**2 / 2
    return np.maximum(1, rng.lognormal(mean, sigma, num_files).astype(np.int64))


def few_large_files(num_files: int, rng: np.random.Generator) -> Lengths:
    """Return the proteins of each file: nine tenths in three files."""
    small = np.full(num_files // 10, PROTEINS_PER_FILE)
    return np.append(np.full(3, 3 * num_files * PROTEINS_PER_FILE // 10), small)


FILES: dict[str, Callable[[int, np.random.Generator], Lengths]] = {
    "even": even_files,
    "uneven": uneven_files,
    "few-large": few_large_files,
}


def make_work(proteins: Lengths, lengths: Lengths, unit_share: float, width: int) -> Work:
    """Cut files into units as a run does, and weigh them.

    Parameters
    ----------
    proteins
        Proteins of each file, shape (files,).
    lengths
        Residues of each protein, file by file, shape (proteins,).
    unit_share
        As the key of this name.
    width
        D of the model.
    """
    stops = np.cumsum(proteins)
    num_bytes = np.add.reduceat(lengths + HEADER_BYTES, stops - proteins)
    unit_bytes = unit_size(int(num_bytes.sum()), unit_share)
    kept = np.minimum(lengths, MAX_RESIDUES)
    tokens = kept + 2
    flops = 24.0 * width**2 * tokens + 4.0 * width * tokens**2
    units, unit_flops = [], []
    for file, (size, stop, num) in enumerate(zip(num_bytes, stops, proteins, strict=True)):
        num_slices = math.ceil(size / unit_bytes)
        for ordinal, own in enumerate(np.array_split(np.arange(stop - num, stop), num_slices)):
            part = slice(own[0], own[-1] + 1)
            count = Count(
                sequences=len(own),
                residues=int(lengths[part].sum()),
                squares=int((kept[part] ** 2).sum()),
                seen=int(kept[part].sum()),
            )
            units.append(Unit(file, ordinal, Slice(Path()), count, Count(), num_slices == 1))
            unit_flops.append(float(flops[part].sum()))
    return Work(units, unit_flops)


def equal_devices(num_ranks: int) -> list[float]:
    """Return the speed of each rank's device."""
    return [1.0] * num_ranks


def hot_devices(num_ranks: int) -> list[float]:
    """Return the speeds where every eighth device is throttled."""
    return [0.8 if rank % 8 == 7 else 1.0 for rank in range(num_ranks)]


def mixed_devices(num_ranks: int) -> list[float]:
    """Return the speeds of two generations of devices."""
    return [0.5 if rank % 2 else 1.0 for rank in range(num_ranks)]


def limping_device(num_ranks: int) -> list[float]:
    """Return the speeds where the last of several devices is ten times slower."""
    return [*[1.0] * (num_ranks - 1), 0.1 if num_ranks > 1 else 1.0]


DEVICES: dict[str, Callable[[int], list[float]]] = {
    "equal": equal_devices,
    "1 in 8 at 80%": hot_devices,
    "1 in 2 at 50%": mixed_devices,
    "last at 10%": limping_device,
}


def time_of_run(
    order: ClaimOrder, work: Work, speeds: Sequence[float], ahead: float, steal: bool
) -> tuple[float, int]:
    """Let ranks claim and work, and return when the last one ends, and the units that were taken over.

    Parameters
    ----------
    order
        Who takes which unit.
    work
        What the units take.
    speeds
        Work a second of each rank's device.
    ahead
        Work that a rank has claimed and not done when it claims its next unit.
    steal
        Whether ranks take over units of others.
    """
    counters = [0] * len(speeds)

    def claim(bin_: int) -> int:
        counters[bin_] += 1
        return counters[bin_] - 1

    ranks = [order.claims(rank, claim, lambda: counters, steal) for rank in range(len(speeds))]
    free_at, num_taken_over = [0.0] * len(speeds), 0
    asks = [(0.0, rank) for rank in range(len(speeds))]
    while asks:
        now, rank = heapq.heappop(asks)
        claimed = next(ranks[rank], None)
        if claimed is None:
            continue
        num_taken_over += claimed.bin != rank
        free_at[rank] = max(now, free_at[rank]) + work.flops[claimed.unit] / speeds[rank]
        heapq.heappush(asks, (max(now, free_at[rank] - ahead / speeds[rank]), rank))
    return max(free_at), num_taken_over


def simulate(
    work: Work, assign_by: AssignBy, num_ranks: int, devices: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Run the assignment alone, then with claims of others' units; return the shares of the ideal time."""
    began = time.perf_counter()
    costs = [unit_cost(unit, assign_by, options.width) for unit in work.units]
    bins = assign_to_bins(costs, [(f"{unit.file:07d}", unit.ordinal) for unit in work.units], num_ranks)
    order, speeds = ClaimOrder(bins, costs), DEVICES[devices](num_ranks)
    ideal = work.total / math.fsum(speeds)
    ahead = options.ahead_tokens * work.total / sum(unit.count.residues for unit in work.units)
    alone, _ = time_of_run(order, work, speeds, ahead, steal=False)
    claimed, num_taken_over = time_of_run(order, work, speeds, ahead, steal=True)
    return {
        "devices": devices,
        "assign_by": assign_by.name,
        "ranks": num_ranks,
        "assignment": ideal / alone,
        "claims": ideal / claimed,
        "taken_over": num_taken_over,
        "largest": max(work.flops) / max(speeds) / ideal,
        "seconds": time.perf_counter() - began,
    }


def what_breaks(runs: Sequence[dict[str, Any]], num_units: int) -> str:
    """Say from how many ranks on equal devices miss the goal with claims, and why."""
    missed = [run for run in runs if run["devices"] == "equal" and run["claims"] < GOAL]
    if not missed:
        return "equal devices: at least 98% everywhere"
    run = min(missed, key=lambda run: run["ranks"])
    where = (
        f"{run['ranks']:,} ranks, {num_units / run['ranks']:.1f} units for each, assign_by={run['assign_by']}"
    )
    reason = f"the largest unit takes {run['largest']:.0%} of the ideal time"
    return f"equal devices: first below 98% with {run['claims']:.1%} on {where}; {reason}"


def simulate_files(files: str, options: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    """Simulate all devices, costs and numbers of ranks over the same files."""
    rng = np.random.default_rng(options.seed)
    proteins = FILES[files](options.units, rng)
    lengths = draw_lengths(int(proteins.sum()), rng, options.fasta)
    work = make_work(proteins, lengths, options.unit_share, options.width)
    headings = ("devices", "assign_by", "policy", *(f"{num_ranks:,}" for num_ranks in options.ranks))
    sizes = f"{len(proteins):,} files, {len(lengths):,} proteins, {len(work.units):,} units"
    table = Table(
        f"{files}: {sizes}, the largest has {max(work.flops) / work.total:.2%} of the work", headings
    )
    runs = []
    for devices in options.devices:
        for assign_by in map(AssignBy, options.assign_by):
            row = [simulate(work, assign_by, num_ranks, devices, options) for num_ranks in options.ranks]
            for policy in ("assignment", "claims"):
                table.add(devices, assign_by.name, policy, *(f"{run[policy]:.1%}" for run in row))
            runs += row
    table.title += f"\n{what_breaks(runs, len(work.units))}"
    return table, [{"files": files, "units": len(work.units), **run} for run in runs]


def main() -> int:
    """Simulate what is asked for; return 1 if the goal is missed, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--units", type=int, default=10_000, help="files, before they are cut (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2**power for power in range(11)])
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument(
        "--assign-by", nargs="+", default=["sequences", "flops"], choices=list(AssignBy.__members__)
    )
    parser.add_argument("--unit-share", type=float, default=0.01, help="as the key of a run (%(default)s)")
    parser.add_argument("--width", type=int, default=2560, help="D of the model (%(default)s)")
    parser.add_argument("--ahead-tokens", type=int, default=AHEAD_TOKENS, help="read ahead (%(default)s)")
    parser.add_argument("--fasta", type=Path, help="a plain FASTA file whose lengths are drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_options(parser)
    results, tables = begin(), []
    results["runs"] = []
    for files in options.files:
        table, runs = simulate_files(files, options)
        tables.append(table)
        results["runs"] += runs
    goal = [
        run
        for run in results["runs"]
        if run["devices"] == "equal" and run["ranks"] <= GOAL_RANKS and run["files"] != "few-large"
    ]
    worst = min((run["claims"] for run in goal), default=None)
    results["goal"] = {"least": GOAL, "ranks": GOAL_RANKS, "worst": worst}
    end(results, tables, options)
    return int(worst is not None and worst < GOAL)


if __name__ == "__main__":
    sys.exit(main())
