"""An output directory in the hands of one launch after another: what it keeps, what it clears, what it
refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from dist_esm.config import Config
from dist_esm.distributed import RefusedError, World
from dist_esm.jobs import embed
from dist_esm.outputs.finished import finished_files
from dist_esm.outputs.journal import Entry, encode, read
from dist_esm.outputs.output_dir import OutputDir, read_settings
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.inputs import find_files
from dist_esm.types import Tally, WrittenFile
from dist_esm.version import code_version
from helpers.standin import embed_directory, make_config

# A directory as version 1 left it: the text of one input, its output, its line in the journal, and the
# settings.
TEXT_V1 = b">a\nMKTAY\n"
OUTPUT_V1 = b"an output of version 1"
JOURNAL_V1 = (
    b'{"output":"viruses/a_ESM","slices":[[0,null]],'
    b'"digests":["b08cf074208718a575154b97518c581ecbb8a6717f3603bef0b1c9535b3e4000"],'
    b'"written":[{"path":"viruses/a_ESM.pt","num_bytes":22,'
    b'"sha256":"0841136098c8c6f17316f9c60c8084a8813c101ea251426a9cca308eef511615"}],'
    b'"tally":{"outcomes":{"ok":1},"skipped":{},"changed":{},"residues":5,"duplicate_ids":0,"unnamed":0,'
    b'"windows":0,"deduplicated":0},"rank":0,"seconds":0.25,"is_joined":false}\t6026a807\n'
)
SETTINGS_V1 = {"model": "esm2_t6_8M_UR50D", "format": "pt", "include": ["mean"]}
JOURNAL_NAME_V1 = "01764115000000000000.00000.jsonl"


def open_alone(output_dir: Path, settings: dict | None = None, resume: bool = True):
    config = Config(input="in", output_dir=output_dir, resume=resume)
    return OutputDir.open(config, settings or {}, World(None, 0, 1, 0, 1))


def entry_for(output: str, path: str, slices=((0, None),), digests=("d",), **more) -> Entry:
    written = [WrittenFile(path, 1, "s")]
    return Entry(
        output, f"{output}.fasta", list(slices), list(digests), written, Tally({"ok": 1}), 0, 1.0, **more
    )


def make_v1(folder: Path) -> Path:
    (folder / "in" / "viruses").mkdir(parents=True)
    (folder / "in" / "viruses" / "a.fasta").write_bytes(TEXT_V1)
    (folder / "in" / "b.fasta").write_text(">b\nMKT\n")
    out = folder / "out"
    (out / ".dist_esm" / "journal").mkdir(parents=True)
    (out / "viruses").mkdir()
    (out / "viruses" / "a_ESM.pt").write_bytes(OUTPUT_V1)
    (out / ".dist_esm" / "journal" / JOURNAL_NAME_V1).write_bytes(JOURNAL_V1)
    (out / ".dist_esm" / "settings.json").write_text(json.dumps(SETTINGS_V1, indent=1) + "\n")
    return out


def refusal(*args, **options) -> str:
    with pytest.raises(RefusedError) as caught, open_alone(*args, **options):
        pass
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


# Launches and locks.


def test_launches_are_counted_and_each_has_a_scratch_folder_of_its_own(tmp_path):
    for number in (1, 2, 3):
        with open_alone(tmp_path) as out:
            assert out.launch == number
            assert list(out.scratch.iterdir()) == []
            assert [path.name for path in out.scratch.parent.iterdir()] == [f"{number:020d}.00000"]
            out.journal.append([entry_for(f"{number}_ESM", "x.pt")])
        assert not (tmp_path / ".dist_esm" / "scratch").exists()
    with open_alone(tmp_path) as out:
        assert [entry.output for entry in out.entries] == ["1_ESM", "2_ESM", "3_ESM"]
        out.journal.append([entry_for("4_ESM", "x.pt")])
        assert [entry.output for entry in out.entries_of_this_launch()] == ["4_ESM"]
    with open_alone(tmp_path, resume=False) as out:
        assert (out.launch, out.entries) == (5, []), (
            "a number is never given twice, though the journal is gone"
        )
    assert read(tmp_path) == []


def test_the_inputs_of_a_launch_are_written_down_in_their_order(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.fasta", "a.fa"):
        (tmp_path / "in" / name).write_text(">x\nMK\n")
    files = find_files([str(tmp_path / "in")])
    with open_alone(tmp_path / "out") as out:
        out.record_inputs(files)
    content = json.loads((tmp_path / "out" / ".dist_esm" / "launches" / f"{1:020d}.json").read_text())
    assert (content["format"], content["launch"], content["dist_esm"]) == (5, 1, code_version())
    assert [(item["source"], item["output"]) for item in content["inputs"]] == [
        ("a.fa", "a_ESM"),
        ("b.fasta", "b_ESM"),
    ]


def test_a_directory_is_held_until_the_launch_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_esm.outputs.output_dir.LOCK_SECONDS", 0.2)
    with open_alone(tmp_path):
        assert "is in use by another run" in refusal(tmp_path)
    with open(tmp_path / ".dist_esm" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is in use by another run" in refusal(tmp_path)
    with open_alone(tmp_path):
        pass


def test_a_lock_that_is_a_link_leaves_what_it_points_to_as_it_was(tmp_path):
    (tmp_path / "out" / ".dist_esm").mkdir(parents=True)
    (tmp_path / "thesis").write_text("five years")
    (tmp_path / "out" / ".dist_esm" / "lock").symlink_to(tmp_path / "thesis")
    try:
        with open_alone(tmp_path / "out"):
            pass
    except RefusedError:
        pass
    assert (tmp_path / "thesis").read_text() == "five years"


# What is cleared.


def test_only_what_dead_launches_left_is_cleared(tmp_path):
    """Neither what others' editors left, nor a run in a directory below, nor what only looks like a temporary
    file of ours."""
    out = tmp_path / "out"
    with open_alone(out) as first:
        (first.scratch / "2").write_text("of a thread that ended early")
    assert not first.scratch.exists()
    half = first.scratch / "3"
    folder = first.scratch / "4"
    folder.mkdir(parents=True)
    half.write_text("half an output")
    (folder / "protein.pt").write_text("half a folder")
    report = out / f".report.json.{'0123456789abcdef' * 2}.tmp"
    beside = [
        report,
        *(
            out / ".dist_esm" / f".{name}.json.{'0123456789abcdef' * 2}.tmp"
            for name in ("settings", "suspects")
        ),
    ]
    for path in beside:
        path.write_text("half a report")
    nested = out / "nested"
    with open_alone(nested) as other:
        (other.scratch / "5").write_text("another run is writing this")
        shard = other.shards / "b_ESM.000000.pt"
        shard.parent.mkdir()
        shard.write_text("another run's")
        others = [
            other.scratch / "5",
            shard,
            out / ".notes.txt.123.tmp",
            out / "viruses" / ".a_ESM.pt.4567.tmp",
            out / f".thesis.docx.{'0' * 32}.tmp",
            out / "report.json.tmp",
            nested / report.name,
        ]
        (out / "viruses").mkdir()
        for path in others[2:]:
            path.write_text("not ours")
        with open_alone(out):
            assert all(path.exists() for path in others)
            assert not half.exists()
            assert not folder.exists()
            assert not any(path.exists() for path in beside)


def cut_and_joined(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A run over a file that was cut, and a copy of its shards as they were when they were joined."""
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    (tmp_path / "a.fasta").write_text("".join(f">p{i}\n{'ACDEFGHIKL' * (1 + i % 5)}\n" for i in range(40)))
    out, copy = tmp_path / "out", tmp_path / "copy"
    assemble = embed.assemble_output

    def copy_and_assemble(*arguments):
        shutil.copytree(out / ".dist_esm" / "shards", copy)
        return assemble(*arguments)

    monkeypatch.setattr(embed, "assemble_output", copy_and_assemble)
    run = embed_directory(tmp_path / "a.fasta", out, unit_share=0.1)
    assert run.report.files[0].units > 2
    monkeypatch.setattr(embed, "assemble_output", assemble)
    assert not list((out / ".dist_esm" / "shards").iterdir())
    return out, copy


