"""An output directory that somebody prepared: nothing outside it is touched, and no count is believed."""

from __future__ import annotations

import json
import os
import socket
import zlib
from pathlib import Path

import pytest

from dist_esm import load
from dist_esm.config import Format
from dist_esm.distributed import RefusedError
from dist_esm.jobs.report.job import rebuild_report
from helpers.standin import embed_directory


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "in" / f"{name}.fa").write_text(">p\nMKV\n>q\nMKVV\n")
    return tmp_path / "in"


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """Files outside the output directory, which nobody may change."""
    (tmp_path / "thesis").mkdir()
    for name in ("one.txt", "a_ESM.pt", "b_ESM.pt", "b_ESM.records.tsv", "000.jsonl", "x.pt"):
        (tmp_path / "thesis" / name).write_text("five years")
    return tmp_path / "thesis"


def is_as_it_was(thesis: Path) -> bool:
    texts = [path.read_text() for path in thesis.rglob("*") if path.is_file()]
    return texts == ["five years"] * 6 and thesis.stat().st_nlink == 2


def journal_of(out: Path) -> Path:
    (path,) = (out / ".dist_esm" / "journal").glob("*.jsonl")
    return path


def rewrite(out: Path, change) -> None:
    """Change each line of the journal, with its checksum right."""
    path = journal_of(out)
    lines = []
    for line in path.read_bytes().splitlines():
        content = json.loads(line.rpartition(b"\t")[0])
        change(content)
        text = json.dumps(content).encode()
        lines.append(text + b"\t%08x\n" % zlib.crc32(text))
    path.write_bytes(b"".join(lines))


def setter(*keys):
    """A function that puts the last of these under the others."""
    *keys, last, value = keys

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


OUTSIDE = [
    setter("written", 0, "path", "../thesis/a_ESM.pt"),
    setter("written", 0, "path", "sub/../../thesis/a_ESM.pt"),
    setter("written", 0, "path", ".dist_esm/shards/../../../thesis/x.pt"),
    setter("output", "../thesis/b_ESM"),
    setter("output", "/etc/passwd"),
    lambda content: content.update(
        output="../thesis/b_ESM", written=[{**content["written"][0], "path": "../thesis/b_ESM.pt"}]
    ),
    setter("written", 0, "path", ".dist_esm/settings.json"),
    setter("written", 0, "path", ".dist_esm/shards/../settings.json"),
    setter("written", 0, "path", ""),
    setter("written", 0, "path", "."),
    setter("written", 0, "path", "./a_ESM.pt"),
    setter("written", 0, "path", "/etc/passwd"),
    setter("written", 0, "path", "a_ESM.pt/../b.pt"),
    setter("written", 0, "path", "a_ESM.pt\0"),
    setter("written", 0, "path", 5),
    setter("output", None),
    setter("source", ["a.fa"]),
]
IMPOSSIBLE = [
    setter("tally", "outcomes", {"ok": -2}),
    setter("tally", "outcomes", {"ok": 5, "skipped": -3}),
    setter("tally", "outcomes", {"ok": 2.0}),
    setter("tally", "outcomes", {"ok": True, "skipped": 1}),
    setter("tally", "outcomes", {"fine": 2}),
    setter("tally", "outcomes", ["ok"]),
    setter("tally", "residues", -7),
    setter("tally", "residues", "7"),
    setter("tally", "skipped", {"x": -1}),
    setter("tally", "changed", {"records": -1}),
    setter("tally", "replaced", {"J": -1}),
    setter("tally", "duplicate_ids", -1),
    setter("tally", "windows", None),
    setter("rank", -1),
    setter("seconds", -1.0),
    setter("seconds", float("nan")),
    setter("seconds", "1"),
    setter("written", 0, "num_bytes", -1),
    setter("written", 0, "sha256", None),
    setter("slices", [[-5, None]]),
    setter("slices", [[0, -1]]),
    setter("digests", ["a", "b"]),
    setter("digests", [None]),
]


@pytest.mark.parametrize("change", OUTSIDE + IMPOSSIBLE)
def test_a_journal_that_no_run_wrote_is_refused(tmp_path, inputs, thesis, change):
    out = tmp_path / "out"
    embed_directory(inputs / "a.fa", out)
    for path in (out / "notes.txt", out / "sub" / "b_ESM.pt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    rewrite(out, change)
    before = sorted(out.rglob("*"))
    for resume in (False, True):
        with pytest.raises(RefusedError, match=r"jsonl .*name another output_dir") as refused:
            embed_directory(inputs / "a.fa", out, resume=resume)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="jsonl"):
        load(out).ids  # noqa: B018
    assert is_as_it_was(thesis)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("path", ["notes.txt", "sub", "sub/b_ESM.pt", "a_ESM.txt", "report.json"])
