"""One run on two hosts, each with a torchrun of its own; every wait has a limit."""

from __future__ import annotations

import re
import shutil
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

import dist_esm
from helpers.checkpoints import A8M, random_state, write_checkpoint
from helpers.command import HELPERS, MODEL, read_report, run_ranks
from helpers.compare import assert_same
from helpers.hosts import CONF, Host, Hosts, are_name_spaces_allowed, two_hosts
from helpers.slurm import free_ports
from helpers.warm import WarmProcess

pytestmark = pytest.mark.distributed
needs_hosts = pytest.mark.skipif(
    not are_name_spaces_allowed(), reason="only root with `ip` and `unshare` can make hosts of its own"
)
LIMIT_SECONDS = 90
"""Within which a run of two hosts is at its end, on a machine that may be busy."""


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path, free_ports(1)[0]) as hosts:
        try:
            yield hosts
        finally:
            hosts.kill_all()


@pytest.fixture
def inputs(tmp_path):
    """Eight files of two proteins each, none like another."""
    folder = tmp_path / "in"
    folder.mkdir()
    protein = "ACDEFGHIKLMNPQRSTVWY" * 10
    for i in range(8):
        (folder / f"{i}.fasta").write_text("".join(f">{i}_{j}\n{protein[2 * i + j :]}\n" for j in range(2)))
    return folder


def settings(inputs: Path, out: Path, weights: object = "random") -> list[str]:
    return [f"input={inputs}", f"output_dir={out}", MODEL, f"model.weights={weights}", "device=cpu"]


def finish(*agents: WarmProcess) -> list[str]:
    """Wait for all torchruns; gives what each wrote to stderr."""
    deadline = time.monotonic() + LIMIT_SECONDS
    return [agent.communicate(timeout=max(1, deadline - time.monotonic()))[1] for agent in agents]


def refused(said: str) -> str:
    """The one line that rank 0 refuses a run with."""
    assert "/dist_esm/" not in said, said  # a traceback of ours; torchrun has its own
    (line,) = [line for line in said.splitlines() if line.startswith("dist_esm: error: ")]
    return line.removeprefix("dist_esm: error: ")


@pytest.mark.parametrize("number", [0, 1])
def test_the_documented_commands_are_those_of_these_tests(number):
    text = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("    torchrun ")]
    assert len(commands) == 2
    node1, node2 = (Host(name, name) for name in ("node1", "node2"))
    options = Hosts((node1, node2), 29500, are_apart=True).options(number, 4, CONF)
    assert commands[number][1:] == [*options, "-m", "dist_esm", "input=proteins/", "output_dir=embeddings/"]


def test_two_hosts_complete_with_the_bits_of_one_and_each_fetches_the_weights_once(
    hosts, inputs, tmp_path, checkpoint_8m
):
    """Four ranks, two on each host; hosts have caches of their own."""
    assert run_ranks(None, *settings(inputs, tmp_path / "one", checkpoint_8m)).returncode == 0
    requests = []
    homes = [tmp_path / "home0", tmp_path / "home1"]
    servers = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            requests.append((self.server.server_address, self.path))

    agents = []
    try:
        for number, home in enumerate(homes):
            server = hosts.serve(number, partial(Handler, directory=checkpoint_8m.parent))
            servers.append(server)
            url = f"http://127.0.0.1:{server.server_address[1]}/{{name}}.pt"
            agents.append(
                hosts.start(
                    number,
                    url,
                    *settings(inputs, tmp_path / "out", "null"),
                    num_ranks=2,
                    module=[str(HELPERS / "fetching.py")],
                    forks=False,
                    TORCH_HOME=str(home),
                )
            )
        said = finish(*agents)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sorted(requests) == sorted((server.server_address, f"/{checkpoint_8m.name}") for server in servers)
    report = read_report(tmp_path / "out")
    assert report["status"] == "complete"
    if hosts.are_apart:
        assert [rank["host"] for rank in report["ranks"]] == ["west", "west", "east", "east"]
    # Not the bytes of the files, which say where the weights came from.
    run, one = (dist_esm.load(tmp_path / name) for name in ("out", "one"))
    assert run.ids == one.ids
    assert len(run.ids) == 16
    assert_same(run.vectors, one.vectors)


def make_other(case: str, inputs: Path, folder: Path) -> None:
    """A copy of the inputs as a host with a lagging file system sees it."""
    other = folder / "other"
    shutil.copytree(inputs, other)
    if case == "a shorter file":
        (other / "5.fasta").write_text(">5_0\nMKT\n")
    elif case == "a file less":
        (other / "7.fasta").unlink()
    elif case == "nothing":
        shutil.rmtree(other)
        other.mkdir()


