"""The launcher's environment: which rank this process is, or one line that says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

MAX_PORT = 65535


def launch_environment() -> tuple[int, int] | None:
    """Rank and number of ranks as the launcher's environment has them; None without a launcher.

    Raises
    ------
    SystemExit
        With one line, if the environment is only half a launcher's.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "").strip() for name in names}
    if not values["RANK"] and not values["WORLD_SIZE"]:
        num_tasks = os.environ.get("SLURM_NTASKS", "1")
        if (
            "SLURM_PROCID" in os.environ
            and num_tasks.isdigit()
            and int(num_tasks) > 1
            and "SLURM_STEP_ID" in os.environ
        ):
            refuse(
                f"srun started {num_tasks} tasks, but torchrun is missing, so all would do the same work: "
                "start one task a node and torchrun in it, or one task alone"
            )
        return None
    missing = [name for name, value in values.items() if not value]
    if missing:
        there = [name for name, value in values.items() if value]
        refuse(
            f"{in_words(there)} {'is' if len(there) == 1 else 'are'} set but not {in_words(missing)}: "
            f"start it with torchrun, or unset {in_words(there)}"
        )
    local = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", *(name for name in local if os.environ.get(name))):
        value = os.environ[name].strip()
        if not value.isdecimal() or (name == "MASTER_PORT" and int(value) > MAX_PORT):
            what = "port" if name == "MASTER_PORT" else "number"
            refuse(f"{name}={value} is no {what}: start it with torchrun, or unset {in_words(names)}")
    rank, world_size = int(values["RANK"]), int(values["WORLD_SIZE"])
    if rank >= world_size:
        refuse(
            f"RANK={rank} is no rank of WORLD_SIZE={world_size}: ranks count from 0; start it with torchrun"
        )
    return rank, world_size


def in_words(names: Sequence[str]) -> str:
    """Join names with commas and an "and"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def refuse(problem: str) -> Any:
    """End this process with one line.

    Raises
    ------
    SystemExit
        Always.
    """
    raise SystemExit(f"dist_esm: error: {problem}")
