"""The command that starts its ranks: real exit codes, signals, and no rank that outlives it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_esm.commandline.command import wanted_ranks
from dist_esm.config import Config, DeviceKind
from helpers.command import MODEL, command, environment, processes_of, read_report, run_ranks
from helpers.compare import digests
from helpers.warm import WarmProcess

SECONDS = 20
"""Within which a run that was interrupted must have ended, on a machine that may be busy."""
GO_ON = "what is done is kept, run the same command again to go on from there"
PROTEIN = "ACDEFGHIKLMNPQRSTVWY" * 50


def settings(inputs: Path, out: Path, *others: str) -> list[str]:
    """A run of two ranks on CPUs."""
    return [f"input={inputs}", f"output_dir={out}", MODEL, "model.weights=random", "ranks=2", *others]


def write_files(folder: Path, number: int, length: int = 1000) -> Path:
    """So many files of ten proteins."""
    folder.mkdir()
    for i in range(number):
        text = "".join(f">{j}\n{PROTEIN[j + i : length + j + i]}\n" for j in range(10))
        (folder / f"{i:02}.fasta").write_text(text)
    return folder


@contextmanager
def under_way(tmp_path: Path, *others: str) -> Iterator[tuple[WarmProcess, list[int]]]:
    """A run that has written outputs and will not end soon, with the processes of its ranks."""
    out = tmp_path / "out"
    line = command(
        None, *settings(write_files(tmp_path / "in", 99, 400), out, "toks_per_batch=1000", *others)
    )
    process = WarmProcess(line, environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while len(list(out.glob("*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = [pid for pid in processes_of(out) if pid != process.pid]
        assert len(ranks) == 2
        yield process, ranks
    finally:
        for pid in (process.pid, *processes_of(out)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ours(stderr: str) -> list[str]:
    """Lines of the command itself; nothing else may be there but the ranks' log."""
    lines = [line for line in stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d rank \d", line)]
    assert [line for line in lines if not line.startswith("dist_esm: ")] == []
    return lines


def assert_none_is_left(out: Path) -> None:
    """No rank works on a directory any more."""
    deadline = time.monotonic() + SECONDS
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(out) == []


@pytest.mark.distributed
def test_one_command_starts_the_ranks_and_has_the_exit_code_of_the_run(tmp_path):
    """Some files failed, in a directory with another package of this name; then refused."""
    inputs, out = write_files(tmp_path / "in", 4, length=20), tmp_path / "out"
    (inputs / "bad.fasta").write_text("no header\n")
    (tmp_path / "dist_esm.py").write_text("raise SystemExit('another package of this name')\n")
    script = Path(sys.executable).with_name("dist-esm")
    words = settings(inputs, out)
    line = [str(script), *words] if script.exists() else [sys.executable, "-P", *command(None, *words)[1:]]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=90, env=environment(), check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert ours(done.stderr) == []
    assert [rank["status"] for rank in read_report(out)["ranks"]] == ["COMPLETED"] * 2

    refused = run_ranks(None, *settings(inputs, out, "repr_layers=[0]"))
    assert refused.returncode == 1
    (line,) = ours(refused.stderr)
    assert "holds embeddings made under other settings" in line

    alone = [word for word in settings(inputs, tmp_path / "alone") if word != "ranks=2"]
    assert run_ranks(None, *alone, "ranks=1").returncode == 2
    two, one = (
        {name: digest for name, digest in digests(folder).items() if name.endswith(".pt")}
        for folder in (out, tmp_path / "alone")
    )
    assert two == one
    assert len(two) == 4


@pytest.mark.distributed
def test_ranks_read_the_pipes_of_the_shell(tmp_path):
    words = " ".join(settings(Path("<(printf '>a\\nMKTAYIAKQR\\n')"), tmp_path / "out"))
    line = f"{sys.executable} -m dist_esm {words}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=90, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out")["records"]["ok"] == 1


@pytest.mark.parametrize("words", ["input=in fromat=h5", "input=in dtype=fp23", "input=in long=window", ""])
def test_a_mistake_is_one_line_before_any_rank_starts(words, tmp_path):
    """Nothing that needs torch is imported."""
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise SystemExit('torch was imported')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    bad = {"input=in long=window": "truncation_seq_length=null"}.get(words, "")
    done = run_ranks(None, *words.split(), "ranks=2", *bad.split(), is_warm=False, PYTHONPATH=path)
    assert done.returncode == 1
    (line,) = ours(done.stderr)
    assert line.startswith("dist_esm: error: ")
    assert done.stdout == ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)], ids=["Ctrl-C", "TERM"]
)
def test_a_signal_ends_the_ranks_in_order_with_one_line(number, code, tmp_path):
    with under_way(tmp_path) as (process, _):
        os.killpg(process.pid, number)  # as a terminal does: the ranks have sessions of their own
        began = time.monotonic()
        said, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < SECONDS
        assert process.returncode == code
        (line,) = ours(errors)
        assert line.startswith(f"dist_esm: interrupted by {number.name}: {GO_ON}")
        assert "Traceback" not in errors
        assert "run the same command again" in said
        assert read_report(tmp_path / "out")["status"] == "aborted"
        assert processes_of(tmp_path / "out") == []