def test_what_is_no_output_is_not_removed_because_the_journal_says_so(tmp_path, inputs, path):
    out = tmp_path / "out"
    embed_directory(inputs / "a.fa", out)
    for name in ("notes.txt", "sub/b_ESM.pt", "a_ESM.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    rewrite(out, setter("written", 0, "path", path))
    with pytest.raises(RefusedError, match=r"and it is none: .*name another output_dir"):
        embed_directory(inputs / "a.fa", out, resume=False)
    assert (out / path).exists()
    assert (out / "a_ESM.pt").exists()


def link_inside(out: Path, thesis: Path, what: str) -> None:
    inside = out / ".dist_esm"
    if what == ".dist_esm":
        inside.rename(thesis.parent / "moved")
        inside.symlink_to(thesis)
    elif what.startswith("hard link"):
        (inside / "lock").unlink()
        os.link(thesis / "one.txt", inside / "lock")
    elif what.endswith("/"):
        (inside / what).mkdir(exist_ok=True)
        (inside / what / "0.00000.jsonl").symlink_to(thesis / "000.jsonl")
    elif what.startswith("pipe"):
        (inside / what.removeprefix("pipe ")).unlink(missing_ok=True)
        os.mkfifo(inside / what.removeprefix("pipe "))
    elif what.startswith("socket"):
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(inside)
            listening.bind("socket")
    elif what.startswith("folder"):
        (out / what.removeprefix("folder ")).unlink(missing_ok=True)
        (out / what.removeprefix("folder ")).mkdir()
    else:
        path = inside / what
        if path.is_dir():
            path.rename(thesis.parent / "moved")
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(thesis if "." not in what and what != "lock" else thesis / "one.txt")


@pytest.mark.parametrize(
    "what",
    [
        *(".dist_esm", "lock", "settings.json", "config.json", "suspects.json"),
        *(
            "journal",
            "launches",
            "scratch",
            "shards",
            "pieces",
            "in_hand",
            "pipes",
            "other",
            "logs",
            "events",
        ),
        *("journal/", "launches/", "in_hand/", "shards/"),
        *("hard link to lock", "pipe lock", "pipe journal/0.jsonl", "pipe settings.json", "socket"),
        *("folder report.json", "folder failed_files.txt"),
    ],
)
def test_nothing_is_done_where_dist_esm_holds_links(tmp_path, monkeypatch, inputs, thesis, what):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    embed_directory(inputs, out)
    link_inside(out, thesis, what)
    for resume in (True, False):
        with pytest.raises(RefusedError, match="name another output_dir"):
            embed_directory(inputs, out, resume=resume)
    assert is_as_it_was(thesis)
    assert (out / "a_ESM.pt").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_outputs_are_neither_written_nor_removed_through_a_link_that_leads_out(
    tmp_path, inputs, thesis, resume
):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    (out / "sub").rename(tmp_path / "moved")
    (out / "sub").symlink_to(thesis)
    with pytest.raises(RefusedError, match=r"is a link to .*outside output_dir.*: replace it by a folder"):
        embed_directory(inputs, out, resume=resume)
    assert is_as_it_was(thesis)
    assert (out / "a_ESM.pt").exists()
    (out / "sub").unlink()
    (out / "sub").mkdir()
    assert embed_directory(inputs, out, resume=resume).report.status == "complete"


@pytest.mark.parametrize("kind", [Format.pt, Format.fair_esm])
@pytest.mark.parametrize("resume", [True, False])
def test_of_an_output_that_is_a_link_the_link_alone_goes(tmp_path, inputs, thesis, kind, resume):
    out = tmp_path / "out"
    output = out / embed_directory(inputs / "a.fa", out, format=kind).report.files[0].output
    output.rename(tmp_path / "moved")
    output.symlink_to(thesis if kind is Format.fair_esm else thesis / "one.txt")
    try:
        status = embed_directory(inputs / "a.fa", out, format=kind, resume=resume).report.status
    except RefusedError:
        status = "refused"
    assert is_as_it_was(thesis)
    assert status in ("complete", "partial")


def test_a_folder_that_holds_more_than_embeddings_is_not_removed(tmp_path, inputs):
    out = tmp_path / "out"
    output = out / embed_directory(inputs / "a.fa", out, format=Format.fair_esm).report.files[0].output
    (output / "mine").mkdir()
    with pytest.raises(RefusedError, match="move it away"):
        embed_directory(inputs / "a.fa", out, format=Format.fair_esm, resume=False)
    assert (output / "mine").is_dir()
    assert (output / "ids.tsv").is_file()


def test_a_pipe_in_an_outputs_place_is_no_output(tmp_path, inputs):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    (out / "a_ESM.pt").unlink()
    os.mkfifo(out / "a_ESM.pt")
    done = embed_directory(inputs, out)
    assert [entry.resumed for entry in done.report.files] == [False, True]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("settings.json", '{"format": 3, "settings": []}'),
        ("settings.json", '{"format": 3, "settings": null}'),
        ("settings.json", '{"format": -1, "settings": {}}'),
        ("settings.json", '{"format": true, "settings": {}}'),
        ("settings.json", "[]"),
        ("settings.json", "\x1b[31m"),
        ("suspects.json", '{"units": {"0 a_ESM": {"seen": -5}}}'),
        ("suspects.json", '{"units": {"0 a_ESM": {"seen": "x"}}}'),
        ("suspects.json", '{"units": {"0 a_ESM": {"how": 5}}}'),
        ("suspects.json", '{"units": []}'),
        ("launches/" + "9" * 20 + ".json", "{}"),
        ("launches/" + "9" * 200 + ".json", "{}"),
    ],
)
def test_files_that_cannot_be_understood_are_refused_in_one_line(tmp_path, inputs, path, text):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    (out / ".dist_esm" / path).write_text(text)
    with pytest.raises(RefusedError) as refused:
        embed_directory(inputs, out)
    assert path.partition("/")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[]",
        '"submit"',
        "{}",
        '{"read": 5}',
        '{"submit": 5}',
        '{"submit": [[]], "proteins": {}}',
        "\udce9",
    ],
)
def test_notes_that_no_rank_wrote_blame_nothing(tmp_path, inputs, line):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    folder = out / ".dist_esm" / "in_hand"
    folder.mkdir(exist_ok=True)
    (folder / "1.0.jsonl").write_bytes(os.fsencode(line) + b"\n")
    (folder / "1.0.ended").write_bytes(b"\xff\x1b[31m")
    (folder / "folder").mkdir()
    assert embed_directory(inputs, out, resume=True).report.status == "complete"
    assert embed_directory(inputs, out, resume=False).report.status == "complete"


