"""Run by torchrun in test_distributed.py: values far larger than the store takes at once, and forged ones."""

import json
import sys
from pathlib import Path

import torch

from dist_esm.distributed import World
from dist_esm.types import Failure, RankSummary, UnitFailure

NUM_UNITS = 50_000

with World.connect() as world:
    seen = {"exchanged": [len(value) for value in world.exchange("x" * (4_300_000 + world.rank))]}
    world.start_process_group(torch.device("cpu"))
    gathered = world.all_gather([world.rank] * 3_000_000)
    seen["gathered"] = [[len(share), share[0], share[-1]] for share in gathered]
    failures = [
        UnitFailure(unit, 0, Failure(f"proteins/{unit}.fasta", "FastaError", f"line {unit}", world.rank), 0.5)
        for unit in range(NUM_UNITS)
    ]
    mine = RankSummary(world.rank, "here", "cpu", "FAILED", 1.0, 0, 0, 0, {}, {}, failures)
    ranks = world.gather_in_haste(mine, RankSummary, UnitFailure, Failure)
    seen["hasty"] = [[rank.rank, len(rank.outcomes)] for rank in ranks]
    seen["is_equal"] = all(rank.outcomes[-1].failure.error_message == "line 49999" for rank in ranks)
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(seen))