def test_shards_that_a_kill_left_behind_their_join_are_cleared(tmp_path, monkeypatch):
    """As after kill -9 between the line of the joined file and the removal of its shards."""
    out, copy = cut_and_joined(tmp_path, monkeypatch)
    shutil.copytree(copy, out / ".dist_esm" / "shards", dirs_exist_ok=True)
    assert len(list((out / ".dist_esm" / "shards").rglob("*.pt"))) > 2
    with open_alone(out, read_settings(out)):
        assert not list((out / ".dist_esm" / "shards").iterdir())
    assert (out / "a_ESM.pt").exists()


def test_shards_that_are_not_joined_yet_or_whose_output_is_gone_are_kept(tmp_path, monkeypatch):
    """What they hold need not be computed again."""
    out, copy = cut_and_joined(tmp_path, monkeypatch)
    shards = out / ".dist_esm" / "shards"
    shutil.copytree(copy, shards, dirs_exist_ok=True)
    (shards / "stray_ESM.000000.pt").write_text("no entry speaks of it")
    (out / "a_ESM.pt").unlink()
    with open_alone(out, read_settings(out)):
        names = {path.name for path in shards.iterdir()}
    assert names == {path.name for path in copy.iterdir()}
    (journal,) = (out / ".dist_esm" / "journal").iterdir()
    journal.write_bytes(
        b"".join(line for line in journal.read_bytes().splitlines(True) if b'"is_joined":false' in line)
    )
    with open_alone(out, read_settings(out)) as opened:
        config = make_config(str(tmp_path / "a.fasta"), out, unit_share=0.1)
        plan = agree_on_plan(config, find_files(config.input_list()), opened.entries, World(None, 0, 1, 0, 1))
        assert len(plan.done) == len(plan.units) == len(names) - len(list(shards.glob("*.output")))
        assert plan.bins == ((),)


