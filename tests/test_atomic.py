"""Outputs that are staged and committed together, and disks that get in the way."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import resource
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from dist_esm.atomic import (
    LARGE_BYTES,
    SMALL_BYTES,
    Staged,
    SummedFile,
    SummedFolder,
    atomically,
    commit_together,
    discard_names,
    is_leftover,
    refuse_to_replace,
    temporary_path,
)
from dist_esm.checksum import read_back
from dist_esm.types import WrittenFile
from helpers.page_cache import skip_unless_pages_wait, wait_until_few_wait

MARKS = ("ids.tsv", "provenance.json")


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / ".dist_esm" / "scratch" / "1.0"
    folder.mkdir(parents=True)
    return folder


def stage(scratch: Path, path: Path, text: str = "new", is_summed: bool = True, **more) -> Staged:
    temporary = temporary_path(scratch)
    temporary.write_text(text)
    return Staged(
        path, hashlib.sha256(text.encode()).hexdigest() if is_summed else None, [(temporary, path)], **more
    )


def stage_folder(scratch: Path, path: Path, names=("a.pt", *MARKS)) -> Staged:
    temporary = temporary_path(scratch)
    temporary.mkdir()
    for name in names:
        (temporary / name).write_text("new")
    return Staged(path, None, [(temporary, path)], marks=MARKS)


def test_all_that_is_staged_takes_its_name_and_is_told_by_its_bytes(tmp_path, scratch):
    (tmp_path / "b.records.tsv").write_text("of the output that was here before")
    first = stage(scratch, tmp_path / "deep" / "a.pt")
    records = temporary_path(scratch)
    records.write_text("records")
    first.files.insert(0, (records, tmp_path / "deep" / "a.records.tsv"))
    second = stage(scratch, tmp_path / "b.pt", is_summed=False, obsolete=[tmp_path / "b.records.tsv"])
    third = stage_folder(scratch, tmp_path / "c")
    refused = ValueError("could not be written")
    assert not (tmp_path / "deep").exists(), "nothing has its name before the commit"
    results = commit_together([first, refused, second, third], tmp_path)
    assert results[1] is refused
    checksum = hashlib.sha256(b"new").hexdigest()
    assert results[0] == WrittenFile("deep/a.pt", 3, checksum) == read_back(tmp_path, Path("deep/a.pt"))
    assert results[2] == WrittenFile("b.pt", 3, checksum)
    assert results[3] == read_back(tmp_path, Path("c"))
    assert (tmp_path / "deep" / "a.records.tsv").read_text() == "records"
    assert not (tmp_path / "b.records.tsv").exists()
    assert list(scratch.iterdir()) == []


def folder_in_the_way(scratch: Path, output: Staged) -> None:
    """What was written is a folder with a file in it: it takes no file's name, and `unlink` fails."""
    ((temporary, path),) = output.files
    path.write_text("")
    temporary.unlink()
    temporary.mkdir()
    (temporary / "inside").write_text("")


def scratch_is_a_file(scratch: Path, output: Staged) -> None:
    """The folder of temporary files is a file now: nothing below it can be synced, renamed or removed."""
    ((temporary, _),) = output.files
    temporary.unlink()
    scratch.rmdir()
    scratch.write_text("")


def folder_is_a_file(scratch: Path, output: Staged) -> None:
    """The folder that the output belongs to cannot be made."""
    output.path.parent.parent.mkdir()
    output.path.parent.write_text("")


@pytest.mark.parametrize("obstacle", [folder_in_the_way, scratch_is_a_file, folder_is_a_file])
def test_an_output_whose_rename_fails_is_an_error_in_its_place_whatever_becomes_of_its_temporary_file(
    tmp_path, scratch, obstacle
):
    other_scratch = tmp_path / "other"
    other_scratch.mkdir()
    victim = stage(
        scratch, tmp_path / "x" / "deep" / "a.pt" if obstacle is folder_is_a_file else tmp_path / "a.pt"
    )
    obstacle(scratch, victim)
    well = stage(other_scratch, tmp_path / "b.pt")
    error, written = commit_together([victim, well], tmp_path)
    assert isinstance(error, OSError)
    assert written == WrittenFile("b.pt", 3, hashlib.sha256(b"new").hexdigest())
    assert not scratch.is_dir() or list(scratch.iterdir()) == []


def test_an_output_that_vanishes_at_once_is_an_error(tmp_path, scratch):
    output = stage(scratch, tmp_path / "a.pt", is_summed=False)
    output.path = tmp_path / "never.pt"
    (error,) = commit_together([output], tmp_path)
    assert isinstance(error, FileNotFoundError)
    assert "vanished as soon as it was written" in str(error)


