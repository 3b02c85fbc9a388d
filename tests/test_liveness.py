"""Signs of life, looked at without ranks."""

from __future__ import annotations

import json
import subprocess

import pytest
from torch.distributed import HashStore  # noqa: TID251 - a store without ranks

from dist_esm.liveness import SignsOfLife, process_space


@pytest.mark.parametrize("has_left", [False, True])
def test_a_process_that_ended_before_anybody_looked_is_lost_unless_it_said_so(has_left):
    process = subprocess.Popen(["true"])
    process.wait()
    store = HashStore()
    about = {"host": "west", "processes": process_space(), "pid": process.pid, "in_hand": "a.fasta"}
    store.set("alive/1", json.dumps(about))
    signs = SignsOfLife(store, 0, 2, "west", 60.0, lambda rank: has_left)
    lost = (1, "rank 1 (west) with a.fasta in hand ended before its work was done")
    assert signs.silent_rank() == (None if has_left else lost)
    signs.close()
