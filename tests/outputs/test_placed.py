"""Numbers of a file that was cut go to their places in one output, launch after launch."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from dist_esm import atomic
from dist_esm.checksum import read_back
from dist_esm.config import Chains, Compression, Format, Include
from dist_esm.outputs import builder as builder_module
from dist_esm.outputs import journal
from dist_esm.outputs import loose as loose_module
from dist_esm.outputs import shards as shards_module
from dist_esm.outputs.journal import Journal
from dist_esm.outputs.placed import part_from_finished
from dist_esm.outputs.row_buffer import Memory, NamelessFile
from helpers.standin import ALL_KINDS, Embedded, embed_directory

FORMATS = [Format.pt, Format.safetensors, Format.npy, Format.h5, Format.parquet]
POISON = "W" * 31


@pytest.fixture(autouse=True)
def small_units_and_pages(monkeypatch):
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 256)
    monkeypatch.setattr("dist_esm.outputs.region.PAGE_BYTES", 64)
    monkeypatch.setattr("dist_esm.checksum.BLOCK_BYTES", 128)
    monkeypatch.setattr("dist_esm.outputs.row_buffer.KEPT_BYTES", 0)
    monkeypatch.setattr("dist_esm.outputs.formats.h5.MAX_SMALL_SHARE", 1)
    monkeypatch.setattr("dist_esm.outputs.formats.parquet.GROUP_BYTES", 1 << 12)
    monkeypatch.setattr("dist_esm.outputs.formats.parquet_pages.PAGE_BYTES", 1 << 10)


def fasta(poison_at: int | None = None, first: str = "ACDEFGHIKL") -> str:
    """Forty records of several lengths, of which two make large attributes of an HDF5 file; one of them may
    be poisoned, and one is skipped."""
    records = [f'>p{i} number "{i}"\n{"ACDEFGHIKL" * (1 + i * 7 % 5)}\n' for i in range(40)]
    records[0] = f">p0\n{first}\n"
    records[3] = f">p3\n{'ACDEFGHIKL' * 18}\n"
    records[25] = f">p25\n{'ACDEFGHIKL' * 19}\n"
    records[30] = ">p30\n<mask>\n"
    records[10] = ">p10\nACDEF:GHIKL/MKV\n"
    if poison_at is not None:
        records[poison_at] = f">p{poison_at}\n{POISON}\n"
    return "".join(records)


def embed(path: Path, out: Path, share: float = 0.1, **others) -> Embedded:
    """Embed a file; what the journal has of its outputs is what they are."""
    settings = {"include": ALL_KINDS, "repr_layers": [0, 1], "dedupe": False, "unit_share": share}
    run = embed_directory(path, out, **settings, **others)
    outputs = [file for entry in journal.read(out) if not entry.is_shard for file in entry.written]
    for written in {file.path: file for file in outputs}.values():
        assert read_back(out, Path(written.path)) == written
    return run


def files_of(out: Path) -> dict[str, bytes]:
    """All that people see, by name, reports aside."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".dist_esm" not in path.parts and not path.name.startswith("report")
    }


def in_the_making(out: Path) -> list[Path]:
    return [
        path
        for output in (out / ".dist_esm" / "shards").glob("*.output")
        for path in (output.iterdir() if output.is_dir() else [output])
    ]


