#!/usr/bin/env python3
"""Measures whether the device ever waits for the disk before the disk itself is the limit.

Per-residue output is the most that a run can write: at 650M, 1,280 numbers for each residue. Here a
stand-in for the device is done with packs at a set pace and gives numbers made beforehand. Everything
behind it is real: collector, buffers, writers, hashing, syncing. The pace is set to shares of what the disk
took in the same run (one large file written and synced). For each share the table has the part of the time
in which the device had to wait. The last run has no pace: it shows the limit of the whole chain. Each run
is a process of its own, whose peak memory shows that a slow disk slows the run and does not grow it.

    scripts/bench_output.py --dir /path/on/the/disk --gigabytes 2

With --launches N the stand-in calls torch N times for each pack, as a GPU's thread does to launch kernels.
What that takes shows how long it waits for Python's interpreter while outputs are written.

With --one-file all proteins are in one file, which is cut into units as by default; with --uncut, too, it is
not, as a file that is compressed. The last line is JSON.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.fasta import random_proteins, write_fasta
from benchmarks.harness import (
    Table,
    Watched,
    begin,
    disk_rates,
    end,
    in_child,
    make_parser,
    parse_options,
)
from benchmarks.stand_in import StandInEngine, run_without_model
from dist_esm.atomic import size_of
from dist_esm.config import Config, DeviceKind, Format, Include, ModelConfig, SaveDtype, Writers
from dist_esm.types import Segment, SegmentEmbedding

WIDTH = 1280
LAYER = 33
MOST_OF_DISK = 4.0
"""Gigabytes that are written at most to find out the disk's rate."""
SHORTEST, LONGEST = 100, 570
"""Residues of a protein."""


