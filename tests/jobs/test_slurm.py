"""scripts/slurm.sbatch on a real Slurm of two nodes: runs that end, and runs that are ended and go on.

The script is edited as its comments say, in its four lines alone. Each wait has a limit, so that a job that
hangs fails its test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from helpers.command import MODEL, read_report, run_ranks
from helpers.compare import digests
from helpers.slurm import Slurm, slurm, wait_until, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm can be started: {REASON}"),
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
NUM_FILES = 16
START_SECONDS = 60
"""Within which a job has its first outputs, on a machine that may be busy."""
END_SECONDS = 90
"""Within which a job is at its end."""
STOP_SECONDS = 20
"""Within which a run that got SIGTERM, or lost a node, has its report: far less than the minute it has."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
    print(cluster.logs())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files of ten proteins each, none like another; a core works on them for some seconds."""
    folder = tmp_path_factory.mktemp("proteins")
    protein = "ACDEFGHIKLMNPQRSTVWY" * 18
    for i in range(NUM_FILES):
        (folder / f"{i:02}.fasta").write_text("".join(f">{j}\n{protein[10 * i + j :]}\n" for j in range(10)))
    return folder


def settings(inputs: Path, out: Path) -> list[str]:
    rest = [MODEL, "model.weights=random", "device=cpu", "toks_per_batch=2000", "heartbeat_timeout=6"]
    return [f"input={inputs}", f"output_dir={out}", *rest]


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """What one process makes of the inputs, without Slurm."""
    out = tmp_path_factory.mktemp("expected")
    done = run_ranks(None, *settings(inputs, out))
    assert done.returncode == 0, done.stderr
    return digests(out)


def submit(cluster: Slurm, inputs: Path, out: Path, *options: str, time: str = "10") -> str:
    """Edit the script's four lines, submit it, and give the number of the job."""
    text = SCRIPT.read_text()
    lines = {
        r"^#SBATCH --nodes=.*$": "#SBATCH --nodes=2 --gpus-per-node=1 --cpus-per-task=1 --mem=1500M",
        r"^#SBATCH --time=.*$": f"#SBATCH --time={time}",
        r"^python=.*$": f"python={sys.executable}",
        r"^settings=.*$": f"settings=({' '.join(settings(inputs, out))})",
    }
    for pattern, line in lines.items():
        text, times = re.subn(pattern, line, text, flags=re.MULTILINE)
        assert times == 1, pattern
    script = out.parent / "slurm.sbatch"
    script.write_text(text)
    return cluster.run("sbatch", "--parsable", f"--chdir={out.parent}", str(script), *options)


def wait_for_outputs(out: Path, least: int) -> None:
    wait_until(lambda: len(list(out.glob("*.pt"))) >= least, START_SECONDS, f"{least} outputs")


def wait_for_state(cluster: Slurm, job: str, *states: str, seconds: float = END_SECONDS) -> None:
    def is_there() -> bool:
        state = cluster.state(job)
        is_over = state in ("FAILED", "TIMEOUT", "CANCELLED")
        assert state in states or not is_over, Path(cluster.job(job)["StdOut"]).read_text()
        return state in states

    wait_until(is_there, seconds, f"job {job} to be {' or '.join(states)}")


def go_on_now(cluster: Slurm, job: str) -> None:
    """Start a job that waits in the queue: Slurm holds one that was requeued back for two minutes.

    A node refuses to start a job again within the second in which it ended there, and Slurm then gives the
    job up, so this leaves it a few.
    """
    wait_for_state(cluster, job, "PENDING", seconds=STOP_SECONDS)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", "TimeLimit=10")


def assert_complete(cluster: Slurm, job: str, out: Path, expected: dict[str, str], restarts: int) -> dict:
    """The job ended well, after so many restarts, with the bits of one process."""
    wait_for_state(cluster, job, "COMPLETED")
    assert int(cluster.job(job)["Restarts"]) == restarts
    report = read_report(out)
    assert report["status"] == "complete", log_of(job, out)
    assert digests(out) == expected
    return report


def log_of(job: str, out: Path) -> str:
    return (out.parent / f"dist_esm-{job}.log").read_text()


def assert_stopped_half_way(report: dict, out: Path) -> None:
    """A run that was stopped says so, and accounts for every file."""
    assert report["status"] == "aborted"
    done = {entry["output"] for entry in report["files"]}
    assert done == {path.name for path in out.glob("*.pt")}
    assert 0 < len(done) < NUM_FILES
    assert len(done) + len(report["not_attempted"]) == NUM_FILES


def test_a_job_on_two_nodes_completes_with_the_bits_of_one_process(cluster, inputs, expected, tmp_path):
    out = tmp_path / "out"
    job = submit(cluster, inputs, out)
    report = assert_complete(cluster, job, out, expected, restarts=0)
    assert [(rank["rank"], rank["host"]) for rank in report["ranks"]] == [(0, "n1"), (1, "n2")]
    assert "complete: " in log_of(job, out)


def test_a_job_that_is_requeued_half_way_goes_on_to_the_same_bits(cluster, inputs, expected, tmp_path):
    out = tmp_path / "out"
    job = submit(cluster, inputs, out)
    wait_for_outputs(out, 2)
    cluster.run("scontrol", "requeue", job)
    go_on_now(cluster, job)
    before = digests(out)
    assert 0 < len(before) < NUM_FILES
    assert_complete(cluster, job, out, expected, restarts=1)


def test_sigterm_before_the_limit_leaves_a_report_and_the_job_requeues_itself(
    cluster, inputs, expected, tmp_path
):
    """Slurm's own signal comes so, too: --signal without `B:` is one to all processes of the step."""
    out = tmp_path / "out"
    job = submit(cluster, inputs, out, time="5")
    wait_for_outputs(out, 2)
    cluster.run("scancel", "--signal=TERM", job)
    wait_for_state(cluster, job, "PENDING", seconds=STOP_SECONDS)
    report = read_report(out)
    assert_stopped_half_way(report, out)
    assert "interrupted by SIGTERM" in report["reason"]
    assert f"job {job} goes back into the queue" in log_of(job, out)
    go_on_now(cluster, job)
    assert_complete(cluster, job, out, expected, restarts=1)


def test_a_node_that_dies_is_named_and_the_job_goes_on_when_it_is_back(cluster, inputs, expected, tmp_path):
    out = tmp_path / "out"
    job = submit(cluster, inputs, out)
    wait_for_outputs(out, 2)
    cluster.kill_node("n2")
    wait_until(lambda: read_report(out)["status"] == "aborted", STOP_SECONDS, "the report")
    report = read_report(out)
    assert_stopped_half_way(report, out)
    assert report["reason"].startswith("rank 1 (n2")
    # Slurm itself would take minutes to see that the node is gone.
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=power")
    cluster.start_node("n2")
    wait_until(lambda: "down" not in " ".join(cluster.node_states()), STOP_SECONDS, "the node's return")
    go_on_now(cluster, job)
    assert_complete(cluster, job, out, expected, restarts=1)


def test_a_job_whose_run_cannot_start_stays_ended(cluster, inputs, tmp_path):
    """Also where an earlier launch left a report of a run that was stopped."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{\n "status": "aborted"\n}\n')
    job = submit(cluster, inputs, out, "model.nosuch=1")
    wait_for_state(cluster, job, "FAILED")
    assert cluster.job(job)["Restarts"] == "0"
    assert "nosuch" in log_of(job, out)
    assert "goes back into the queue" not in log_of(job, out)