# Versions and settings.


def test_a_line_of_version_2_has_none_of_the_counts_that_came_later(tmp_path):
    content = json.loads(encode(entry_for("a_ESM", "a.pt")).rpartition(b"\t")[0])
    for name in ("replaced", "nucleotides", "more_chains", "latin1"):
        del content["tally"][name]
    journal = tmp_path / ".dist_esm" / "journal" / "00000000000000000001.00000.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(line({**content, "format": 2}))
    assert read(tmp_path) == [entry_for("a_ESM", "a.pt")]


def test_a_directory_of_version_1_is_gone_on_with(tmp_path):
    out = make_v1(tmp_path)
    with open_alone(out, SETTINGS_V1) as opened:
        assert opened.launch == 1764115000000000001
        (entry,) = opened.entries
        assert (entry.output, entry.source, entry.is_last) == ("viruses/a_ESM", "viruses/a.fasta", True)
        assert entry.tally == Tally({"ok": 1}, residues=5)
        config = make_config(str(tmp_path / "in"), out)
        plan = agree_on_plan(config, find_files(config.input_list()), opened.entries, World(None, 0, 1, 0, 1))
        assert [str(plan.files[result.file].output) for result in plan.done] == ["viruses/a_ESM"]
        assert [str(plan.files[plan.units[index].file].output) for index in plan.bins[0]] == ["b_ESM"]
        opened.journal.append([entry_for("b_ESM", "b_ESM.pt", is_last=True)])
    assert [entry.output for entry in read(out)] == ["viruses/a_ESM", "b_ESM"]
    assert list(finished_files(read(out))) == ["b_ESM", "viruses/a_ESM"]
    assert read_settings(out) == SETTINGS_V1
    assert json.loads((out / ".dist_esm" / "settings.json").read_text())["format"] == 5


def test_settings_of_version_1_are_compared_and_lack_the_version_of_numerics_because_it_was_the_first(
    tmp_path,
):
    out = make_v1(tmp_path)
    with open_alone(out, {**SETTINGS_V1, "numerics": 1}):
        pass
    assert "special_tokens=None before, 'skip' now" in refusal(out, {**SETTINGS_V1, "special_tokens": "skip"})
    assert "numerics=1 before, 2 now" in refusal(out, {**SETTINGS_V1, "numerics": 2})
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "in")
    out = make_v1(tmp_path)
    assert "numerics=1 before, 2 now" in refusal(out, {**SETTINGS_V1, "numerics": 2})
    assert "format='pt' before, 'h5' now" in refusal(out, {**SETTINGS_V1, "format": "h5"})
    with open_alone(out, {"format": "h5"}, resume=False):
        assert not (out / "viruses" / "a_ESM.pt").exists()


def line(content: object) -> bytes:
    text = json.dumps(content).encode()
    return text + b"\t%08x\n" % zlib.crc32(text)


GOOD = json.loads(encode(entry_for("a_ESM", "a.pt")).rpartition(b"\t")[0])
BROKEN = {
    "later": ({**GOOD, "format": 6}, "format version 6, and this version of dist_esm reads up to 5"),
    "no version": ({**GOOD, "format": "two"}, "format version 'two', which is none"),
    "unknown field": ({**GOOD, "mood": 1}, "Entry has 'mood', which is not known"),
    "missing field": ({key: GOOD[key] for key in GOOD if key != "tally"}, "Entry lacks 'tally'"),
    "version 1 without output": ({"slices": [[0, None]]}, "Entry lacks 'output'"),
    "another tally": ({**GOOD, "tally": {"outcomes": {}}}, "Tally lacks 'skipped'"),
    "tally of text": ({**GOOD, "tally": "many"}, "'many' in place of Tally"),
    "another output": ({**GOOD, "written": [{"path": "a"}]}, "WrittenFile lacks 'num_bytes'"),
    "outputs of text": ({**GOOD, "written": "a.pt"}, "without slices, digests or outputs"),
    "no slices": ({**GOOD, "slices": []}, "without slices, digests or outputs"),
    "odd slices": ({**GOOD, "slices": [[1, 2, 3]]}, "with slices [[1, 2, 3]]"),
    "a list": ([1, 2], "what dist_esm did not write"),
    "a number": (7, "what dist_esm did not write"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_is_whole_and_not_understood_is_one_line_that_names_the_file(tmp_path, name):
    content, problem = BROKEN[name]
    with open_alone(tmp_path):
        pass
    path = tmp_path / ".dist_esm" / "journal" / "00000000000000000007.00000.jsonl"
    path.write_bytes(encode(entry_for("a_ESM", "a.pt")) + line(content))
    for resume in (True, False):
        said = refusal(tmp_path, resume=resume)
        assert said.startswith(f"{path} ")
        assert problem in said
        assert said.endswith("use the version of dist_esm that wrote it, or name another output_dir")
    path.write_bytes(encode(entry_for("a_ESM", "a.pt")) + line(content)[:-3] + b"\n")
    assert [entry.output for entry in read(tmp_path)] == ["a_ESM"], "a damaged line is passed over"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"format": 6, "settings": {}}', "format version 6"),
        ('{"format": 2, ', "is damaged, it is no JSON"),
        ("[]", "what dist_esm did not write"),
    ],
)
def test_settings_that_are_not_understood_are_one_line_that_names_the_file(tmp_path, text, problem):
    with open_alone(tmp_path) as out:
        out.journal.append([entry_for("a_ESM", "a.pt")])
    path = tmp_path / ".dist_esm" / "settings.json"
    path.write_text(text)
    said = refusal(tmp_path)
    assert said.startswith(f"{path} ")
    assert problem in said