CASES = {
    "a shorter file": "5.fasta has 391 bytes for rank 0 (west) and has 9 bytes for rank 1 (east)",
    "a file less": "7.fasta has 383 bytes for rank 0 (west) and is not there for rank 1 (east)",
    "nothing": "rank 1 (east): input=",
}


@needs_hosts
@pytest.mark.parametrize("case", CASES)
def test_a_host_that_sees_other_inputs_stops_the_run_before_any_work(case, hosts, inputs, tmp_path):
    make_other(case, inputs, tmp_path)
    line = settings(inputs, tmp_path / "out")
    said = finish(hosts.start(0, *line), hosts.start(1, *line, mounts={inputs: tmp_path / "other"}))
    assert CASES[case] in refused(said[0])
    assert not list((tmp_path / "out").rglob("*.pt"))


@needs_hosts
def test_a_host_with_an_output_dir_of_its_own_stops_the_run_before_any_work(hosts, inputs, tmp_path):
    """As where output_dir is on each node's own disk."""
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    out.mkdir()
    line = settings(inputs, out)
    said = finish(hosts.start(0, *line), hosts.start(1, *line, mounts={out: own}))
    assert f"rank 1 (east) does not see what rank 0 (west) writes to output_dir={out}" in refused(said[0])
    assert not list(own.rglob("*.pt"))


@needs_hosts
def test_a_host_that_reads_an_older_journal_stops_the_run_before_any_work(hosts, inputs, tmp_path):
    line = settings(inputs, tmp_path / "out")
    assert run_ranks(None, *line).returncode == 0
    (inputs / "more.fasta").write_text(">more\nMKTAY\n")
    older = tmp_path / "older"
    older.mkdir()
    mounts = {tmp_path / "out" / ".dist_esm" / "journal": older}
    said = finish(hosts.start(0, *line), hosts.start(1, *line, mounts=mounts))
    assert re.search(
        r"different journals in output_dir: 8 entries \(\w+\) for rank 0 \(west\), "
        r"0 entries \(\w+\) for rank 1 \(east\): start it again when",
        refused(said[0]),
    )
    assert not (tmp_path / "out" / "more_ESM.pt").exists()


@needs_hosts
def test_a_host_with_other_weights_stops_the_run_before_any_work(hosts, inputs, tmp_path, checkpoint_8m):
    other = write_checkpoint(tmp_path / "other.pt", A8M, random_state(A8M, seed=1))
    line = settings(inputs, tmp_path / "out", checkpoint_8m)
    said = finish(hosts.start(0, *line), hosts.start(1, *line, mounts={checkpoint_8m: other}))
    found = re.search(
        r": weights is (\w+) for rank 0 \(west\) and (\w+) for rank 1 \(east\): ", refused(said[0])
    )
    assert found
    assert found[1] != found[2]
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_ranks_of_two_hosts_find_their_places_without_a_local_rank(hosts, inputs, tmp_path):
    """A launcher of one's own may say nothing but which rank this is."""
    meeting = {"MASTER_ADDR": hosts.hosts[0].address, "MASTER_PORT": str(hosts.port), "WORLD_SIZE": "3"}
    line = [sys.executable, "-m", "dist_esm", *settings(inputs, tmp_path / "out")]
    for rank, number in enumerate([0, 1, 1]):
        hosts.running.append(hosts.hosts[number].start(line, RANK=str(rank), **meeting))
    said = finish(*hosts.running)
    assert [process.returncode for process in hosts.running] == [0, 0, 0], said
    assert read_report(tmp_path / "out")["status"] == "complete"


def test_a_rendezvous_without_the_second_host_ends_within_the_time_that_was_set(hosts, inputs, tmp_path):
    """The time is torchrun's `join_timeout`, ten minutes if it is not set."""
    began = time.monotonic()
    agent = hosts.start(0, *settings(inputs, tmp_path / "out"), conf="join_timeout=5")
    (said,) = finish(agent)
    assert agent.returncode == 1
    assert "RendezvousTimeoutError" in said
    assert 5 < time.monotonic() - began < 40
    assert not (tmp_path / "out").exists()


def test_a_host_that_does_not_find_the_first_ends_within_the_time_that_was_set(hosts, inputs, tmp_path):
    """That time is `read_timeout`, a minute if it is not set."""
    agent = hosts.start(1, *settings(inputs, tmp_path / "out"), conf="join_timeout=5,read_timeout=5")
    began = time.monotonic()
    (said,) = finish(agent)
    assert agent.returncode == 1
    assert "RendezvousConnectionError" in said
    assert time.monotonic() - began < 40
