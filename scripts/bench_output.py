#!/usr/bin/env python3
"""Does the device ever wait for the disk before the disk is the limit?

Per-residue output is the most that a run can write: at 650M, 1,280 numbers for each residue. Here a stand-in for the device answers
packs at a set pace with numbers made beforehand, and everything behind it is the real thing: collector, buffers, writers, hashing,
syncing. The pace is set to shares of what the disk was measured to take in the same run (one large file written and synced), and for
each the share of time is reported in which the device had to wait. A last run has no pace at all: what comes out then is the limit of
the whole chain. Peak memory is that of the process, to show that a slow disk slows the run and does not grow it.

    scripts/bench_output.py --dir /path/on/the/disk --gigabytes 2

With --one-file all proteins are in one file, which is cut into units as by default, and the pieces are joined at the end.

Prints a table, and one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_esm.config import Config, Format, Include, ModelConfig, SaveDtype
from dist_esm.distributed import World
from dist_esm.jobs.embed import join_cut_files, journal_writer
from dist_esm.jobs.report import make_report
from dist_esm.model.engine import num_cores
from dist_esm.outputs.output_dir import OutputDir
from dist_esm.pipeline.worker import embed_units
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.inputs import find_files
from dist_esm.stop import Stop
from dist_esm.types import Pack, RankSummary, SegmentEmbedding

WIDTH = 1280
LAYER = 33


class PacedDevice:
    """Answers packs at so many residues a second; None: at once."""

    toks_per_batch = 16384
    num_threads = num_cores()

    def __init__(self, pace: float | None, dtype: SaveDtype) -> None:
        self.pace = pace
        self.numbers = np.random.default_rng(0).standard_normal((2048, WIDTH), dtype=np.float32)
        self.rows = self.numbers.astype(dtype.name)
        self.free_at = 0.0

    is_gpu = False

    def submit(self, pack: Pack) -> PacedPack:
        """Begin with a pack as soon as the one before it is done."""
        now = time.monotonic()
        if self.pace is not None:
            self.free_at = max(now, self.free_at) + pack.num_tokens / self.pace
        return PacedPack(self, pack, self.free_at)

    def answers(self, pack: Pack) -> list[SegmentEmbedding]:
        """Rows that were made beforehand."""
        answers = []
        for segment in pack.segments:
            first, last = segment.keep
            answers.append(
                SegmentEmbedding(
                    {LAYER: self.numbers[0]}, {LAYER: self.numbers[1]}, {LAYER: self.rows[: last - first]}
                )
            )
        return answers

    def free_memory(self) -> None:
        """Nothing is cached."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class PacedPack:
    """A pack that a device of this pace has done at a time."""

    device: PacedDevice
    pack: Pack
    done_at: float

    def result(self) -> list[SegmentEmbedding]:
        """Wait until it is done."""
        time.sleep(max(0.0, self.done_at - time.monotonic()))
        return self.device.answers(self.pack)


