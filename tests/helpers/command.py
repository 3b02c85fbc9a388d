"""The command with real ranks, and what a run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
MODEL = "model=esm2_t6_8M_UR50D"


def environment(**extra: str) -> dict[str, str]:
    """The environment for a rank: no torchrun variables of ours, no user's hub cache."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}


def command(num_ranks: int | None, *overrides: object) -> list[str]:
    """The command line: torchrun with so many ranks, or without torchrun for None."""
    launcher = [sys.executable, "-m"]
    if num_ranks is not None:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m"]
    return [*launcher, "dist_esm", *(str(item) for item in overrides)]


def run_ranks(
    num_ranks: int | None, *overrides: object, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        command(num_ranks, *overrides),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**extra),
        check=False,
    )


def run_meanwhile(place: str, shell: str, *overrides: object) -> subprocess.CompletedProcess[str]:
    """Run the command without torchrun, and the shell command when it comes to a function."""
    line = [sys.executable, str(HELPERS / "meanwhile.py"), place, shell, *map(str, overrides)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment(), check=False)


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
