"""`job=plan`: its numbers held to an independent count, and nothing left behind."""

from __future__ import annotations

import os
import random
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from Bio import SeqIO
from filelock import FileLock

from dist_esm.config import Config, Format, Include, Long, ModelConfig, SaveDtype
from dist_esm.distributed import RefusedError, World
from dist_esm.jobs.embed import run
from dist_esm.jobs.plan import reading
from dist_esm.jobs.plan.job import plan
from dist_esm.jobs.plan.reading import read_bin
from dist_esm.model.checkpoints import locate
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.inputs import find_files
from dist_esm.types import LENGTH_EDGES
from helpers.command import MODEL, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import random_sequence, write, write_files
from helpers.standin import embed_directory, make_config

LIMIT = 100


def records(number: int, seed: int, least: int = 20, most: int = 180) -> str:
    """FASTA of random proteins, each with residues of its own."""
    rng = random.Random(seed)
    return "".join(
        f">{seed}_{i} a protein\n{random_sequence(rng.randint(least, most), 1000 * seed + i)}\n"
        for i in range(number)
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Files with all that a plan speaks of."""
    folder = tmp_path_factory.mktemp("inputs")
    plain = records(60, 1)
    write(folder / "plain.fasta", plain)
    write(folder / "again.faa", plain.replace(">1_", ">2_"))
    write(folder / "deep" / "more.fa", records(40, 3))
    odd = ">lower\nmktayiak\n>gaps\nMK-TAY*\n>odd\nMKJJTA\n>empty\n>chains\nMKTA:MKTA\n>mask\nMK<mask>TA\n"
    write(folder / "odd.fas", odd)
    dna = "".join(f">gene{i}\n{''.join(random.Random(i).choices('ACGT', k=60))}\n" for i in range(30))
    write(folder / "genes.fasta", dna)
    write(folder / "notes.txt", "not FASTA")
    write(folder / "nothing.fasta", "")
    write(folder / "bad.fasta", ">good\nMKT\n>bad\nMK\x01T\n")
    return folder


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """All below folders, with sizes and times."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def told_by(capsys, config: Config) -> list[str]:
    """The lines of a plan without ranks, in this process."""
    assert plan(config, World(None, 0, 1, 0, 1)) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], beginning: str) -> str:
    (line,) = (line for line in lines if line.strip().startswith(beginning))
    return line.strip()


