"""Which files the input names: suffixes, globs, links, and outputs that would meet."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from dist_esm.planning.inputs import find_files, refuse_nested
from helpers.data import PROTEINS
from helpers.fasta import random_sequence, write
from helpers.intake import GOOD, check_output
from helpers.standin import embed_directory


def outputs_of(*inputs: Path | str) -> list[str]:
    return [str(file.output) for file in find_files([str(item) for item in inputs])]


def test_every_suffix_in_any_case_plain_or_gzip_is_taken_and_embedded(tmp_path):
    suffixes = [".fasta", ".fa", ".faa", ".fas", ".FASTA", ".Fa", ".FaA", ".fAs"]
    for i, suffix in enumerate(suffixes):
        write(tmp_path / f"in/p{i}{suffix}", f">plain{i}\n{random_sequence(i + 5)}\n")
        write(
            tmp_path / f"in/z{i}{suffix}{'.gz' if i % 2 else '.GZ'}",
            gzip.compress(f">zipped{i}\n{random_sequence(i + 5, 1)}\n".encode()),
        )
    write(tmp_path / "in/no.txt", ">x\nMK\n")
    write(tmp_path / "in/no.fasta.lz4", ">x\nMK\n")
    done = embed_directory(tmp_path / "in", tmp_path / "out")
    assert done.report.status == "complete"
    assert done.outputs() == sorted([f"p{i}_ESM" for i in range(8)] + [f"z{i}_ESM" for i in range(8)])
    for i in range(8):
        check_output(done.load(f"p{i}_ESM"), [(f"plain{i}", random_sequence(i + 5))])
        check_output(done.load(f"z{i}_ESM"), [(f"zipped{i}", random_sequence(i + 5, 1))])


def test_directories_globs_and_lists_give_each_file_once_in_one_order(tmp_path):
    for name in ("b/x.fasta", "a/y.fa", "a/deep/er/z.faa.gz", "c.fas"):
        write(tmp_path / name, GOOD)
    everything = ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM", "c_ESM"]
    assert outputs_of(tmp_path) == everything
    assert outputs_of(tmp_path / "c.fas", tmp_path / "b", tmp_path / "a") == everything
    assert outputs_of(tmp_path / "a", tmp_path / "a/y.fa", tmp_path, tmp_path / "*" / "*.fasta") == everything
    assert outputs_of(tmp_path / "**" / "*.fa*") == ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM", "c_ESM"]
    assert outputs_of(tmp_path / "?") == ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM"]
    assert outputs_of(tmp_path / "a") == ["deep/er/z_ESM", "y_ESM"]


def test_brackets_in_a_real_name_are_no_pattern(tmp_path):
    write(tmp_path / "set[1]" / "a.fasta", GOOD)
    assert outputs_of(tmp_path / "set[1]") == ["a_ESM"]


def test_hidden_and_temporary_names_are_skipped_unless_named_outright(tmp_path):
    for name in (
        ".hidden.fasta",
        "~temp.fasta",
        ".git/a.fasta",
        "~x/b.fasta",
        "kept.fasta",
        "a.fasta~",
        "b.fasta.tmp",
        "#c.fasta#",
    ):
        write(tmp_path / name, GOOD)
    assert outputs_of(tmp_path) == outputs_of(tmp_path / "*") == ["kept_ESM"]
    assert outputs_of(tmp_path / ".hidden.fasta") == [".hidden_ESM"]


def test_links_are_followed_once_and_real_names_win(tmp_path):
    write(tmp_path / "in/real.fasta", GOOD)
    write(tmp_path / "elsewhere/far.fasta", GOOD)
    write(tmp_path / "elsewhere/sub/farther.fasta", GOOD)
    (tmp_path / "in/a_link.fasta").symlink_to("real.fasta")
    (tmp_path / "in/far_link.fasta").symlink_to("../elsewhere/far.fasta")
    (tmp_path / "in/loop").symlink_to(".")
    (tmp_path / "in/to").symlink_to("../elsewhere")
    (tmp_path / "in/to_again").symlink_to("../elsewhere/sub")
    (tmp_path / "elsewhere/back").symlink_to("../in")
    (tmp_path / "in/gone.fasta").symlink_to("nowhere.fasta")
    assert outputs_of(tmp_path / "in") == ["gone_ESM", "real_ESM", "to/far_ESM", "to/sub/farther_ESM"]
    link = tmp_path / "in/a_link.fasta"
    assert outputs_of(link) == ["a_link_ESM"]
    assert outputs_of(link, tmp_path / "in/real.fasta") == ["a_link_ESM", "real_ESM"], (
        "what is named outright is what the user wants"
    )
    assert outputs_of(tmp_path / "in" / "*l*.fasta", tmp_path / "in/real.fasta")[-1:] == ["real_ESM"]
    paths = [file.path for file in find_files([str(tmp_path / "in/to"), str(tmp_path / "elsewhere")])]
    assert len({os.path.realpath(path) for path in paths}) == len(paths) == 4


def test_links_that_lead_nowhere_fail_with_their_target(tmp_path):
    write(tmp_path / "ok.fasta", GOOD)
    (tmp_path / "a.fasta").symlink_to("b.fasta")
    (tmp_path / "b.fasta").symlink_to("a.fasta")
    (tmp_path / "gone.fa").symlink_to("/nowhere/gone.fa")
    (tmp_path / "folder").symlink_to("/nowhere/folder")
    (tmp_path / "gone.txt").symlink_to("/nowhere/gone.txt")
    everything = ["a_ESM", "b_ESM", "folder_ESM", "gone_ESM", "ok_ESM"]
    assert outputs_of(tmp_path) == outputs_of(tmp_path / "*") == everything
    assert outputs_of(tmp_path / "gone.fa") == ["gone_ESM"]
    done = embed_directory(tmp_path, tmp_path / "out")
    assert done.report.status == "partial"
    assert done.outputs() == ["ok_ESM"]
    problems = {Path(failure.path).name: failure.error_message for failure in done.report.failed}
    assert problems["gone.fa"] == "it is a link to /nowhere/gone.fa, which is not there"
    assert problems["folder"] == "it is a link to /nowhere/folder, which is not there"
    for name in ("a.fasta", "b.fasta"):
        assert re.fullmatch(r"it is a link to .*/[ab].fasta, which leads back to itself", problems[name])
    assert len(problems) == 4


@pytest.mark.parametrize(
    "given", ["missing.fasta", "empty", "others", "*.nothing", "missing/*.fasta", "pipe"]
)
def test_an_input_that_gives_no_file_is_refused_by_name(tmp_path, given):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "others" / "no.txt", GOOD)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="input=.*" + given.replace("*", r"\*")):
        find_files([str(tmp_path / given)])


@pytest.mark.parametrize("other", ["a.fa", "a.fasta.gz", "a.FAS"])
def test_inputs_that_would_share_an_output_are_refused(tmp_path, other):
    write(tmp_path / "a.fasta", GOOD)
    write(tmp_path / other, GOOD)
    with pytest.raises(ValueError, match=r"would both be written to a_ESM"):
        find_files([str(tmp_path)])


def test_an_output_folder_inside_another_is_refused(tmp_path):
    """With format=fair_esm an output is a folder, in which a_ESM/b.fasta would be written, too."""
    write(tmp_path / "in/a.fasta", GOOD)
    write(tmp_path / "in/a_ESM/b.fasta", GOOD)
    files = find_files([str(tmp_path / "in")])
    with pytest.raises(ValueError, match=r"b\.fasta would be written inside the output folder of .*a\.fasta"):
        refuse_nested(files)
    refuse_nested(files[:1])


def test_outputs_mirror_the_tree():
    files = find_files([str(PROTEINS)])
    assert [str(file.output) for file in files] == [
        "large_ESM",
        "medium_ESM",
        "viruses/small_ESM",
        "viruses/tiny_ESM",
    ]