@pytest.fixture(params=FORMATS, ids=lambda kind: kind.name)
def half_done(request, tmp_path):
    """A run in which one unit of a file failed, and what the run is to come to in the end."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta(poison_at=20))
    uncut = embed(path, tmp_path / "uncut", share=1.0, format=request.param)
    assert uncut.report.status == "complete"
    failed = embed(path, out, poison=[POISON], format=request.param)
    assert failed.report.files == []
    assert len(failed.plan.units) > 3
    assert in_the_making(out)
    return partial(embed, path, out, format=request.param), path, out, tmp_path / "uncut"


def test_a_resume_fills_what_is_missing_and_nothing_else(half_done):
    embed_again, _, out, uncut = half_done
    again = embed_again()
    assert again.report.status == "complete"
    assert 0 < again.engine.num_segments < 20
    assert files_of(out) == files_of(uncut)
    assert not list((out / ".dist_esm" / "shards").iterdir())


def test_numbers_that_are_damaged_or_gone_are_made_again(half_done):
    embed_again, _, out, uncut = half_done
    damaged = max(in_the_making(out), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) * 2 // 3 : len(content) * 2 // 3 + 64] = b"?" * 64
    damaged.write_bytes(content)
    again = embed_again()
    assert again.report.status == "complete"
    assert files_of(out) == files_of(uncut)
    assert again.engine.num_segments > 4


@pytest.mark.parametrize("first", ["1234567890", "ACDEFGHIK-"], ids=["skipped", "shorter"])
def test_units_of_one_text_and_of_another_come_to_what_is_there_now(half_done, tmp_path, first):
    """What was laid out otherwise is not written over, and is joined."""
    embed_again, path, out, _ = half_done
    path.write_text(fasta(poison_at=20, first=first))
    again = embed_again()
    assert again.report.status == "complete"
    assert again.engine.num_segments < 25
    embed(path, tmp_path / "new", share=1.0, format=again_format(out))
    assert files_of(out) == files_of(tmp_path / "new")


def again_format(out: Path) -> Format:
    """The format of the run in a directory."""
    text = (out / ".dist_esm" / "config.json").read_text()
    return next(kind for kind in FORMATS if f'"format": "{kind.name}"' in text)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_nothing_stays_of_units_that_were_cut_in_other_places(half_done, share):
    """It may be as large as the output."""
    embed_again, _, out, uncut = half_done
    assert embed_again(share=share).report.status == "complete"
    assert not list((out / ".dist_esm" / "shards").iterdir())
    assert files_of(out) == files_of(uncut)


def test_units_of_a_file_wait_for_it_while_others_are_completed(half_done, tmp_path):
    embed_again, _, out, uncut = half_done
    other = tmp_path / "other.fasta"
    other.write_text(">q\nMKT\n")
    assert embed(other, out, format=again_format(out)).report.status == "complete"
    again = embed_again()
    assert again.report.status == "complete"
    assert 0 < again.engine.num_segments < 20
    assert not list((out / ".dist_esm" / "shards").iterdir())
    assert files_of(uncut).items() <= files_of(out).items()


@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.name)
def test_units_of_a_file_that_was_complete_before_it_was_edited_are_kept(tmp_path, kind):
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta())
    assert embed(path, out, format=kind).report.status == "complete"
    path.write_text(fasta(poison_at=35))
    assert embed(path, out, poison=[POISON], format=kind).report.files == []
    again = embed(path, out, format=kind)
    assert again.report.status == "complete"
    anew = embed(path, tmp_path / "uncut", share=1.0, format=kind)
    assert 0 < again.engine.num_segments < anew.engine.num_segments
    assert files_of(out) == files_of(tmp_path / "uncut")


@pytest.mark.parametrize(("first", "then"), [(0.05, 0.1), (0.1, 0.05), (0.05, 0.2)])
@pytest.mark.parametrize(
    ("kind", "compression"),
    [*((kind, Compression.none) for kind in Format), (Format.parquet, Compression.zstd)],
    ids=lambda value: value.name,
)
def test_a_unit_that_is_done_is_not_written_over_where_others_are_cut_otherwise(
    tmp_path, kind, compression, first, then
):
    """Records that are larger than a unit are cut alike, at another place in the order of units."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    lengths = [60] * 12 + [900, 800, 900, 800, 31] + [60] * 20
    sequences = [("ACDEFGHIKLMNPQRSTVWY" * 50)[i % 20 :][:length] for i, length in enumerate(lengths)]
    sequences[16] = POISON
    path.write_text("".join(f">p{i}\n{residues}\n" for i, residues in enumerate(sequences)))
    settings = {"format": kind, "compression": compression}
    assert embed(path, out, share=first, poison=[POISON], **settings).report.files == []
    assert embed(path, out, share=then, **settings).report.status == "complete"
    embed(path, tmp_path / "uncut", share=1.0, **settings)
    assert files_of(out) == files_of(tmp_path / "uncut")


