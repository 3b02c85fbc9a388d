"""The launcher's environment: which rank this process is, or one line that says what is wrong.

The launcher is torchrun, or the command itself (`commandline/ranks`), which tells its ranks by two variables
of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

MAX_PORT = 65535
LAUNCHER_PID = "DIST_ESM_LAUNCHER_PID"
"""Set by the command for the ranks that it starts: its process, which they do not outlive."""
NUM_RESTARTS = "DIST_ESM_RESTARTS"
"""Set with it: how often the command has started its ranks again."""
PARTIAL = 2
"""Exit code of a run in which some files failed, and all others are done."""
PR_SET_PDEATHSIG = 1


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_rank() -> bool:
    """Tell whether this process speaks for the run, as the launcher's environment has it."""
    return os.environ.get("RANK", "0") == "0"


def is_started_by_us() -> bool:
    """Tell whether this process is a rank that the command started, which takes the signals for it."""
    return LAUNCHER_PID in os.environ


def follow_launcher() -> None:
    """Make the kernel send SIGTERM to this rank when the command that started it ends in any way (Linux)."""
    pid = os.environ.get(LAUNCHER_PID, "")
    if pid.isdecimal():
        end_with_parent(int(pid), signal.SIGTERM)


def end_with_parent(parent: int, how: signal.Signals) -> None:
    """Make the kernel send a signal to this process when the one that started it ends in any way (Linux)."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:  # it has ended already
        signal.raise_signal(how)


def num_restarts() -> int:
    """How often the launcher has started these ranks again."""
    return int(os.environ.get(NUM_RESTARTS) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def exit_code_for_launcher(code: int) -> int:
    """Return the code that this process ends with: under torchrun's restarts, 0 for some failed files.

    torchrun starts all ranks again if one fails, and only a crash is worth that: files that failed would
    fail again. report.json says `partial` all the same.
    """
    restarts = [
        int(os.environ.get(f"TORCHELASTIC_{name}") or 0) for name in ("RESTART_COUNT", "MAX_RESTARTS")
    ]
    return 0 if code == PARTIAL and restarts[0] < restarts[1] else code


def tell_torchrun(line: str) -> None:
    """Leave the reason of a failure where torchrun looks for it, to end its own report with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(about, file)


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