@pytest.mark.parametrize(
    "inputs_of_launch",
    [
        "[5]",
        '[{"path": [], "source": "a", "output": "b"}]',
        '[{"path": "a", "source": "a", "output": "../a"}]',
        "5",
        "null",
    ],
)
def test_a_launch_that_cannot_be_understood_is_one_line(tmp_path, inputs, inputs_of_launch):
    embed_directory(inputs, tmp_path / "out")
    path = tmp_path / "out" / ".dist_esm" / "launches" / f"{2:020d}.json"
    path.write_text(f'{{"format": 3, "inputs": {inputs_of_launch}}}')
    with pytest.raises(ValueError, match="cannot be understood"):
        load(tmp_path / "out", run="last")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("launches", {"format": 3, "launch": 7, "plan": {"units": [[0]], "quarantined": []}, "inputs": []}),
        ("launches", {"format": 3, "launch": 7, "plan": 5, "inputs": []}),
        ("launches", {"format": 3, "plan": {}, "inputs": []}),
        ("events", {"event": "conclude"}),
        ("events", {"at": "then", "event": "fail", "file": [], "failure": {}}),
        ("events", [5]),
    ],
)
def test_a_report_of_what_cannot_be_understood_is_refused_in_one_line(tmp_path, inputs, path, content):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    text = json.dumps(content).encode()
    if path == "launches":
        (out / ".dist_esm" / path / f"{7:020d}.json").write_bytes(text)
    else:
        with (out / ".dist_esm" / path / f"{1:020d}.00000.jsonl").open("ab") as file:
            file.write(text + b"\t%08x\n" % zlib.crc32(text))
    with pytest.raises(ValueError, match="cannot be understood") as refused:
        rebuild_report(out)
    assert "\n" not in str(refused.value)


def test_a_report_is_not_made_where_dist_esm_holds_links(tmp_path, inputs, thesis):
    out = tmp_path / "out"
    embed_directory(inputs, out)
    link_inside(out, thesis, "lock")
    with pytest.raises(ValueError, match="name another output_dir"):
        rebuild_report(out)
    assert is_as_it_was(thesis)
