"""A rank that notes the status of all ranks, with one that outlasts the process group's timeout.

Run by torchrun in test_distributed.py.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from dist_esm.distributed import World
from dist_esm.types import WorkerStatus

with World.connect() as world:
    seen = {}
    world.exchange("")
    seen["start"] = {rank: status.name for rank, status in world.get_worker_status().items()}
    world.start_process_group(torch.device("cpu"), timeout=timedelta(seconds=1))
    world.set_status(WorkerStatus.PROCESSING)
    values = world.exchange(f"value of {world.rank}")
    seen["complete_at_work"] = world.is_complete()
    world.exchange("")
    if world.rank == 1:
        time.sleep(3)
        world.set_status(WorkerStatus.FAILED)
    else:
        world.set_status(WorkerStatus.COMPLETED)
    world.wait_until_complete()
    seen["end"] = {rank: status.name for rank, status in world.get_worker_status().items()}
    seen["complete_at_end"] = world.is_complete()
    seen["gathered"] = world.all_gather({"rank": world.rank})
    seen["values"] = values
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(seen))
