"""The command with real ranks, and what a run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.warm import run_warm

HELPERS = Path(__file__).parent
FORKS = ["--start-method=fork", "--run-path", str(HELPERS / "rank.py")]
"""Options of torchrun with which it forks its ranks from itself."""
MODEL = "model=esm2_t6_8M_UR50D"


def environment(**extra: str) -> dict[str, str]:
    """The environment for a rank: no torchrun variables of ours, no user's hub cache."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}


def command(
    num_ranks: int | None,
    *words: object,
    script: Path | None = None,
    torchrun: Sequence[str] = (),
    forks: bool = False,
) -> list[str]:
    """The command line: torchrun with so many ranks, or without torchrun for None.

    Parameters
    ----------
    num_ranks
        Of this host.
    words
        For the command.
    script
        What to run in place of the command.
    torchrun
        More options of it.
    forks
        Let it fork the ranks from itself, which is faster where it is warm, and not start new Pythons.
    """
    line = [sys.executable]
    if num_ranks is not None:
        line += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", *torchrun]
        line += FORKS if forks else []
    if script is not None:
        line.append(str(script))
    else:
        line += ["-m", "dist_esm"]
    return [*line, *map(str, words)]


def run_ranks(
    num_ranks: int | None,
    *words: object,
    script: Path | None = None,
    torchrun: Sequence[str] = (),
    stdin: int | str = subprocess.DEVNULL,
    is_warm: bool = True,
    forks: bool = True,
    timeout: float = 120,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end.

    Parameters
    ----------
    num_ranks, words, script, torchrun
        As of `command`.
    stdin
        A file, or a text for a pipe.
    is_warm
        Fork its processes from a Python that has torch; False where the test is about how they start.
    forks
        Let torchrun fork the ranks; False where it matters that one which is done ends before the others.
    timeout
        Seconds that it may take.
    extra
        Variables of its environment.
    """
    line = command(num_ranks, *words, script=script, torchrun=torchrun, forks=is_warm and forks)
    if is_warm:
        return run_warm(line, environment(**extra), timeout, stdin)
    assert stdin == subprocess.DEVNULL
    return subprocess.run(
        line,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**extra),
        check=False,
    )


def run_meanwhile(place: str, shell: str, *overrides: object) -> subprocess.CompletedProcess[str]:
    """Run the command without torchrun, and the shell command when it comes to a function."""
    return run_ranks(None, place, shell, *overrides, script=HELPERS / "meanwhile.py")


def read_report(output_dir: Path) -> dict:
    """The report.json of a run."""
    return json.loads((output_dir / "report.json").read_text())


def processes_of(output_dir: Path) -> list[int]:
    """Ranks that work on an output directory, without torchrun itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().split(b"\0")
            if f"output_dir={output_dir}".encode() in line and b"torch.distributed.run" not in line:
                found.append(int(path.name))
    return found