@pytest.mark.distributed
def test_ctrl_c_twice_ends_ranks_that_do_not_end(tmp_path):
    with under_way(tmp_path) as (process, ranks):
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
        assert process.returncode == 130
        assert_none_is_left(tmp_path / "out")


@pytest.mark.distributed
def test_no_rank_outlives_a_command_that_was_killed(tmp_path):
    with under_way(tmp_path) as (process, _):
        process.kill()
        assert_none_is_left(tmp_path / "out")
        report = read_report(tmp_path / "out")
        assert (report["status"], report["reason"]) == ("aborted", "interrupted by SIGTERM")


@pytest.mark.distributed
def test_a_rank_that_crashes_ends_the_run_as_aborted_and_is_named(tmp_path):
    with under_way(tmp_path) as (process, ranks):
        (pid,) = [pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert ours(errors) == [f"dist_esm: rank 1 was killed by SIGKILL: {GO_ON}"]
        report = read_report(tmp_path / "out")
        assert report["status"] == "aborted"
        assert report["reason"].startswith("rank 1 (")


@pytest.mark.distributed
def test_max_restarts_finds_out_the_protein_that_kills_its_process_in_one_command(tmp_path):
    """`sitecustomize` is imported by each Python that starts: it arranges which protein kills a rank."""
    poison = "MWWWWWWWWWWWWK"
    inputs, out = write_files(tmp_path / "in", 6, length=40), tmp_path / "out"
    (inputs / "bad.fasta").write_text(f">fine\nMKTAYIAKQR\n>poison\n{poison}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if 'RANK' in os.environ:\n"
        "    from dist_esm.fasta.tokens import tokenize\n"
        "    from dist_esm.model.engine import Engine\n"
        "    submit = Engine.submit\n"
        "    def poisoned(self, pack, *args, **options):\n"
        f"        tokens = tokenize({poison!r}.encode()).tobytes()\n"
        "        if any(segment.tokens.tobytes() == tokens for segment in pack.segments):\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return submit(self, pack, *args, **options)\n"
        "    Engine.submit = poisoned\n"
    )
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    done = run_ranks(None, *settings(inputs, out, "max_restarts=4", "toks_per_batch=500"), PYTHONPATH=path)
    assert done.returncode == 2, done.stderr
    lines = ours(done.stderr)
    assert [re.sub(r"rank \d", "rank N", line) for line in lines] == [
        f"dist_esm: rank N was killed by SIGSEGV: all ranks are started again, {number} of at most 4 times"
        for number in (1, 2)
    ]
    report = read_report(out)
    assert [(failure["error_type"], Path(failure["path"]).name) for failure in report["failed"]] == [
        ("QuarantinedError", "bad.fasta")
    ]
    assert len(report["files"]) == 6


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path):
    for seconds in (0.15, 0.4, 0.9):
        process = subprocess.Popen(
            command(None, *settings(tmp_path, tmp_path / "out")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        if "KeyboardInterrupt" in errors and "__main__" not in errors:
            continue  # Python itself was still starting
        assert process.returncode == 130, errors
        assert ours(errors)[0].startswith(f"dist_esm: interrupted by SIGINT: {GO_ON}")


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_under_a_launcher_ranks_are_what_it_started(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert [wanted_ranks(Config(input="x", ranks=ranks)) for ranks in ("auto", 2)] == [2, 2]
    with pytest.raises(ValueError, match=r"^ranks=4, but this host's launcher started 2: leave ranks out"):
        wanted_ranks(Config(input="x", ranks=4))


@pytest.mark.parametrize(
    ("ranks", "num_gpus", "device", "wanted"),
    [
        ("auto", 4, DeviceKind.auto, 4),
        ("auto", 4, DeviceKind.cpu, 1),
        ("auto", 0, DeviceKind.auto, 1),
        (2, 4, DeviceKind.cuda, 2),
        (3, 0, DeviceKind.auto, 3),
        (8, 4, DeviceKind.cpu, 8),
        (8, 4, DeviceKind.auto, "ranks=8 is more than the 4 visible GPU(s): write ranks=4, or ranks=auto"),
    ],
)
def test_there_is_a_rank_for_each_visible_gpu_or_as_many_as_are_asked_for(
    ranks, num_gpus, device, wanted, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    config = Config(input="x", ranks=ranks, device=device)
    if isinstance(wanted, int):
        assert wanted_ranks(config) == wanted
    else:
        with pytest.raises(ValueError, match=re.escape(wanted)):
            wanted_ranks(config)