def lengths_of(folder: Path) -> list[int]:
    """Letters of all records of the files that a search takes, as Biopython reads them."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".fasta", ".fa", ".faa", ".fas")]
    return [len(record.seq) for path in paths for record in SeqIO.parse(path, "fasta")]


def test_every_number_is_what_biopython_counts(capsys, inputs, tmp_path):
    config = make_config(str(inputs), tmp_path / "out", truncation_seq_length=LIMIT)
    lines = told_by(capsys, config)
    lengths = lengths_of(inputs)
    assert line_of(lines, "inputs:") == (
        f"inputs: 7 files, {len(lengths)} proteins, {sum(lengths):,} residues, the longest {max(lengths)}"
    )
    assert line_of(lines, "passed over") == ("passed over 1 file (1 .txt): name a file outright to embed it")
    shown = {}
    for line in lines:
        if found := re.fullmatch(r" +(\d+)(?:-(\d+)|\+)? +([\d,]+)( #*)?", line):
            first, last, number = found[1], found[2], found[3]
            shown[int(first), int(last or first)] = int(number.replace(",", ""))
    assert sum(shown.values()) == len(lengths)
    for (first, last), number in shown.items():
        assert number == sum(first <= length <= last for length in lengths)
        assert first in (0, *LENGTH_EDGES)
    long = sum(length > LIMIT for length in lengths)
    assert line_of(lines, "long:") == (
        f"long: {long} proteins of more than {LIMIT} residues will be truncated (long=truncate)"
    )
    assert "all that is left to do was read" in line_of(lines, "letters")
    assert line_of(lines, "changed:") == (
        "changed: 3 proteins (8 upper_cased, 1 stops_removed, 1 gaps_removed, 2 replaced)"
    )
    assert line_of(lines, "skipped:") == (
        "skipped: 3 proteins (1 empty sequence, 1 chain separators, 1 special token <mask>)"
    )
    identical = re.match(r"identical: (\d+) proteins .* saves ([\d.]+)%", line_of(lines, "identical:"))
    assert int(identical[1]) == 60
    assert line_of(lines, "will fail:").endswith(
        "line 4 holds control characters: this is not text, so no FASTA file"
    )
    assert [line for line in lines if line.startswith("warning:")] == [
        f"warning: {inputs / 'genes.fasta'} looks like DNA: 30 of 30 records; embed its proteins instead",
        f"warning: {inputs / 'nothing.fasta'} holds no record",
    ]
    assert line_of(lines, "rank 0").endswith(f"7 units, {len(lengths)} sequences")
    assert lines[-1] == "ok: a run would start"
    tokens = sum(
        min(len(record.seq), LIMIT) + 2
        for name in ("plain.fasta", "deep/more.fa", "genes.fasta")
        for record in SeqIO.parse(inputs / name, "fasta")
    )
    odd = [len("MKTAYIAK"), len("MKTAY"), len("MKXXTA"), len("MKT")]
    time = line_of(lines, "time:")
    assert f"to embed {tokens + sum(odd) + 2 * len(odd):,} tokens" in time
    again = sum(min(len(record.seq), LIMIT) + 2 for record in SeqIO.parse(inputs / "again.faa", "fasta"))
    assert float(identical[2]) == pytest.approx(
        100 * again / (tokens + again + sum(odd) + 2 * len(odd)), abs=0.06
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"format": Format.fair_esm, "long": Long.skip},
        {"format": Format.npy, "include": [Include.per_tok], "save_dtype": SaveDtype.float16},
        {
            "format": Format.h5,
            "include": [Include.bos, Include.per_tok],
            "long": Long.window,
            "window_overlap": 20,
        },
        {"format": Format.safetensors, "max_proteins_per_output": 25},
    ],
    ids=["pt", "fair_esm", "npy", "h5", "safetensors"],
)
def test_outputs_take_what_the_plan_says_and_what_is_done_is_taken_off(capsys, tmp_path, overrides):
    folder = write_files(tmp_path / "in", a=records(60, 1, most=60), b=records(40, 2, most=60))
    config = make_config(str(folder), tmp_path / "out", truncation_seq_length=50, **overrides)
    config.model = ModelConfig("esm2_t6_8M_UR50D", 6, 320, 20, "random")
    lines = told_by(capsys, config)
    told = re.match(r"outputs: about ([\d.]+) (k|M)B in (\d+) files", line_of(lines, "outputs:"))
    assert run(config, World(None, 0, 1, 0, 1)) == 0
    written = [
        path
        for path in (tmp_path / "out").rglob("*")
        if ".dist_esm" not in path.parts and not path.name.endswith(("report.json", ".html", ".records.tsv"))
    ]
    num_bytes = sum(path.stat().st_size for path in written if path.is_file())
    assert float(told[1]) * {"k": 1e3, "M": 1e6}[told[2]] == pytest.approx(num_bytes, rel=0.04)
    assert int(told[3]) == pytest.approx(len(written), abs=1)
    capsys.readouterr()
    write(folder / "c.fasta", records(7, 3))
    before = tree(tmp_path)
    lines = told_by(capsys, config)
    assert line_of(lines, "done by") == "done by earlier launches: 2 of 3 files, 100 proteins"
    assert line_of(lines, "rank 0").endswith("1 unit, 7 sequences")
    assert tree(tmp_path) == before


def test_a_bin_that_is_too_large_is_sampled_and_the_plan_says_so(capsys, monkeypatch, tmp_path):
    files = {f"f{i:02}": records(20, i) for i in range(30)}
    folder = write_files(tmp_path / "in", **files)
    config = make_config(str(folder), tmp_path / "out")
    exact = line_of(told_by(capsys, config), "time:")
    monkeypatch.setattr(reading, "READ_BYTES", 20_000)
    lines = told_by(capsys, config)
    found = re.search(r"by a sample of (\d+) of 600 proteins, ([\d.]+)%", line_of(lines, "letters"))
    assert 100 < int(found[1]) < 300
    assert float(found[2]) == pytest.approx(int(found[1]) / 6, abs=0.06)
    of_sample, of_all = (
        int(re.search(r"to embed ([\d,]+) tokens", time)[1].replace(",", ""))
        for time in (line_of(lines, "time:"), exact)
    )
    assert of_sample == pytest.approx(of_all, rel=0.02)


def test_identical_sequences_are_counted_as_a_run_saves_them(tmp_path):
    folder = write_files(tmp_path / "in", a=records(50, 1) + records(50, 1), b=records(50, 1))
    config = make_config(str(folder), tmp_path / "out", truncation_seq_length=LIMIT)
    read = read_bin(agree_on_plan(config, find_files([str(folder)]), [], World(None, 0, 1, 0, 1)), 0, config)
    done = embed_directory(folder, tmp_path / "out", truncation_seq_length=LIMIT)
    assert read.tally.deduplicated == done.report.records["deduplicated"] == 100
    assert read.tokens == done.engine.num_tokens


@pytest.mark.distributed
def test_two_ranks_say_the_same_together_and_write_nothing_anywhere(inputs, tmp_path):
    homes = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME")}
    for home in homes.values():
        Path(home).mkdir()
    overrides = ["job=plan", f"input={inputs}", f"output_dir={tmp_path / 'out'}", MODEL]
    overrides += ["model.weights=random", "unit_share=0.2"]
    before = tree(inputs, tmp_path)
    told = [
        run_ranks(None, *overrides, **homes),
        run_ranks(2, *overrides, **homes),
        run_ranks(None, "ranks=2", *overrides, **homes),
    ]
    assert [result.returncode for result in told] == [0, 0, 0], [result.stderr for result in told]
    assert tree(inputs, tmp_path) == before
    one, *two = ([line for line in result.stdout.splitlines() if line] for result in told)
    fixed = ("inputs:", "passed", "long:", "changed:", "skipped:", "will fail:", "warning:", "outputs:")
    number = len(lengths_of(inputs))
    for lines in two:
        for beginning in fixed:
            shown = [[line for line in of if line.strip().startswith(beginning)] for of in (lines, one)]
            assert [line.partition(";")[0] for line in shown[0]] == [
                line.partition(";")[0] for line in shown[1]
            ]
        loads = [int(re.search(r"([\d,]+) sequences", line_of(lines, f"rank {rank}"))[1]) for rank in (0, 1)]
        assert sum(loads) == number
        balance = float(re.search(r"([\d.]+)%", line_of(lines, "balance:"))[1])
        assert balance == pytest.approx(100 * sum(loads) / 2 / max(loads), abs=0.06)
        assert sum(line == "ok: a run would start" for line in lines) == 1


class Served(BaseHTTPRequestHandler):
    """A server that has every file and is asked for none."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_weights_that_are_not_here_are_looked_for_and_not_fetched(capsys, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = make_config(str(inputs), tmp_path / "out")
    config.model.name, config.model.weights = "esm2_t6_8M_UR50D", None
    monkeypatch.setattr(locate, "URL", "http://127.0.0.1:9/{name}.pt")
    with pytest.raises(RefusedError, match=r"esm2_t6_8M_UR50D\.pt is missing and .* cannot be downloaded"):
        plan(config, World(None, 0, 1, 0, 1))
    lines = capsys.readouterr().out.splitlines()
    assert line_of(lines, "weights:") == "weights: cannot be had"
    assert line_of(lines, "inputs:").startswith("inputs: 7 files")
    assert "ok: a run would start" not in lines
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(locate, "URL", f"http://127.0.0.1:{server.server_port}/{{name}}.pt")
        lines = told_by(capsys, config)
    finally:
        server.shutdown()
        server.server_close()
    assert line_of(lines, "weights:").startswith(
        "weights: not on this machine, a run downloads them first: http:"
    )
    assert lines[-1] == "ok: a run would start"
    assert list(tmp_path.iterdir()) == []