def make_inputs(folder: Path, num_residues: int, proteins_per_file: int | None) -> None:
    """Write random proteins of about so many residues to files of so many proteins, or to one."""
    folder.mkdir()
    num_proteins = max(1, round(num_residues / ((SHORTEST + LONGEST) / 2)))
    proteins = random_proteins(num_proteins, SHORTEST, LONGEST, seed=0)
    per_file = proteins_per_file or num_proteins
    for index in range(-(-num_proteins // per_file)):
        own = enumerate(islice(proteins, per_file))
        write_fasta(folder / f"{index:04d}.fasta", ((b"p%d_%d" % (index, row), each) for row, each in own))


def measure_run(
    inputs: str,
    output_dir: str,
    tokens_per_second: float | None,
    format_name: str,
    save_dtype: str,
    unit_share: float,
    num_launches: int,
    writers: str,
) -> dict[str, Any]:
    """Run once, and return what it took."""
    numbers = np.random.default_rng(0).standard_normal((LONGEST, WIDTH), dtype=np.float32)
    rows = numbers.astype(save_dtype)

    def answer(segment: Segment) -> SegmentEmbedding:
        first, stop = segment.keep
        return SegmentEmbedding({LAYER: numbers[0]}, {LAYER: numbers[1]}, {LAYER: rows[: stop - first]})

    config = Config(
        input=inputs,
        output_dir=Path(output_dir),
        model=ModelConfig("stand-in", LAYER, WIDTH, 20, "random"),
        device=DeviceKind.cpu,
        include=[Include.per_tok],
        format=Format[format_name],
        save_dtype=SaveDtype[save_dtype],
        unit_share=unit_share,
        writers=Writers[writers],
        dedupe=False,
    )
    engine = StandInEngine(answer, tokens_per_second, num_launches=num_launches)
    with Watched() as most:
        cost = run_without_model(config, engine)
    (rank,) = cost.report["ranks"]
    outputs = [config.output_dir / output for file in cost.report["files"] for output in file["outputs"]]
    seconds = cost.report["embedding_seconds"]
    num_bytes = sum(map(size_of, outputs))
    return {
        "seconds": seconds,
        "last_outputs": rank["write_seconds"],
        "joining": max(0.0, seconds - rank["seconds"]),
        "bytes": num_bytes,
        "written_share": cost.written_bytes / num_bytes,
        "threads": most.threads,
        "files": most.files,
        "files_below": most.files_below,
        "waited": rank["waited_for_output"],
        "cpu": cost.cpu_seconds,
        "peak_mib": cost.peak_mib,
        "launching": mean(engine.launch_seconds) if num_launches else 0.0,
    }


def main() -> None:
    """Measure the disk, then runs at shares of its pace."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the disk to measure"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="output of one run (%(default)s)")
    parser.add_argument("--format", choices=[each.name for each in Format], default="safetensors")
    parser.add_argument("--save-dtype", choices=[each.name for each in SaveDtype], default="float32")
    parser.add_argument("--proteins-per-file", type=int, default=100)
    parser.add_argument("--one-file", action="store_true")
    parser.add_argument("--launches", type=int, default=0, help="calls of torch for each pack (%(default)s)")
    parser.add_argument(
        "--writers",
        choices=["threads", "processes"],
        default="threads",
        help="what writes outputs (%(default)s)",
    )
    parser.add_argument("--uncut", action="store_true", help="one rank takes each file whole")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=[0.1, 0.25, 0.5, 0.75, 1.5],
        help="paces, as shares of the disk's; after them comes a run without a pace",
    )
    options = parse_options(parser, children=(measure_run,))
    results = begin()
    bytes_per_residue = WIDTH * np.dtype(options.save_dtype).itemsize
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        rates = sorted(disk_rates(folder, int(min(options.gigabytes, MOST_OF_DISK) * 1e9), options.repeats))
        rate = rates[len(rates) // 2]
        spread = f"{rates[0] / 1e6:.0f} to {rates[-1] / 1e6:.0f}"
        disk = f"disk: {rate / 1e6:.0f} MB/s (median of {len(rates)}; {spread})"
        headings = (
            "device at",
            "MB/s asked",
            "MB/s written",
            "device waited",
            "last outputs, s",
            "joining, s",
            "core s/GB",
            "peak MiB",
            "written for a byte",
            "threads",
            "open files",
            "of processes",
            "launching, ms a pack",
        )
        table = Table(disk, headings)
        make_inputs(
            folder / "in",
            int(options.gigabytes * 1e9 / bytes_per_residue),
            None if options.one_file else options.proteins_per_file,
        )
        runs = []
        for share in [*options.shares, None]:
            run = in_child(
                measure_run,
                inputs=str(folder / "in"),
                output_dir=str(folder / "out"),
                tokens_per_second=None if share is None else rate * share / bytes_per_residue,
                format_name=options.format,
                save_dtype=options.save_dtype,
                num_launches=options.launches,
                writers=options.writers,
                unit_share=1.0 if options.uncut or not options.one_file else Config.unit_share,
            )
            shutil.rmtree(folder / "out")
            runs.append({**run, "share": share})
            table.add(
                "all it can" if share is None else f"{share:.0%} of disk",
                "" if share is None else f"{rate * share / 1e6:.0f}",
                f"{run['bytes'] / run['seconds'] / 1e6:.0f}",
                f"{run['waited'] / run['seconds']:.1%}",
                f"{run['last_outputs']:.2f}",
                f"{run['joining']:.2f}",
                f"{run['cpu'] / run['bytes'] * 1e9:.2f}",
                f"{run['peak_mib']:.0f}",
                f"{run['written_share']:.3f}",
                str(run["threads"]),
                str(run["files"]),
                str(run["files_below"]),
                f"{run['launching'] * 1e3:.1f}",
            )
    results |= {
        "disk_bytes_per_second": rate,
        "format": options.format,
        "save_dtype": options.save_dtype,
        "writers": options.writers,
        "runs": runs,
    }
    end(results, [table], options)


if __name__ == "__main__":
    main()
