"""Outputs in numbered parts, numbers that cannot be saved, and disks without room."""

from __future__ import annotations

import errno
import os

import pytest

from dist_esm import load
from dist_esm.config import Format
from dist_esm.outputs import builder
from dist_esm.planning import units
from helpers.fasta import write_files
from helpers.intake import MANY, MANY_TEXT, check_output, embed_beside_good
from helpers.standin import ALL_KINDS, embed_directory


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("most", [1, 7, 50, 131])
def test_numbered_parts_end_to_end_are_the_file_in_one(tmp_path, monkeypatch, most, share):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 50)
    done = embed_beside_good(
        tmp_path, MANY_TEXT, max_proteins_per_output=most, unit_share=share, include=ALL_KINDS
    )
    parts = [output for output in done.outputs() if output.startswith("a_ESM")]
    assert parts == [f"a_ESM.part{number + 1:05d}" for number in range(len(parts))]
    assert done.report.files[0].outputs == [f"{part}.pt" for part in parts]
    seen = []
    for part in parts:
        content = done.load(part)
        assert len(content["proteins"]) <= most
        check_output(content, MANY[len(seen) : len(seen) + len(content["proteins"])], has_all_kinds=True)
        seen += content["proteins"]
    assert seen == [name for name, _ in MANY]
    assert sum(len(done.notes(part)) for part in parts) == done.report.records["skipped"] == 12


@pytest.mark.parametrize("most", [1, 7, 50])
def test_parts_of_a_file_that_is_cut_in_other_places_are_numbered_anew(tmp_path, monkeypatch, most):
    """Another input moves the cuts. Texts that were done under other numbers are done again: their parts
    would take the places of others."""
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 50)
    out = tmp_path / "out"
    options = {"max_proteins_per_output": most, "include": ALL_KINDS, "dedupe": False}
    poison = next(residues for name, residues in MANY if len(residues) > 20)
    inputs = write_files(tmp_path / "in", a=MANY_TEXT)
    for share, poisoned in ((0.05, [poison]), (0.3, [poison]), (0.1, [poison]), (0.3, []), (0.05, [])):
        run = embed_directory(inputs, out, unit_share=share, poison=poisoned, **options)
        parts = [output for file in run.report.files for output in file.outputs]
        assert len(parts) == len(set(parts))
        assert [name for part in parts for name in run.load(part.removesuffix(".pt"))["proteins"]] == (
            [] if poisoned else [name for name, _ in MANY]
        )
        if not poisoned:
            assert load(out).ids == [name for name, _ in MANY]


@pytest.mark.parametrize("name", ["pt", "npy"])
def test_a_file_whose_text_changes_leaves_no_output_of_the_old_text(tmp_path, caplog, name):
    """Parts that are no longer there go, and a whole output beside parts; what is not ours stays."""
    out = tmp_path / "out"
    options = {"max_proteins_per_output": 5, "format": Format[name], "include": ALL_KINDS}
    unlike = ">left out\n*\n"
    for launch, number in enumerate((17, 8, 3, 12, 17)):
        texts = [f">p{place}\nMKTAYI{'A' * place}\n" for place in range(number)]
        inputs = write_files(tmp_path / str(launch), a=unlike + unlike.join(texts))
        run = embed_directory(inputs, out, **options)
        assert run.report.status == "complete", run.report.failed
        (file,) = run.report.files
        mine = out / "a_ESM.part00009.pt"
        mine.write_text("mine")
        records = {path.name for path in out.glob("*.records.tsv")}
        assert {path.name for path in out.glob("a_ESM*")} - records == {*file.outputs, mine.name}
        assert records
        assert records <= {f"{output.removesuffix('.pt')}.records.tsv" for output in file.outputs}
        assert load(out).ids == [f"p{place}" for place in range(number)]
    assert "outputs of texts that inputs no longer have: a_ESM.part00003" in caplog.text


@pytest.mark.parametrize("name", ["pt", "npy"])
def test_what_is_done_of_a_changed_text_stays_until_all_of_it_is(tmp_path, name):
    out = tmp_path / "out"
    options = {"max_proteins_per_output": 5, "format": Format[name], "unit_share": 0.1}
    texts = [f">p{place}\nMKTAYI{'A' * place}\n" for place in range(12)]
    for number, (text, poison) in enumerate([(texts[:3], []), (texts, ["MKTAYI" + "A" * 11]), (texts, [])]):
        inputs = write_files(tmp_path / str(number), a="".join(text))
        run = embed_directory(inputs, out, poison=poison, **options)
        found = sorted(path.name.removesuffix(".pt") for path in out.glob("a_ESM*"))
        if poison:
            assert run.report.status == "partial"
            assert "a_ESM" in found
    assert found == [f"a_ESM.part{part:05d}" for part in (1, 2, 3)]


def test_a_file_of_exactly_as_many_proteins_as_a_part_holds_is_in_one(tmp_path):
    done = embed_beside_good(tmp_path, MANY_TEXT, max_proteins_per_output=132)
    assert done.outputs() == ["a_ESM", "zz_good_ESM"]


def test_a_disk_that_is_full_fails_the_file_with_the_reason_and_leaves_nothing_half_written(
    tmp_path, monkeypatch
):
    write_output = builder.write_output

    def full(kind, table, stem, *more, **options):
        if stem.name == "a_ESM":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_output(kind, table, stem, *more, **options)

    monkeypatch.setattr(builder, "write_output", full)
    run = embed_directory(write_files(tmp_path / "in", a=">1\nMKTAY\n", b=">2\nMKTAYI\n"), tmp_path / "out")
    assert run.failure("a.fasta") == "[Errno 28] No space left on device"
    assert run.outputs() == ["b_ESM"]
    assert not list((tmp_path / "out" / ".dist_esm" / "scratch").rglob("*.*/*"))