def refused_with(config: Config, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        plan(config, World(None, 0, 1, 0, 1))


def test_a_plan_is_refused_for_what_a_run_is_refused_for(inputs, tmp_path):
    before = tree(inputs)
    out = tmp_path / "out"
    refused_with(make_config(str(tmp_path / "no"), out), "does not exist: name a FASTA file")
    refused_with(make_config(str(inputs), Path("/proc/out")), r"output_dir=/proc/out cannot be written to")
    refused_with(
        make_config(str(inputs), inputs / "odd.fas" / "out"), r"cannot be written to \(Not a directory\)"
    )
    twins = write_files(tmp_path / "twins", a=records(3, 1))
    shutil.copy(twins / "a.fasta", twins / "a.faa")
    refused_with(make_config(str(twins), out), "would both be written to a_ESM")
    os.mkfifo(tmp_path / "pipe")
    refused_with(make_config(str(tmp_path / "pipe"), out), "is a pipe, which can be read once, and job=")
    assert not out.exists()
    embed_directory(twins / "a.fasta", out)
    refused_with(
        make_config(str(twins / "a.fasta"), out, save_dtype=SaveDtype.float16),
        "save_dtype='float32' before, 'float16' now",
    )
    with FileLock(out / ".dist_esm" / "lock"):
        refused_with(make_config(str(twins / "a.fasta"), out), "is in use by another run")
    assert plan(make_config(str(twins / "a.fasta"), out), World(None, 0, 1, 0, 1)) == 0
    assert tree(inputs) == before


def test_outputs_that_cannot_fit_are_refused_by_plan_and_run_before_the_model_is_loaded(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    bytes_of_residue = 34 * 1280 * 4
    num_residues = 2 * free // bytes_of_residue
    if num_residues > 50_000_000:
        pytest.skip(f"{free / 1e12:.1f} TB are free: the input would be too large")
    sequence = random_sequence(1000)
    write(
        tmp_path / "a.fasta",
        "".join(f">{i}\n{sequence}\n" for i in range(num_residues // 1000 + 1)),
    )
    overrides = [f"input={tmp_path / 'a.fasta'}", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    overrides += ["model=esm2_t33_650M_UR50D", "model.weights=random", "include=per_tok"]
    overrides += [f"repr_layers=[{','.join(map(str, range(34)))}]"]
    for job in ("plan", "embed"):
        result = run_ranks(None, f"job={job}", *overrides)
        assert result.returncode == 1
        assert re.search(
            r"error: output_dir=\S+ has \S+ \wB free, and the numbers alone take \S+ \wB: name an output_dir "
            r"with more room, or use save_dtype=float16, which halves them, or use include=\[mean\]",
            result.stderr,
        )
        assert "loaded in" not in result.stderr
        assert (tmp_path / "out").exists() == (job == "embed")
    warning = r"esm2_t33_650M_UR50D on a CPU of \d+ cores takes about .*: model=esm2_t12_35M_UR50D would take"
    assert len(re.findall(warning, result.stderr)) == 1


@pytest.mark.distributed
def test_a_run_says_in_short_what_it_is_about_to_do(inputs, tmp_path):
    overrides = [f"input={inputs}", f"output_dir={tmp_path / 'out'}", MODEL, "model.weights=random"]
    result = run_ranks(2, *overrides, f"truncation_seq_length={LIMIT}")
    said = [line.partition(" INFO ")[2] for line in result.stderr.splitlines() if " INFO " in line]
    starts = [line.partition(":")[0] for line in said]
    assert starts[:4] == ["inputs", "long", "outputs", "ranks"]
    lengths = lengths_of(inputs)
    assert said[0].startswith(
        f"inputs: 7 files, {len(lengths)} proteins, {sum(lengths):,} residues, the longest {max(lengths)}; "
        "lengths 0-99: "
    )
    assert f"long: {sum(length > LIMIT for length in lengths)} proteins of more than" in said[1]
    assert said[3].startswith("ranks: 2 ranks, 2 to 5 units each, 99% balanced; about ")
    assert next(place for place, line in enumerate(said) if "loaded in" in line) > 3


def test_a_run_that_embeds_nothing_says_so(tmp_path):
    write(tmp_path / "a.fasta", ">empty\n>chains\nMKTA:MKTA\n")
    overrides = [f"input={tmp_path / 'a.fasta'}", f"output_dir={tmp_path / 'out'}", MODEL]
    result = run_ranks(None, *overrides, "model.weights=random", "verbosity=quiet")
    words = "nothing was embedded: the inputs hold no protein that the policies let pass"
    assert result.returncode == 0
    assert result.stdout.splitlines()[1] == words
    assert f"WARNING {words}" in result.stderr


def test_a_plan_by_the_test_proteins_says_what_a_run_of_them_does(capsys, tmp_path):
    done = embed_directory(PROTEINS, tmp_path / "out")
    capsys.readouterr()
    lines = told_by(capsys, make_config(str(PROTEINS), tmp_path / "elsewhere"))
    assert line_of(lines, "inputs:").startswith(
        f"inputs: {len(done.report.files)} files, {done.report.records['in']} proteins, "
    )
    assert f"to embed {done.engine.num_tokens:,} tokens" in line_of(lines, "time:")


@pytest.mark.gpu
def test_a_gpu_is_measured_in_speed_and_memory(inputs, tmp_path):
    overrides = [f"input={inputs}", f"output_dir={tmp_path / 'out'}", MODEL, "model.weights=random"]
    result = run_ranks(None, "job=plan", *overrides, CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "with packs on their way (measured); cuda:0" in line_of(lines, "memory:")
    assert "(measured here for 2." in line_of(lines, "time:")
    assert not (tmp_path / "out").exists()


def test_the_process_of_a_refused_plan_ends_with_1_and_one_line(tmp_path):
    result = run_ranks(None, "job=plan", f"input={tmp_path / 'no'}", MODEL, "model.weights=random")
    assert result.returncode == 1
    assert re.fullmatch(r"dist_esm: error: input=\S+ does not exist: .*\n", result.stderr)
