#!/usr/bin/env python3
"""How long ranks take to agree on a plan of very many files, and what it costs in memory.

    scripts/bench_plan.py --files 300000 --ranks 3

Real ranks under torchrun find the files, count their share, gather the counts, assign, and compare their
plans. Nothing is embedded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Table, begin, end, make_parser, parse_options, peak_mib

RANK = "--rank"


def main() -> int:
    """Make the files, start the ranks and print what they say."""
    if sys.argv[1:2] == [RANK]:
        rank(*sys.argv[2:])
        return 0
    parser = make_parser(__doc__)
    parser.add_argument("--files", type=int, default=300_000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the files go (a temporary folder)")
    options = parse_options(parser)
    results = begin()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        inputs, told = Path(directory) / "in", Path(directory) / "told"
        told.mkdir()
        for number in range(options.files):
            folder = inputs / f"{number // 1000:04}"
            if number % 1000 == 0:
                folder.mkdir(parents=True)
            (folder / f"{number:07}.fasta").write_text(f">{number}\n{'MKTAYIAKQR' * (1 + number % 7)}\n")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line = [*launcher, f"--nproc_per_node={options.ranks}", __file__, RANK, str(inputs), str(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(line, check=True, env=environment)
        ranks = [json.loads((told / f"{number}.json").read_text()) for number in range(options.ranks)]
    table = Table("plan", ("rank", "find s", "agree s", "peak MiB", "units", "in its bin"))
    for one in ranks:
        figures = f"{one['find_s']:.1f}", f"{one['agree_s']:.1f}", f"{one['peak_mib']:.0f}"
        table.add(str(one["rank"]), *figures, f"{one['units']:,}", f"{one['bin']:,}")
    end({**results, "ranks": ranks}, [table], options)
    return 0


def rank(inputs: str, told: str) -> None:
    """Agree on a plan, as one of the ranks."""
    import torch

    from dist_esm.config import Config, ModelConfig
    from dist_esm.distributed import World
    from dist_esm.planning.agree import agree_on_plan
    from dist_esm.planning.inputs import find_files

    config = Config(input=inputs, model=ModelConfig("none", 33, 1280, 20))
    with World.connect() as world:
        world.start_process_group(torch.device("cpu"))
        began = time.monotonic()
        files = find_files([inputs])
        found = time.monotonic()
        plan = agree_on_plan(config, files, [], world)
        figures = {
            "rank": world.rank,
            "find_s": round(found - began, 3),
            "agree_s": round(time.monotonic() - found, 3),
            "peak_mib": round(peak_mib(), 1),
            "units": len(plan.units),
            "bin": len(plan.bins[world.rank]),
        }
        Path(told, f"{world.rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