def test_a_kill_between_the_name_and_its_line_in_the_journal_loses_nothing(half_done, monkeypatch):
    embed_again, _, out, uncut = half_done
    append = Journal.append

    def refuse_joined(self, entries):
        if any(entry.is_joined for entry in entries):
            raise OSError("killed")
        append(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse_joined)
        assert embed_again().report.files == []
    assert files_of(out).keys() >= files_of(uncut).keys()
    shared = [path for path in in_the_making(out) if path.stat().st_nlink > 1]
    assert shared
    again = embed_again()
    assert (again.report.status, again.engine.num_segments) == ("complete", 0)
    assert files_of(out) == files_of(uncut)
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*") if path.is_file())


def test_what_people_see_shares_no_bytes_with_what_is_written_to(half_done, monkeypatch):
    embed_again, _, out, _ = half_done
    monkeypatch.setattr(Journal, "append", refuse_all)
    embed_again()
    monkeypatch.undo()
    for path in in_the_making(out):
        os.link(path, out / f"seen.{path.name}")
    before = files_of(out)
    for output in (out / ".dist_esm" / "shards").glob("*.output"):
        part_from_finished(output)
    for path in in_the_making(out):
        path.write_bytes(b"written over")
    assert files_of(out) == before


def refuse_all(*_) -> None:
    raise OSError("killed")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_bytes", [0, 1000, 1 << 20])
def test_rows_that_find_no_room_in_memory_go_to_their_places(tmp_path, monkeypatch, kind, num_bytes):
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    embed(path, tmp_path / "uncut", share=1.0, format=kind)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, num_bytes))
    run = embed(path, tmp_path / "out", format=kind)
    assert run.report.status == "complete"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_bytes", [0, 1 << 20], ids=["on disk", "in memory"])
