"""Names of any characters: embedded, reported and read back, and never raw where a person reads."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dist_esm import load
from dist_esm.config import Format
from dist_esm.names import NAME_BYTES, escaped_field, fitted, output_path, printable
from helpers.command import MODEL, run_ranks
from helpers.standin import embed_directory, expected

NAMES = [
    b"n" * 230,
    b"m" * 252,
    "蛋".encode() * 80,
    b"a|b",
    b"new\nline",
    b"esc\x1b[31mred",
    b"latin\xe9",
    b"tab\tcr\rbell\x07",
    b"c1\xc2\x9b31m",
    b"line\xe2\x80\xa8bidi\xe2\x80\xae",
    b"back\\slash",
    b"it's",
    b" blanks ",
    b"50%7C",
]
FASTA = b">p\x1b[31m|x one\nMKTAYIAKQR\n>q\nMK?V\n"
PROTEINS = [("p\x1b[31m|x", "MKTAYIAKQR"), ("q", "MKXV")]
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")
"""What no text for people may hold, but for the ends of its lines."""


def write_named(folder: Path, name: bytes, content: bytes) -> None:
    with open(os.path.join(os.fsencode(folder), name + b".fa"), "wb") as file:
        file.write(content)


def undone(field: str) -> str:
    """A field of failed_files.txt as docs/reference.md says to undo it."""
    return field.encode("ascii", "backslashreplace").decode("unicode_escape")


@pytest.mark.parametrize("kind", list(Format))
def test_any_name_is_embedded_reported_and_read_back(tmp_path, kind):
    (tmp_path / "in" / "dir\n|\udce9").mkdir(parents=True)
    for name in NAMES:
        write_named(tmp_path / "in", name, FASTA)
    write_named(tmp_path / "in" / "dir\n|\udce9", b"x", FASTA)
    done = embed_directory(tmp_path / "in", tmp_path / "out\udce9", format=kind)
    assert done.report.status == "complete"
    paths = {os.fsencode(os.path.basename(entry.path)).removesuffix(b".fa") for entry in done.report.files}
    assert paths == {*NAMES, b"x"}
    run = load(tmp_path / "out\udce9")
    num_files = len(NAMES) + 1
    assert run.ids == [name for name, _ in PROTEINS] * num_files
    assert np.array_equal(run.vectors, [expected(residues).mean for _, residues in PROTEINS] * num_files)
    assert len(set(run.sources)) == num_files
    embed_directory(tmp_path / "in", tmp_path / "out\udce9", format=kind, resume=False)
    assert load(tmp_path / "out\udce9").ids == run.ids


def test_failures_are_told_on_one_line_that_can_be_undone(tmp_path, capsys):
    for name in NAMES:
        write_named(tmp_path, b"bad" + name[:200], b"\x1b]0;title\x07")
    write_named(tmp_path, b"badtext", "\u202e|text\n".encode())
    write_named(tmp_path, b"good", b">p\nMKV\n")
    done = embed_directory(tmp_path, tmp_path / "out")
    lines = (tmp_path / "out" / "failed_files.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert len(lines) == len(NAMES) + 1
    for line, failure in zip(lines, done.report.failed, strict=True):
        assert not RAW.search(line)
        assert [undone(field) for field in line.split("|")] == [
            failure.path,
            failure.error_type,
            failure.error_message,
        ]
        assert os.path.exists(undone(line.split("|")[0]))
        assert not RAW.search(failure.error_message)
    printed = capsys.readouterr().out
    assert "badback\\slash.fa" in printed
    assert not RAW.search(printed)


def test_a_table_of_records_has_no_control_characters(tmp_path):
    write_named(tmp_path, b"a", ">p\x1b[31m\x9b|x\nMK?V\n>q\nMK\x9bV\n".encode())
    embed_directory(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "a_ESM.records.tsv").read_text(encoding="utf-8")
    assert not RAW.search(text.replace("\t", ""))
    assert r"p\x1b[31m\x9b|x" in text


def test_files_of_an_output_have_names_that_fit(tmp_path):
    text = b">a\nMK?\n>b\nMKV\n>c\n\n>d\nMKVV\n>e\nMMK\n"
    for name in (b"n" * 230, b"m" * 252, "蛋".encode() * 80):
        write_named(tmp_path, name, text)
    out = tmp_path / "out"
    for size, parts in ((100, [""]), (2, [".part00001", ".part00002", ".part00003"])):
        done = embed_directory(tmp_path, out, max_proteins_per_output=size, resume=False)
        assert done.report.status == "complete"
        assert load(out).ids == list("abde") * 3
        assert len(list(out.glob("*.pt"))) == 3 * len(parts)
        assert all(f"_ESM{part}." in path.name for part in parts for path in out.glob(f"*{part}.pt"))
        assert len(list(out.glob("*.records.tsv"))) == 3 * min(2, len(parts))


def test_a_file_that_is_cut_leaves_shards_of_short_names(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    for name in (b"n" * 252, b"latin\xe9"):
        write_named(tmp_path, name, b"".join(b">p%d\nMKTAYIAKQR\n" % i for i in range(30)))
    done = embed_directory(tmp_path, tmp_path / "out\udce9", unit_share=0.1)
    assert done.report.status == "complete"
    assert all(entry.units > 2 for entry in done.report.files)
    assert load(tmp_path / "out\udce9").ids == [f"p{i}" for i in range(30)] * 2


def test_an_output_whose_path_is_too_long_fails_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("in", *["d" * 250] * 15)
    descriptor = os.open(".", os.O_RDONLY)
    for folder in Path(deep).parts:
        os.mkdir(folder, dir_fd=descriptor)
        descriptor = os.open(folder, os.O_RDONLY, dir_fd=descriptor)
    with os.fdopen(os.open("x.fa", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor), "wb") as file:
        file.write(b">p\nMKV\n")
    write_named(tmp_path / "in", b"good", b">p\nMKVV\n")
    done = embed_directory("in", tmp_path / ("o" * 200))
    assert [entry.output for entry in done.report.files] == ["good_ESM.pt"]
    assert "name an output_dir with a shorter path" in done.failure("x.fa")
    assert done.engine.num_tokens == 6
    assert embed_directory("in", Path("out")).report.status == "complete"


@pytest.mark.distributed
def test_ranks_and_their_log_take_any_name(tmp_path):
    (tmp_path / "in").mkdir()
    for name in NAMES[3:9]:
        write_named(tmp_path / "in", name, FASTA)
        write_named(tmp_path / "in", b"dna" + name, b">d\n" + b"ACGT" * 9 + b"\n")
    write_named(tmp_path / "in", b"passed\x1b[31mover\n.pep", b"")
    os.rename(tmp_path / "in/passed\x1b[31mover\n.pep.fa", tmp_path / "in/passed\x1b[31mover\n.p\x1b")
    done = run_ranks(2, f"input={tmp_path}/in", f"output_dir={tmp_path}/o\udce9\x1b", MODEL, "device=cpu",
                     "model.weights=random")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not RAW.search(done.stdout + done.stderr)
    assert r"dnaesc\x1b[31mred.fa looks like DNA" in done.stderr
    assert len(json.loads((tmp_path / "o\udce9\x1b/report.json").read_text())["files"]) == 12


@pytest.mark.parametrize(
    "words",
    [
        ["input=no\nsuch\x1b[31m\udce9.fa"],
        ["input=[no\x1b,such]"],
        ["input=.", "output_dir=/proc/no\x1b\n"],
        ["input=.", "inclu\x1bde=mean"],
        ["input=.", "include=me\x1ban"],
        ["in\nput\x1b"],
        ["--in\nput\x1b"],
        ["input=.", "model=es\x1bm2"],
        ["input=.", "model=esm2_t6_8M_UR50D", "model.weights=no\x1b\nsuch\udce9.pt"],
        ["input=.", "truncation_seq_length=1\x1b0"],
    ],
)
def test_an_error_line_has_no_control_characters(tmp_path, monkeypatch, words, capfd):
    from dist_esm.__main__ import main

    monkeypatch.chdir(tmp_path)
    write_named(tmp_path, b"a", FASTA)
    assert main([*words, "device=cpu"]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("dist_esm: error: ")
    assert not RAW.search(error)
    assert r"\x1b" in error


def test_text_for_people_is_escaped_and_names_are_cut_by_their_bytes():
    assert printable("αβ 🧬 sp|P12345|X") == "αβ 🧬 sp|P12345|X"
    assert printable("a\n\r\t\x1b\x9b\u202e\udce9\U000e0001") == r"a\n\r\t\x1b\x9b\u202e\udce9\U000e0001"
    for text in ("a|b", "a\\nb\n", "蛋\udce9\\", r"\x7c|", ""):
        assert undone(escaped_field(text)) == text
        assert "|" not in escaped_field(text)
    assert fitted("a" * 250, ".part") == "a" * 250 + ".part"
    for name in ("a" * 251, "蛋" * 84, "\udce9" * 300):
        short = fitted(name, ".part")
        assert len(os.fsencode(short)) <= NAME_BYTES
        assert re.fullmatch(r".+~h[0-9a-f]{16}\.part", short)
    assert fitted("a" * 300) != fitted("a" * 301)
    assert re.fullmatch(r"a+~h[0-9a-f]{16}_ESM\.pt", output_path(Path("a" * 300 + "_ESM"), ".pt").name)
