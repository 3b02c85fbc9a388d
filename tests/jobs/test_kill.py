"""Real runs, killed at random and resumed with other numbers of ranks: the bits of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers.command import MODEL, command, environment, processes_of, read_report, run_ranks
from helpers.compare import digests
from helpers.data import PROTEINS
from helpers.fasta import read_sequences
from helpers.warm import WarmProcess

HOW = ("one rank", "all ranks", "torchrun", "SIGTERM", "SIGINT")


@pytest.fixture(scope="module")
def job(tmp_path_factory, checkpoint_8m):
    """Forty small files and a large one, embedded undisturbed.

    The large one is cut, and its few distinct sequences come over and over.
    """
    folder = tmp_path_factory.mktemp("kill")
    proteins = [
        sequence for path in sorted(PROTEINS.glob("*.fa*")) for sequence in read_sequences(path).values()
    ]
    (folder / "in").mkdir()
    for i in range(40):
        (folder / "in" / f"{i:02}.fasta").write_text(
            "".join(
                f">{i}_{j}\n{protein[i:]}{protein}\n"
                for j, protein in enumerate(proteins[i % 16 : i % 16 + 8])
            )
        )
    (folder / "in" / "cut.fasta").write_text(
        "".join(f">big_{i}\n{proteins[i % len(proteins)]}\n" for i in range(2000))
    )
    settings = [
        f"input={folder / 'in'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=500",
        "unit_share=0.1",
    ]
    result = run_ranks(None, *settings, f"output_dir={folder / 'undisturbed'}")
    assert result.returncode == 0, result.stderr
    assert [entry["units"] for entry in read_report(folder / "undisturbed")["files"]] == [1] * 40 + [7]
    return settings, folder / "undisturbed"


def kill(how: str, launcher: WarmProcess, output_dir: Path, chance: random.Random) -> None:
    ranks = processes_of(output_dir)
    with contextlib.suppress(ProcessLookupError):
        if how == "one rank" and ranks:
            os.kill(chance.choice(ranks), signal.SIGKILL)
        elif how == "all ranks":
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        elif how == "torchrun":
            launcher.kill()
        elif how == "SIGTERM":
            launcher.send_signal(signal.SIGTERM)
        else:
            os.killpg(launcher.pid, signal.SIGINT)


def kill_and_resume(job, output_dir: Path, seed: int, num_kills: int) -> dict[str, int]:
    """Start, kill and check so many times, then let the last launch finish.

    With an odd seed outputs are written by processes. Returns how often each kind of kill hit a live run.
    """
    settings, undisturbed = job
    settings = [*settings, f"writers={'processes' if seed % 2 else 'threads'}"]
    wanted = digests(undisturbed)
    chance = random.Random(seed)
    hits = dict.fromkeys(HOW, 0)
    for number in range(num_kills):
        how = HOW[number % len(HOW)]
        # Ranks that were forked would hold what was torchrun's open, and so not see that it is gone.
        line = command(
            chance.choice((1, 2, 3)), *settings, f"output_dir={output_dir}", forks=how != "torchrun"
        )
        launcher = WarmProcess(line, environment(), start_new_session=True)
        # From before the ranks have found each other to about the last output.
        wait = chance.uniform(3, 9) if how == "torchrun" else chance.uniform(0.2, 6)
        time.sleep(wait)
        hits[how] += launcher.poll() is None
        kill(how, launcher, output_dir, chance)
        said = launcher.communicate(timeout=60)[1]
        deadline = time.monotonic() + 60
        while processes_of(output_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(output_dir), f"ranks outlive the run that was killed by {how}"
        visible = {
            name: digest for name, digest in digests(output_dir).items() if not name.startswith(".dist_esm")
        }
        assert visible.items() <= wanted.items(), f"torn or wrong after {how}: {said[-2000:]}"
    result = run_ranks(chance.choice((1, 2, 3)), *settings, f"output_dir={output_dir}")
    assert result.returncode == 0, result.stderr
    report = read_report(output_dir)
    assert report["status"] == "complete"
    assert report["records"]["in"] == report["records"]["ok"] == read_report(undisturbed)["records"]["in"]
    assert digests(output_dir) == wanted
    assert not [path for path in output_dir.rglob("*") if re.search(r"\.tmp$", path.name)]
    assert torch.load(output_dir / "cut_ESM.pt", weights_only=True)["proteins"] == [
        f"big_{i}" for i in range(2000)
    ]
    return hits


@pytest.mark.distributed
def test_a_run_killed_in_every_way_ends_as_if_undisturbed(job, tmp_path):
    hits = kill_and_resume(job, tmp_path / "out", seed=1, num_kills=5)
    assert sum(hits.values()) >= 2, f"the kills came too late to hit anything: {hits}"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_fifty_kills(job, tmp_path, seed):
    hits = kill_and_resume(job, tmp_path / "out", seed=100 + seed, num_kills=5)
    assert sum(hits.values()) >= 1, f"the kills came too late to hit anything: {hits}"