def test_lengths_that_changed_within_a_unit_are_found_where_places_depend_on_them(
    tmp_path, monkeypatch, kind, num_bytes
):
    """As many bytes, records, residues and seconds as before, in each unit."""
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    stat = path.stat()
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, num_bytes))

    def change() -> None:
        before = path.read_text()
        first, second = (before.partition(f">{name} ")[2].split("\n", 2)[1] for name in ("p22", "p23"))
        assert len(first) != len(second)
        text = before.replace(f'"22"\n{first}', f'"22"\n{second}').replace(
            f'"23"\n{second}', f'"23"\n{first}'
        )
        assert (len(text), text != before) == (stat.st_size, True)
        path.write_text(text)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    run = embed(path, tmp_path / "out", share=0.3, format=kind, after_plan=change)
    failed = [failure.error_message for failure in run.report.failed]
    is_found = kind in (Format.h5, Format.parquet)
    assert failed == ["the file was changed while the run was under way: start the run again"] * is_found
    assert embed(path, tmp_path / "out", share=0.3, format=kind).report.status == "complete"
    embed(path, tmp_path / "uncut", share=1.0, format=kind)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_text_that_is_shorter_after_a_kill_leaves_nothing_behind(tmp_path, monkeypatch, kind):
    """The output was complete but for its name; names of datasets, escaped, are shorter now."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta().replace(" number", f"{'/' * 300} number"))
    with monkeypatch.context() as patch:
        patch.setattr("dist_esm.outputs.placed.stage_output", refuse_all)
        assert embed(path, out, format=kind).report.status != "complete"
    path.write_text(fasta().replace(" number", f"{'a' * 300} number"))
    assert embed(path, out, format=kind).report.status == "complete"
    embed(path, tmp_path / "uncut", share=1.0, format=kind)
    assert files_of(out) == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_bytes", [0, 1 << 20], ids=["on disk", "in memory"])
def test_a_file_that_was_changed_under_way_writes_over_no_other_unit(tmp_path, monkeypatch, kind, num_bytes):
    """As many bytes, records, residues and seconds as before, in other places."""
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    stat = path.stat()
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, num_bytes))

    def change() -> None:
        text = path.read_text().replace("\nACDEFGHIKL\n>p1 ", "\nACDEFGHIK-\n>p1 ")
        assert len(text) == stat.st_size
        path.write_text(text)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    run = embed(path, tmp_path / "out", format=kind, after_plan=change)
    assert run.failure("a.fasta") == "the file was changed while the run was under way: start the run again"
    assert embed(path, tmp_path / "out", format=kind).report.status == "complete"
    embed(path, tmp_path / "uncut", share=1.0, format=kind)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_file_system_without_second_names_gets_copies(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    embed(path, tmp_path / "uncut", share=1.0, format=kind)

    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    embed(path, tmp_path / "out", format=kind)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_cut_file_without_a_protein_comes_to_an_empty_output(tmp_path, kind):
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">p{i}\n<mask>\n{'1234 ' * 20}\n" for i in range(30)))
    for share in (1.0, 0.1):
        run = embed_directory(
            path, tmp_path / str(share), include=[Include.per_tok], format=kind, unit_share=share
        )
        assert run.report.status == "complete"
    assert files_of(tmp_path / "0.1") == files_of(tmp_path / "1.0")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("most", [100_000, 7], ids=["one output", "numbered parts"])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_outputs_larger_than_memory_are_those_that_find_room_in_it(tmp_path, monkeypatch, kind, most, share):
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    settings = {"format": kind, "max_proteins_per_output": most, "chains": Chains.split}
    embed(path, tmp_path / "small", share=share, **settings)
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 300))
    if kind is not Format.h5:  # there, only the numbers of datasets have places
        monkeypatch.setattr(NamelessFile, "__init__", refuse_file)
    run = embed(path, tmp_path / "large", share=share, **settings)
    assert run.report.status == "complete"
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")
    assert not list((tmp_path / "large" / ".dist_esm").rglob("scratch/*/*"))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_numbers_that_fill_no_page_come_to_an_output_all_the_same(tmp_path, monkeypatch, kind):
    """As of a last part of one short protein, when others have taken the memory."""
    monkeypatch.setattr("dist_esm.outputs.region.PAGE_BYTES", 4096)
    path = tmp_path / "a.fasta"
    path.write_text(">p0\nMKT\n>p1\nGAV\n")
    embed(path, tmp_path / "small", share=1.0, format=kind, max_proteins_per_output=1)
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 0))
    run = embed(path, tmp_path / "large", share=1.0, format=kind, max_proteins_per_output=1)
    assert run.report.status == "complete", run.report.failed
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_disk_that_turned_out_full_when_an_output_was_synced_loses_no_numbers(tmp_path, monkeypatch, kind):
    """Network file systems say so then. The output is completed again from the numbers in their places."""
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    embed(path, tmp_path / "small", share=1.0, format=kind)
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 300))
    sync_files, calls = atomic._sync_files, []

    def fail_once(output):
        calls.append(output)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync_files(output)

    monkeypatch.setattr(atomic, "_sync_files", fail_once)
    run = embed(path, tmp_path / "large", share=1.0, format=kind)
    assert run.report.status == "complete", run.report.failed
    assert len(calls) == 2
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "large").rglob("*") if file.is_file())


def refuse_file(file, directory) -> None:
    raise OSError("rows went to a file in which they cannot stay")


@pytest.mark.parametrize("damage", [True, False])
def test_files_of_proteins_get_their_names_at_the_end(tmp_path, damage):
    """They are written once: no launch writes again what another has."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta(poison_at=20).replace(">p39 ", ">p0\n>p39 "))
    embed(path, tmp_path / "uncut", share=1.0, format=Format.fair_esm)
    assert embed(path, out, poison=[POISON], format=Format.fair_esm).report.files == []
    shards = sorted((out / ".dist_esm" / "shards").glob("*.files"))
    assert len(shards) > 3
    numbers = {file.stat().st_ino for file in (out / ".dist_esm" / "shards").rglob("*.protein")}
    if damage:
        (shards[1] / "0.protein").write_bytes(b"?")
    again = embed(path, out, format=Format.fair_esm)
    assert again.report.status == "complete"
    assert 0 < again.engine.num_segments < 25
    assert files_of(out) == files_of(tmp_path / "uncut")
    kept = numbers & {file.stat().st_ino for file in (out / "a_ESM").iterdir()}
    assert len(kept) > 20
    assert all(file.stat().st_nlink == 1 for file in (out / "a_ESM").iterdir())