# What is finished.


def part(number: int, start: int, stop: int, digest: str = "d", is_last: bool | None = False) -> Entry:
    return entry_for("a_ESM", f"a_ESM.part{number:05d}.pt", [(start, stop)], [digest], is_last=is_last)


def changed(entry: Entry) -> Entry:
    """The same part embedded anew, of another text."""
    (written,) = entry.written
    return Entry(**{**vars(entry), "written": [WrittenFile(written.path, written.num_bytes, "other")]})


ONE, TWO, LAST = part(1, 0, 10), part(2, 10, 20), part(3, 20, 30, is_last=True)
SHARD = entry_for("a_ESM", ".dist_esm/shards/a_ESM.000000.pt", [(0, 10)], is_last=False)
JOINED = entry_for("a_ESM", "a_ESM.pt", [(0, 10), (10, 30)], ["d", "e"], is_joined=True, is_last=True)
WHOLE = entry_for("a_ESM", "a_ESM.pt", is_last=True)
OLD = [part(1, 0, 10, is_last=None), part(2, 10, 20, is_last=None)]


@pytest.mark.parametrize(
    ("entries", "expected"),
    {
        "whole": ([WHOLE], [WHOLE]),
        "embedded anew": ([WHOLE, changed(WHOLE)], [changed(WHOLE)]),
        "parts in any order": ([LAST, ONE, TWO], [ONE, TWO, LAST]),
        "a part is missing": ([ONE, LAST], None),
        "the last part is missing": ([ONE, TWO], None),
        "the first part is missing": ([TWO, LAST], None),
        "one part anew": ([ONE, TWO, LAST, changed(TWO)], [ONE, changed(TWO), LAST]),
        "parts of version 1": (OLD, OLD),
        "a gap in version 1": (OLD[1:], None),
        "shards count never": ([SHARD], None),
        "joined": ([SHARD, JOINED], [JOINED]),
        "joined, then cut again": ([SHARD, JOINED, SHARD], [JOINED]),
        "whole, then in parts": ([WHOLE, ONE, TWO, LAST], [ONE, TWO, LAST]),
        "in parts, then whole": ([ONE, TWO, LAST, WHOLE], [WHOLE]),
        "whole, then half in parts": ([WHOLE, ONE, TWO], [WHOLE]),
        "parts half written over": ([ONE, TWO, LAST, changed(part(2, 12, 30, is_last=True))], None),
        "a part anew with more text and the same bytes": ([ONE, part(1, 0, 12), TWO, LAST], [ONE, TWO, LAST]),
        "the same, to a dead end": ([ONE, part(1, 0, 12), part(2, 12, 19), TWO, LAST], [ONE, TWO, LAST]),
        "cut in other places": (
            [ONE, TWO, LAST, part(1, 0, 15, "x"), part(2, 15, 30, "x", True)],
            [part(1, 0, 15, "x"), part(2, 15, 30, "x", True)],
        ),
    }.values(),
)
def test_a_file_is_finished_once_and_whole(entries, expected):
    finished = finished_files([*entries, entry_for("b_ESM", "b.pt", is_last=True)])
    assert list(finished) == (["a_ESM", "b_ESM"] if expected else ["b_ESM"])
    if expected:
        assert list(finished["a_ESM"].entries) == expected
        assert finished["a_ESM"].written == [written for entry in expected for written in entry.written]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken cannot be written to (" in refusal(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]
