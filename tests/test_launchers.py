"""Environments that are no launcher's, or half a one's: one line, no traceback, and nothing hangs."""

from __future__ import annotations

import re
import signal
import socket

import pytest

from helpers.command import MODEL, command, environment, read_report, run_ranks
from helpers.warm import WarmProcess

LIMIT_SECONDS = 60
"""Within which each case is at its end, on a machine that may be busy."""
TORCHRUN = "start it with torchrun, or unset "
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
ALL = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@pytest.fixture
def settings(tmp_path):
    """A run of two proteins."""
    (tmp_path / "a.fasta").write_text(">p1\nMKTAYIAKQR\n>p2\nGAVLIPFMW\n")
    rest = [MODEL, "model.weights=random", "device=cpu"]
    return [f"input={tmp_path / 'a.fasta'}", f"output_dir={tmp_path / 'out'}", *rest]


CASES = {
    "RANK without MASTER_ADDR": (
        {"RANK": "0", "WORLD_SIZE": "1"},
        f"RANK and WORLD_SIZE are set but not MASTER_ADDR and MASTER_PORT: {TORCHRUN}RANK and WORLD_SIZE",
    ),
    "RANK alone": (
        {"RANK": "0"},
        f"RANK is set but not WORLD_SIZE, MASTER_ADDR and MASTER_PORT: {TORCHRUN}RANK",
    ),
    "an empty WORLD_SIZE": (
        {"RANK": "0", "WORLD_SIZE": "", **MEETING},
        "RANK, MASTER_ADDR and MASTER_PORT are set but not WORLD_SIZE: "
        f"{TORCHRUN}RANK, MASTER_ADDR and MASTER_PORT",
    ),
    "no number": (
        {"RANK": "first", "WORLD_SIZE": "2", **MEETING},
        f"RANK=first is no number: {TORCHRUN}{ALL}",
    ),
    "no number of a device": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "a", **MEETING},
        f"LOCAL_RANK=a is no number: {TORCHRUN}{ALL}",
    ),
    "no port": (
        {"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_PORT": "99999"},
        f"MASTER_PORT=99999 is no port: {TORCHRUN}{ALL}",
    ),
    "no such rank": (
        {"RANK": "2", "WORLD_SIZE": "2", **MEETING},
        "RANK=2 is no rank of WORLD_SIZE=2: ranks count from 0; start it with torchrun",
    ),
    "a host that has no name": (
        {"RANK": "1", "WORLD_SIZE": "2", **MEETING, "MASTER_ADDR": "nosuch.invalid"},
        r"MASTER_ADDR=nosuch.invalid names no host (REASON): "
        "give each torchrun a --local-addr by which the other hosts reach its own",
    ),
    "srun without torchrun": (
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"},
        "srun started 3 tasks, but torchrun is missing, so all would do the same work: "
        "start one task a node and torchrun in it, or one task alone",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_half_a_launcher_is_one_line(case, settings, tmp_path):
    variables, line = CASES[case]
    done = run_ranks(None, *settings, timeout=LIMIT_SECONDS, **variables)
    assert done.returncode == 1
    expected = re.escape(f"dist_esm: error: {line}\n").replace("REASON", "[^()]+")
    assert re.fullmatch(expected, done.stderr), done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "", "WORLD_SIZE": "", **MEETING},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},  # a job script, outside srun
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"},
    ],
    ids=["an empty RANK", "a job script", "srun with one task"],
)
def test_no_launcher_is_one_process(variables, settings, tmp_path):
    done = run_ranks(None, *settings, timeout=LIMIT_SECONDS, **variables)
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out")["status"] == "complete"


def test_a_rank_that_waits_for_the_first_can_be_interrupted(settings):
    """Where rank 0 does not answer, the process is not in Python."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(LIMIT_SECONDS)
        port = str(mute.getsockname()[1])
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = WarmProcess(command(None, *settings), environment(**variables))
        try:
            connection, _ = mute.accept()
            with connection:
                process.send_signal(signal.SIGTERM)
                process.wait(10)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.distributed
def test_a_network_interface_that_is_not_there_is_one_line(settings, tmp_path):
    done = run_ranks(2, *settings, timeout=LIMIT_SECONDS, forks=False, GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 1
    assert "/dist_esm/" not in done.stderr, done.stderr  # a traceback of ours; torchrun has its own
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist_esm: error: ")]
    assert re.fullmatch(
        r"dist_esm: error: the process group cannot be started \(.*nosuch0.*\): "
        r"GLOO_SOCKET_IFNAME=nosuch0 names the network interface to use",
        line,
    )
    assert not list((tmp_path / "out").rglob("*.pt"))