def test_shards_of_other_kinds_are_joined_with_files_of_proteins(tmp_path, monkeypatch):
    """As of a run that an earlier version began."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta(poison_at=20))
    embed(path, tmp_path / "uncut", share=1.0, format=Format.fair_esm)

    def write_as_before(table, output_format, stem, scratch, early):
        return shards_module.write_shard(table, Format.parquet, stem, scratch)

    with monkeypatch.context() as patch:
        patch.setattr(builder_module, "write_shard", write_as_before)
        embed(path, out, poison=[POISON], format=Format.fair_esm)
    assert list((out / ".dist_esm" / "shards").glob("*.pt"))
    assert embed(path, out, format=Format.fair_esm).report.status == "complete"
    assert files_of(out) == files_of(tmp_path / "uncut")


@pytest.mark.parametrize("most", [100_000, 7], ids=["one output", "numbered parts"])
@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("num_bytes", [0, 300, 2000])
def test_files_of_proteins_that_find_no_room_in_memory_are_those_that_do(
    tmp_path, monkeypatch, most, share, num_bytes
):
    path = tmp_path / "a.fasta"
    path.write_text(fasta().replace(">p39 ", ">p0\n>p39 "))
    settings = {"format": Format.fair_esm, "max_proteins_per_output": most, "chains": Chains.split}
    embed(path, tmp_path / "small", share=share, **settings)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, num_bytes))
    monkeypatch.setattr(NamelessFile, "__init__", refuse_file)
    run = embed(path, tmp_path / "large", share=share, **settings)
    assert run.report.status == "complete"
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")
    assert not list((tmp_path / "large" / ".dist_esm").rglob("scratch/*/*"))


def test_a_disk_that_was_full_for_a_moment_loses_no_file_of_a_protein(tmp_path, monkeypatch):
    """The output is written again, with the files that were there before."""
    path = tmp_path / "a.fasta"
    path.write_text(fasta())
    embed(path, tmp_path / "small", share=1.0, format=Format.fair_esm)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 0))
    write_files, calls = loose_module.write_files, []

    def fail_once(*arguments):
        write_files(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loose_module, "write_files", fail_once)
    assert embed(path, tmp_path / "large", share=1.0, format=Format.fair_esm).report.status == "complete"
    assert len(calls) == 2
    assert files_of(tmp_path / "large") == files_of(tmp_path / "small")


@pytest.mark.parametrize("kind", [Format.safetensors, Format.fair_esm])
def test_proteins_behind_a_unit_that_has_more_records_now_are_numbered_anew(tmp_path, kind):
    """Its text is as long as it was, so that the others have theirs where they had it."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta(poison_at=1))
    assert embed(path, out, format=kind, poison=[POISON]).report.status == "partial"
    path.write_text(path.read_text().replace(POISON, f"{POISON[:10]}\n>n\n{POISON[14:]}"))
    assert embed(path, out, format=kind).report.status == "complete"
    assert embed(path, tmp_path / "anew", share=1.0, format=kind).report.status == "complete"
    assert files_of(out) == files_of(tmp_path / "anew")