def test_a_folder_is_replaced_whole_and_what_is_not_ours_stays(tmp_path, scratch):
    path = tmp_path / "a_ESM"
    assert isinstance(
        commit_together([stage_folder(scratch, path, ("old.pt", *MARKS))], tmp_path)[0], WrittenFile
    )
    assert isinstance(commit_together([stage_folder(scratch, path)], tmp_path)[0], WrittenFile)
    assert {file.name for file in path.iterdir()} == {"a.pt", *MARKS}
    (path / "thesis").mkdir()
    (error,) = commit_together([stage_folder(scratch, path)], tmp_path)
    assert isinstance(error, FileExistsError)
    assert {file.name for file in path.iterdir()} == {"a.pt", "thesis", *MARKS}
    assert list(scratch.iterdir()) == []


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, scratch, monkeypatch):
    """The second of two renames fails."""
    path = tmp_path / "a_ESM"
    commit_together([stage_folder(scratch, path, ("old.pt", *MARKS))], tmp_path)
    rename = os.rename

    def fail_for_the_new_one(source, target):
        if Path(target) == path and not str(source).endswith(".old"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    (error,) = commit_together([stage_folder(scratch, path)], tmp_path)
    assert isinstance(error, OSError)
    assert {file.name for file in path.iterdir()} == {"old.pt", *MARKS}


@pytest.mark.parametrize("there", ["file", "link", "other folder", "empty folder", "nothing"])
def test_only_what_is_ours_may_be_replaced(tmp_path, there):
    path = tmp_path / "a_ESM"
    if there == "file":
        path.write_text("")
    elif there == "link":
        path.symlink_to(tmp_path)
    elif there != "nothing":
        path.mkdir()
        if there == "other folder":
            (path / "notes.txt").write_text("")
    if there in ("empty folder", "nothing"):
        refuse_to_replace(path, MARKS)
    else:
        with pytest.raises(FileExistsError, match="move it away"):
            refuse_to_replace(path, MARKS)


def test_temporary_names_are_short_and_never_the_same(scratch):
    names = [temporary_path(scratch).name for _ in range(1000)]
    assert len(set(names)) == 1000
    assert max(map(len, names)) < 20
    scratch.rmdir()
    with pytest.raises(FileNotFoundError, match="was output_dir removed"):
        temporary_path(scratch)


def fail_half_way(path: Path, scratch: Path | None) -> None:
    with atomically(path, scratch) as temporary:
        temporary.write_text("second")
        assert is_leftover(temporary, ["report.json"]) == (scratch is None)
        assert not is_leftover(temporary, ["verify.json"])
        raise RuntimeError


def test_a_small_file_is_there_whole_or_as_it_was(tmp_path, scratch):
    path = tmp_path / "report.json"
    for place in (None, scratch):
        with atomically(path, place) as temporary:
            temporary.write_text("first")
        with pytest.raises(RuntimeError):
            fail_half_way(path, place)
        assert path.read_text() == "first"
        assert {file.name for file in tmp_path.iterdir()} == {"report.json", ".dist_esm"}
    assert not is_leftover(tmp_path / ".report.json.123.tmp", ["report.json"])


def test_a_checksum_is_that_of_what_was_written_small_and_large(tmp_path):
    numbers = np.random.default_rng(0).bytes(3 * SMALL_BYTES + 5)
    sizes = [3, SMALL_BYTES, 0, SMALL_BYTES + 1, 7, 2 * SMALL_BYTES - 6]
    with SummedFile(tmp_path / "a") as file:
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            file.write(numbers[start : start + size])
    written = (tmp_path / "a").read_bytes()
    assert written == numbers[: sum(sizes)]
    found = read_back(tmp_path, Path("a"))
    assert found is not None
    assert file.checksum() == found.sha256


def test_a_large_write_for_which_there_is_no_room_raises(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SMALL_BYTES + 100, before[1]))
    try:
        file = SummedFile(tmp_path / "a")
        with pytest.raises(OSError, match="File too large"):
            file.write(bytes(3 * SMALL_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.close()


def test_what_was_summed_cannot_be_written_over(tmp_path):
    with SummedFile(tmp_path / "a") as file:
        file.write(b"abc")
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    assert file.checksum() == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("num_files", [0, 1, 3, 15, 16, 35])
def test_files_that_threads_write_are_told_in_their_order(tmp_path, num_files):
    def write(number: int) -> WrittenFile:
        with SummedFile(tmp_path / "a" / f"{number}.pt", is_alone=False) as file:
            file.write(b"%d" % number * 10_000 * number)
        return file.written(f"{number}.pt")

    with SummedFolder(tmp_path / "a") as folder:
        folder.add_files(write, num_files)
        with folder.text("tables") as text:
            text.write("x")
    names = [f"{number}.pt" for number in range(num_files)]
    assert [file.path for file in folder.written] == [*names, "tables"]
    for written in folder.written:
        assert read_back(tmp_path / "a", Path(written.path)) == written
    assert read_back(tmp_path, Path("a")).sha256 == folder.checksum()


def test_a_file_that_one_of_the_threads_cannot_write_fails_all(tmp_path):
    def write(number: int) -> WrittenFile:
        if number == 5:
            raise OSError("no room")
        return WrittenFile(f"{number}.pt", 0, "")

    with pytest.raises(OSError, match="no room"), SummedFolder(tmp_path / "a") as folder:
        folder.add_files(write, 32)
    assert not folder.written


def test_what_a_killed_process_left_under_its_names_is_removed(tmp_path):
    for name in ("3", "7", "7.old", "9", "x7"):
        (tmp_path / name).write_text("")
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "a").write_text("")
    discard_names(tmp_path, range(7, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "9", "x7"]


def test_what_a_large_file_has_so_far_is_on_its_way_to_the_disk(tmp_path):
    skip_unless_pages_wait(tmp_path)
    path, block = tmp_path / "a", bytes(SMALL_BYTES)
    with SummedFile(path) as file:
        for _ in range(4 * LARGE_BYTES // SMALL_BYTES):
            file.write(block)
        assert wait_until_few_wait(path, LARGE_BYTES // mmap.PAGESIZE) <= LARGE_BYTES // mmap.PAGESIZE
        file.write(b"the end")
    assert read_back(tmp_path, Path("a")).sha256 == file.checksum()