def disk_rate(folder: Path, num_bytes: int) -> float:
    """Bytes a second that one large file takes, written in blocks and synced."""
    block = np.random.default_rng(0).bytes(8 << 20)
    path = folder / "rate"
    began = time.monotonic()
    with open(path, "wb") as file:
        for _ in range(max(1, num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    path.unlink()
    return num_bytes / seconds


def make_inputs(folder: Path, num_residues: int, per_file: float) -> None:
    """Files of random proteins of 100 to 570 residues."""
    folder.mkdir()
    chance = random.Random(0)
    number = written = 0
    while written < num_residues:
        with open(folder / f"{number:04d}.fasta", "w", encoding="ascii") as file:
            for i in count():
                if i >= per_file or written >= num_residues:
                    break
                letters = "".join(chance.choices("ACDEFGHIKLMNPQRSTVWY", k=chance.randint(100, 570)))
                file.write(f">p{number}_{i}\n{letters}\n")
                written += len(letters)
        number += 1


def run(
    inputs: Path, out: Path, pace: float | None, kind: Format, dtype: SaveDtype, unit_share: float
) -> dict[str, Any]:
    """One run; what it took."""
    model = ModelConfig("paced", LAYER, WIDTH, 20, "random")
    settings: dict[str, Any] = {
        "include": [Include.per_tok],
        "format": kind,
        "save_dtype": dtype,
        "unit_share": unit_share,
        "dedupe": False,
    }
    config = Config(input=str(inputs), output_dir=out, model=model, **settings)
    world = World(None, 0, 1, 0, 1)
    files = find_files(config.input_list())
    with OutputDir.open(config, {}, world) as output_dir:
        plan = agree_on_plan(config, files, world)
        units = [plan.units[index] for index in plan.bins[0]]
        device: Any = PacedDevice(pace, dtype)
        before = cpu_seconds()
        record = journal_writer(output_dir.journal, plan)
        result = embed_units(units, files, config, device, 0, Stop(), output_dir.scratch, {}, record)
        began = time.monotonic()
        summary = RankSummary(
            0, "", "", "COMPLETED", result.seconds, result.num_tokens, 0, 0, result.waits, {}, result.outcomes
        )
        joined = join_cut_files(config, plan, [summary], output_dir, world)
        joining = time.monotonic() - began
        cpu = cpu_seconds() - before
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    report = make_report(plan, [summary], joined, None, 0.0, 0.0)
    assert report.status == "complete"
    shutil.rmtree(out)
    waited = result.waits["waited_for_output"]
    return {
        "seconds": result.seconds + joining,
        "joining": joining,
        "bytes": num_bytes,
        "waited": waited,
        "cpu": cpu,
        "pace": pace,
    }


def cpu_seconds() -> float:
    """Of all threads of this process so far, in the kernel and outside."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the disk to measure"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="output of one run")
    parser.add_argument("--format", type=lambda name: Format[name], default=Format.safetensors)
    parser.add_argument("--save-dtype", type=lambda name: SaveDtype[name], default=SaveDtype.float32)
    parser.add_argument("--proteins-per-file", type=int, default=100)
    parser.add_argument("--one-file", action="store_true")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25, 0.5, 0.75, 1.5])
    options = parser.parse_args()
    width = 4 if options.save_dtype is SaveDtype.float32 else 2
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        rates = sorted(disk_rate(folder, int(options.gigabytes * 1e9)) for _ in range(3))
        rate = rates[1]
        make_inputs(
            folder / "in",
            int(options.gigabytes * 1e9 / (WIDTH * width)),
            math.inf if options.one_file else options.proteins_per_file,
        )
        print(
            f"disk: {rate / 1e6:.0f} MB/s (median of 3; {rates[0] / 1e6:.0f} to {rates[2] / 1e6:.0f})",
            flush=True,
        )
        print(
            f"{'device at':>12} {'MB/s asked':>11} {'MB/s written':>13} {'device waited':>14} {'joining, s':>11} {'core s/GB':>10} {'peak MiB':>9}",
            flush=True,
        )
        rows = []
        for share in [*options.shares, None]:
            pace = None if share is None else rate * share / (WIDTH * width)
            row = run(
                folder / "in",
                folder / "out",
                pace,
                options.format,
                options.save_dtype,
                Config.unit_share if options.one_file else 1.0,
            )
            row |= {"share": share, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
            rows.append(row)
            asked = "all it can" if share is None else f"{share:.0%} of disk"
            amount = "" if share is None else f"{rate * share / 1e6:.0f}"
            speed, waited = row["bytes"] / row["seconds"] / 1e6, row["waited"] / row["seconds"]
            cpu = row["cpu"] / row["bytes"] * 1e9
            print(
                f"{asked:>12} {amount:>11} {speed:>13.0f} {waited:>14.1%} {row['joining']:>11.1f} {cpu:>10.2f} {row['peak_mib']:>9.0f}",
                flush=True,
            )
    hardware = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(
        json.dumps(
            {
                "disk_bytes_per_second": rate,
                "format": options.format.name,
                "save_dtype": options.save_dtype.name,
                "runs": rows,
                **hardware,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
