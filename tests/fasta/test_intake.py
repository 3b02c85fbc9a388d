"""Intake: any file ends as an output or as a failure that says where, and every vector is its own protein's."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import random
import re
import struct
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio import SeqIO, bgzf
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_esm.config import Config, Include, Letter, Long, ResidueConfig, SpecialTokens, Unknown
from dist_esm.fasta import blocks as scan
from dist_esm.fasta import slices
from dist_esm.fasta.blocks import FastaError, raw_blocks, whole_file
from dist_esm.fasta.letters import RESIDUES
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import windows
from dist_esm.fasta.slices import count_records, cut_slice
from dist_esm.fasta.tokens import tokenize
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.reader import Reader
from dist_esm.planning import units as plan
from dist_esm.planning.assign import assign_files_by_size, count_sequences
from dist_esm.planning.inputs import find_files, refuse_nested
from dist_esm.types import Count, Segment, Slice, Unit
from standin import FAIR_ESM, Embedded, accounts_add_up, embed_directory, expected, fair_esm_tokens

EVERYTHING = [Include.mean, Include.bos, Include.per_tok]
LETTERS = RESIDUES.decode()
GOOD = b">good one\nMKV\n"


def sequence(length: int, seed: int = 0) -> str:
    return "".join(random.Random(f"{seed} {length}").choices(LETTERS, k=length))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def block_gzip(content: bytes, block: int = 100) -> bytes:
    """BGZF in blocks of so many bytes, as Biopython writes it, with the end mark."""
    raw = io.BytesIO()
    writer = bgzf.BgzfWriter(fileobj=raw)
    for first in range(0, len(content), block):
        writer.write(content[first : first + block])
        writer.flush()
    raw.write(bgzf._bgzf_eof)
    return raw.getvalue()


def embed_one(tmp_path: Path, content: bytes | str, name: str = "a.fasta", **overrides: object) -> Embedded:
    """Embed a file together with a good one, which must come out right whatever becomes of the first."""
    write(tmp_path / "in" / name, content)
    write(tmp_path / "in" / "zz_good.fasta", GOOD)
    done = embed_directory(tmp_path / "in", tmp_path / "out", **overrides)
    good = done.load("zz_good_ESM")
    assert good["proteins"] == ["good"]
    assert np.array_equal(good["data"][0].numpy(), expected("MKV").mean)
    assert accounts_add_up(done.report)
    return done


def failure_of(tmp_path: Path, content: bytes | str, name: str = "a.fasta", **overrides: object) -> str:
    """The message with which a file fails; there is no output of it, and the good file beside it is done."""
    done = embed_one(tmp_path, content, name, **overrides)
    assert done.report.status == "partial"
    assert done.outputs() == ["zz_good_ESM"]
    return done.failure(name)


def check(content: dict, proteins: list[tuple[str, str]], is_each_kind: bool = False) -> None:
    """An output holds these proteins, (id, residues), in order, each with its own vectors."""
    assert content["proteins"] == [name for name, _ in proteins]
    assert content["lengths"] == [len(residues) for _, residues in proteins]
    assert len(content["data"]) == len(content["headers"]) == len(proteins)
    for i, (_, residues) in enumerate(proteins):
        right = expected(residues)
        assert np.array_equal(content["data"][i].numpy(), right.mean)
        if is_each_kind:
            assert np.array_equal(content["mean_representations"][1][i].numpy(), right.mean)
            assert np.array_equal(content["bos_representations"][1][i].numpy(), right.bos)
            assert np.array_equal(content["representations"][1][i].numpy(), right.rows)


def read(
    piece: Slice, before: Count | None = None, policy: ResidueConfig | None = None
) -> list[tuple[str, bytes]]:
    before = before or Count()
    unit = Unit(0, 0, piece, Count(), before, True)
    return [
        (protein.header, protein.residues)
        for protein in read_proteins(unit, Config(residues=policy or ResidueConfig()))
    ]


# Finding files.


def found(*inputs: Path | str) -> list[str]:
    return [str(file.output) for file in find_files([str(item) for item in inputs])]


def test_every_suffix_in_any_case_plain_or_gzip_is_taken_and_embedded(tmp_path):
    suffixes = [".fasta", ".fa", ".faa", ".fas", ".FASTA", ".Fa", ".FaA", ".fAs"]
    for i, suffix in enumerate(suffixes):
        write(tmp_path / f"in/p{i}{suffix}", f">plain{i}\n{sequence(i + 5)}\n")
        write(
            tmp_path / f"in/z{i}{suffix}{'.gz' if i % 2 else '.GZ'}",
            gzip.compress(f">zipped{i}\n{sequence(i + 5, 1)}\n".encode()),
        )
    write(tmp_path / "in/no.txt", ">x\nMK\n")
    write(tmp_path / "in/no.fasta.lz4", ">x\nMK\n")
    done = embed_directory(tmp_path / "in", tmp_path / "out")
    assert done.report.status == "complete"
    assert done.outputs() == sorted([f"p{i}_ESM" for i in range(8)] + [f"z{i}_ESM" for i in range(8)])
    for i in range(8):
        check(done.load(f"p{i}_ESM"), [(f"plain{i}", sequence(i + 5))])
        check(done.load(f"z{i}_ESM"), [(f"zipped{i}", sequence(i + 5, 1))])


def test_directories_globs_and_lists_give_each_file_once_in_one_order(tmp_path):
    for name in ("b/x.fasta", "a/y.fa", "a/deep/er/z.faa.gz", "c.fas"):
        write(tmp_path / name, GOOD)
    everything = ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM", "c_ESM"]
    assert found(tmp_path) == everything
    assert found(tmp_path / "c.fas", tmp_path / "b", tmp_path / "a") == everything
    assert found(tmp_path / "a", tmp_path / "a/y.fa", tmp_path, tmp_path / "*" / "*.fasta") == everything
    assert found(tmp_path / "**" / "*.fa*") == ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM", "c_ESM"]
    assert found(tmp_path / "?") == ["a/deep/er/z_ESM", "a/y_ESM", "b/x_ESM"]
    assert found(tmp_path / "a") == ["deep/er/z_ESM", "y_ESM"]


def test_brackets_in_a_real_name_are_no_pattern(tmp_path):
    write(tmp_path / "set[1]" / "a.fasta", GOOD)
    assert found(tmp_path / "set[1]") == ["a_ESM"]


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
    assert found(tmp_path) == found(tmp_path / "*") == ["kept_ESM"]
    assert found(tmp_path / ".hidden.fasta") == [".hidden_ESM"]


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
    assert found(tmp_path / "in") == ["gone_ESM", "real_ESM", "to/far_ESM", "to/sub/farther_ESM"]
    link = tmp_path / "in/a_link.fasta"
    assert found(link) == ["a_link_ESM"]
    assert found(link, tmp_path / "in/real.fasta") == ["a_link_ESM", "real_ESM"], (
        "what is named outright is what the user wants"
    )
    assert found(tmp_path / "in" / "*l*.fasta", tmp_path / "in/real.fasta")[-1:] == ["real_ESM"]
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
    assert found(tmp_path) == found(tmp_path / "*") == everything
    assert found(tmp_path / "gone.fa") == ["gone_ESM"]
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


# Text in all its forms.

PLAIN = [("one", "MKVLAAGIVG"), ("two", "ACDEFGHIKLMNPQRSTVWY"), ("three", "XBUZO")]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        b">one first\nMKVLA\nAGIVG\n>two\nACDEFGHIKLMNPQRSTVWY\n>three\nXBUZO\n",
        b">one first\r\nMKVLA\r\nAGIVG\r\n>two\r\nACDEFGHIKLMNPQRSTVWY\r\n>three\r\nXBUZO\r\n",
        b">one first\rMKVLA\rAGIVG\r>two\rACDEFGHIKLMNPQRSTVWY\r>three\rXBUZO\r",
        b">one first\rMKVLA\r\nAGIVG\n\r>two\n\n\rACDEFGHIKLMNPQRSTVWY\r\n\r\n>three\rXBUZO",
        b"\n\n  \n\t\n>one first\n\nMKVLA\n\n\nAGIVG\n\n>two\nACDEFGHIKLMNPQRSTVWY\n>three\n\nXBUZO\n\n\n",
        b">one first   \n MKVLA\t\nAGIVG   \n>two\nACDEFGHIKLMNPQRSTVWY  \n>three\nXBUZO \x0b\x0c",
        b"; made by hand\n>one first\n;a remark > here\nMKVLA\n ; another\nAGIVG\n>two\nACDEFGHIKLMNPQRSTVWY\n>three\nXBUZO\n;end",
        b"\xef\xbb\xbf>one first\nMKVLAAGIVG\n>two\nACDEFGHIKLMNPQRSTVWY\n>three\nXBUZO",
        b"\xef\xbb\xbf\r\n\r\n>one first\r\nMKVLAAGIVG\r\n>two\r\nACDEFGHIKLMNPQRSTVWY\r\n>three\r\nXBUZO\r",
        b">one first\n"
        + b"\n".join(bytes([letter]) for letter in b"MKVLAAGIVG")
        + b"\n>two\nACDEFGHIKLMNPQRSTVWY\n>three\nXBUZO\n",
    ],
    ids=[
        "lf",
        "crlf",
        "cr",
        "mixed",
        "blank lines",
        "trailing blanks",
        "comments",
        "bom",
        "bom crlf",
        "one letter a line",
    ],
)
def test_line_ends_blanks_comments_and_marks_change_nothing(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(scan, "BLOCK", block)
    for name, data in (
        ("a.fasta", content),
        ("a.fasta.gz", gzip.compress(content)),
        ("a.fa.gz", block_gzip(content, 11)),
    ):
        done = embed_one(tmp_path / name, data, name, include=EVERYTHING)
        assert done.report.status == "complete"
        check(done.load("a_ESM"), PLAIN, is_each_kind=True)
        assert done.load("a_ESM")["headers"] == ["one first", "two", "three"]
        assert done.notes("a_ESM") == []


def test_a_line_longer_than_a_block_and_one_of_many_blocks_are_read_whole(tmp_path):
    residues = sequence(400_000) * 3
    write(tmp_path / "a.fasta", f">long\n{residues[:900_000]}\n>b\nMK\n>{'h' * 3_000_000} title\nKM\n")
    done = embed_one(tmp_path, (tmp_path / "a.fasta").read_bytes(), truncation_seq_length=None)
    check(done.load("a_ESM"), [("long", residues[:900_000]), ("b", "MK"), ("h" * 3_000_000, "KM")])


def test_headers_in_utf8_and_with_any_punctuation_are_kept_in_full(tmp_path):
    headers = [
        "prot\u00e9ine_\u03b1 souche \u2116 5",
        "sp|P1|A_B desc\x01gi|2|second",
        "x>y >z ;w",
        "tab\tafter",
        "\U0001f9ec",
    ]
    done = embed_one(tmp_path, "".join(f">{header}\nMK\n" for header in headers))
    content = done.load("a_ESM")
    assert content["headers"] == headers
    assert content["proteins"] == [header.split()[0] for header in headers]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\r\n\r\n", b"  \n\t\n", b"; only a remark\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"],
)
def test_a_file_without_proteins_gives_an_empty_output(tmp_path, content):
    done = embed_one(tmp_path, content, include=EVERYTHING)
    assert done.report.status == "complete"
    output = done.load("a_ESM")
    check(output, [])
    assert output["mean_representations"][1].shape == (0, 6)


# Files that are no FASTA.

ZIPPED = gzip.compress("".join(f">r{i}\n{sequence(50, i)}\n" for i in range(40)).encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"MKV\n>a\nMK\n", r"line 1 has text before the first '>' \('MKV'\)"),
        (b"\n; remark\nhello there\n>a\nMK\n", r"line 3 has text before the first '>'"),
        (b"\xef\xbb\xbf\xef\xbb\xbf>a\nMK\n", r"line 1 has text before the first '>'"),
        (b" >a\nMK\n", r"line 1 has text before the first '>'"),
        (b">a\nMK\nMK>b\nKM\n", r"line 3 has a '>' or a byte order mark inside a sequence"),
        (b">a\nMK\n\xef\xbb\xbf>b\nKM\n", r"line 3 has a '>' or a byte order mark inside a sequence"),
        (b">a\r\nMK\r\nM\xffK\r\n", r"line 3, byte 2 \(0xff\) is not UTF-8 text"),
        (b">a\rMK\rM\xc3", r"line 3, byte 2 \(0xc3\) is not UTF-8 text"),
        (b">a\nM\0K\n", r"line 2 holds control characters"),
        (b">a\0\nMK\n", r"line 1 holds control characters"),
        (b">a\nMK\n\x1aMK", r"line 3 holds control characters"),
        (
            b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\n",
            r"line 1 has text before the first '>' \('%PDF-1.7'\)",
        ),
        (b"\x7fELF\x02\x01\x01\0\0\0", r"this is a program \(ELF\)"),
        (b"PK\x03\x04\x14\0\0\0", r"this is a zip archive: unpack it"),
        (
            b"@read\nACGT\n+\nIIII\n",
            r"line 1 has text before the first '>' \('@read'\): this looks like FASTQ",
        ),
        (">a\nMK\n".encode("utf-16"), r"this is text in UTF-16: convert it \(iconv -f utf-16"),
    ],
)
def test_what_is_no_fasta_fails_with_its_line_and_the_others_go_on(tmp_path, content, message):
    for name, data in (("a.fasta", content), ("a.faa.gz", gzip.compress(content))):
        assert re.search(message, failure_of(tmp_path / name, data, name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty gzip file: it lacks even the gzip header"),
        (gzip.compress(b"", mtime=0), "empty gzip file: it decompresses to nothing"),
        (ZIPPED[:-1], rf"truncated gzip: the file ends at byte {len(ZIPPED) - 1},"),
        (ZIPPED[: len(ZIPPED) // 2], rf"truncated gzip: the file ends at byte {len(ZIPPED) // 2},"),
        (ZIPPED[:5], "truncated gzip: the file ends at byte 5,"),
        (ZIPPED[:2], "truncated gzip: the file ends at byte 2,"),
        (
            ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:],
            rf"damaged gzip at or before byte {len(ZIPPED)} of the file: .*(CRC|checksum)",
        ),
        (
            ZIPPED[:-4] + b"\0\0\0\0",
            rf"damaged gzip at or before byte {len(ZIPPED)} of the file: .*(length|checksum)",
        ),
        (ZIPPED[:300] + b"\xff" * 20 + ZIPPED[320:], r"(damaged|truncated) gzip"),
        (ZIPPED + b"rubbish", "damaged gzip at or before .*Not a gzipped file"),
    ],
)
def test_gzip_that_is_cut_off_or_damaged_fails_with_its_offset(tmp_path, content, message):
    assert re.search(message, failure_of(tmp_path, content, "a.fasta.gz"))


def test_gzip_is_told_by_its_bytes_and_members_are_read_on(tmp_path):
    done = embed_one(tmp_path / "1", gzip.compress(b">a\nMK\n"), "a.fasta")
    check(done.load("a_ESM"), [("a", "MK")])
    done = embed_one(tmp_path / "2", b">a\nMK\n", "a.fasta.gz")
    check(done.load("a_ESM"), [("a", "MK")])
    done = embed_one(
        tmp_path / "3",
        gzip.compress(b">a\nM") + gzip.compress(b"") + gzip.compress(b"K\n>b\nKM") + bytes(64),
        "a.fasta.gz",
    )
    check(done.load("a_ESM"), [("a", "MK"), ("b", "KM")])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_LINE", 5000)
    monkeypatch.setattr(scan, "BLOCK", 100)
    assert "a line of more than 5000 bytes" in failure_of(tmp_path, b">a" + b"x" * 6000)


def test_a_file_that_is_gone_or_changed_since_the_plan_fails_alone(tmp_path):
    path = tmp_path / "in" / "a.fasta"
    for text in (">a\nMK\n>b\nMK\n", ">a\nMKV\n", ""):
        message = failure_of(tmp_path, ">a\nMK\n", after_plan=lambda text=text: write(path, text))
        assert "changed while the run was under way" in message
    assert "No such file" in failure_of(tmp_path, ">a\nMK\n", after_plan=path.unlink)


# Residues: a policy.


def changes_of(done: Embedded) -> dict[str, int]:
    return done.report.records["changed"]


def test_by_default_letters_are_put_right_and_every_change_is_counted(tmp_path):
    done = embed_one(
        tmp_path,
        ">a\nmkVl*\n>b\nM-K..V\n>c\nM*KJ?1 V\n>d\nMKV\n>e\nmk-*j**\n>f\nM KV\t 12\n13 L\n",
        include=EVERYTHING,
    )
    check(
        done.load("a_ESM"),
        [("a", "MKVL"), ("b", "MKV"), ("c", "MXKXXV"), ("d", "MKV"), ("e", "MKXX"), ("f", "MKVL")],
        is_each_kind=True,
    )
    assert changes_of(done) == {
        "upper_cased": 3 + 3,
        "stops_removed": 1 + 2,
        "gaps_removed": 3 + 1,
        "replaced": 3 + 2,
        "blanks_removed": 1 + 4,
        "digits_removed": 1 + 4,
        "records": 5,
    }
    assert done.report.records["replaced_letters"] == {"*": 1 + 1, "J": 1 + 1, "?": 1}
    keys = (
        "record",
        "id",
        "residues",
        "embedded",
        "upper_cased",
        "stops_removed",
        "gaps_removed",
        "replaced",
        "blanks_removed",
        "digits_removed",
        "replaced_letters",
    )
    assert [tuple(note[key] for key in keys) for note in done.notes("a_ESM")] == [
        ("1", "a", "4", "4", "3", "1", "0", "0", "0", "0", ""),
        ("2", "b", "3", "3", "0", "0", "3", "0", "0", "0", ""),
        ("3", "c", "6", "6", "0", "0", "0", "3", "1", "1", "*:1 ?:1 J:1"),
        ("5", "e", "4", "4", "3", "2", "1", "2", "0", "0", "*:1 J:1"),
        ("6", "f", "4", "4", "0", "0", "0", "0", "4", "4", ""),
    ]


@pytest.mark.parametrize(
    ("policy", "residues", "changed"),
    [
        ({}, "MKLVX", {"upper_cased": 2, "gaps_removed": 2, "replaced": 1, "stops_removed": 1}),
        (
            {"lower_case": Letter.unknown},
            "MXXVX",
            {"upper_cased": 0, "gaps_removed": 2, "replaced": 3, "stops_removed": 1},
        ),
        (
            {"gaps": Letter.unknown},
            "MKXLVXX",
            {"upper_cased": 2, "gaps_removed": 0, "replaced": 3, "stops_removed": 1},
        ),
        (
            {"trailing_stop": Letter.unknown},
            "MKLVXX",
            {"upper_cased": 2, "gaps_removed": 2, "replaced": 2, "stops_removed": 0},
        ),
    ],
)
def test_each_key_of_the_policy_decides_on_its_own_letters(tmp_path, policy, residues, changed):
    done = embed_one(tmp_path, ">a\nMk-lVJ.*\n", residues=ResidueConfig(**policy))
    check(done.load("a_ESM"), [("a", residues)])
    assert changes_of(done) == {**changed, "blanks_removed": 0, "digits_removed": 0, "records": 1}


@pytest.mark.parametrize("key", ["lower_case", "gaps", "trailing_stop", "none"])
@pytest.mark.parametrize("unknown", list(Unknown))
def test_unknown_letters_become_x_or_skip_the_record_or_fail_the_file(tmp_path, unknown, key):
    text = {"lower_case": "Mk", "gaps": "M-K", "trailing_stop": "MK*", "none": "M?K"}[key]
    replaced = {"lower_case": "MX", "gaps": "MXK", "trailing_stop": "MKX", "none": "MXK"}[key]
    letter = {"lower_case": "k", "gaps": "-", "trailing_stop": r"\*", "none": r"\?"}[key]
    policy = ResidueConfig(unknown=unknown, **({} if key == "none" else {key: Letter.unknown}))
    done = embed_one(tmp_path, f">a\nMK\n>b\n{text}\n>c\nKM\n", residues=policy)
    if unknown is Unknown.fail:
        assert re.search(
            rf"record 2 \(b\) has letters outside the alphabet: '{letter}'", done.failure("a.fasta")
        )
    else:
        middle = [("b", replaced)] if unknown is Unknown.replace else []
        check(done.load("a_ESM"), [("a", "MK"), *middle, ("c", "KM")])
        assert done.report.records["skipped_by_reason"] == ({} if middle else {"unknown letters": 1})


def test_a_token_is_no_letters_and_its_record_is_skipped_or_its_file_failed(tmp_path):
    text = ">a <mask> here\nMK<mask>V\n<eos>\n>b\nMK<cls\nV\n>c\nMK<ma\nsk>V\n>d\nM[MASK]V\n>e\nMK<a>V\n>f\nMKV\n>g\nK<mask\n"
    done = embed_one(tmp_path / "1", text)
    check(done.load("a_ESM"), [("f", "MKV")])
    assert done.report.records["skipped_by_reason"] == {
        "special token <eos>": 1,
        "special token <mask>": 1,
        "special token [mask]": 1,
        "text in angle brackets": 3,
    }
    for token, rest in (("<mask>", "V\n"), ("<m", "ask>V\n"), ("<CLS>", "\n")):
        message = failure_of(tmp_path / token, f">a\nMK{token}\n{rest}", special_tokens=SpecialTokens.fail)
        assert re.match(r"record 1 \(a\) has a special token <(mask|cls)>: special_tokens=skip", message)


@pytest.mark.parametrize("line", ["MKV>b second", ">MKV>b", "<mask>MK>b", "<a<b>c>"])
def test_a_header_in_the_middle_of_a_line_fails_the_file(tmp_path, line):
    """As when files without a last line end are joined with cat; what looks like a token in brackets does not hide it."""
    assert "line 2 has a '>'" in failure_of(tmp_path, f">a\n {line}\n")


def test_records_without_residues_are_skipped_with_their_reason(tmp_path):
    done = embed_one(tmp_path, ">a\n>b\nMK\n>c\n\n  \n>d\n-*\n>e\n", include=EVERYTHING)
    check(done.load("a_ESM"), [("b", "MK")], is_each_kind=True)
    assert done.report.records["skipped_by_reason"] == {"empty sequence": 3, "no residues left": 1}
    assert [(note["record"], note["outcome"], note["note"]) for note in done.notes("a_ESM")] == [
        ("1", "skipped", "empty sequence"),
        ("3", "skipped", "empty sequence"),
        ("4", "skipped", "no residues left"),
        ("5", "skipped", "empty sequence"),
    ]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=LETTERS, max_size=300))
def test_tokens_are_fair_esms_for_every_valid_sequence(residues):
    right = [FAIR_ESM.cls_idx, *FAIR_ESM.encode(residues), FAIR_ESM.eos_idx]
    assert tokenize(residues.encode()).tolist() == fair_esm_tokens(residues).tolist() == right


# Identity.


def test_duplicate_ids_are_kept_in_order_and_counted(tmp_path):
    done = embed_one(tmp_path, ">a 1\nMK\n>b\nKM\n>a 2\nVV\n>a 1\nMK\n")
    check(done.load("a_ESM"), [("a", "MK"), ("b", "KM"), ("a", "VV"), ("a", "MK")])
    assert done.load("a_ESM")["headers"] == ["a 1", "b", "a 2", "a 1"]
    assert done.report.records["duplicate_ids"] == 2


def test_records_without_an_id_get_one_that_is_stable_and_says_so(tmp_path, monkeypatch):
    text = "".join(f">{'' if i % 3 else f'n{i}'}\n{sequence(20, i)}\n" for i in range(30)) + ">   \nMK\n"
    ids = ["" if i % 3 else f"n{i}" for i in range(30)] + [""]
    right = [(name or f"unnamed_{i + 1}", sequence(20, i) if i < 30 else "MK") for i, name in enumerate(ids)]
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 100)
    for number, share in enumerate((1.0, 0.3, 0.05)):
        done = embed_one(tmp_path / str(number), text, unit_share=share)
        check(done.load("a_ESM"), right)
        assert done.report.records["unnamed"] == 21
        assert [note["id"] for note in done.notes("a_ESM")] == [
            name for name, _ in right if name.startswith("unnamed")
        ]
        assert {note["note"] for note in done.notes("a_ESM")} == {"no id in the header"}


# Long proteins.

LONG = [
    ("short", sequence(30)),
    ("limit", sequence(50, 1)),
    ("long", sequence(51, 2)),
    ("longer", sequence(333, 3)),
]
LONG_TEXT = "".join(f">{name}\n{residues}\n" for name, residues in LONG)


def most_central(length: int, width: int, overlap: int) -> list[int]:
    """For each residue the start of the window that answers it, by trying all windows."""
    starts = []
    start = 0
    while start + width < length:
        starts.append(start)
        start += width - overlap
    starts.append(length - width)
    best = []
    for residue in range(length):
        inside = [start for start in starts if start <= residue < start + width]
        best.append(
            max(inside, key=lambda start: (min(residue - start, start + width - 1 - residue), -start))
        )
    return best


def test_windows_answer_each_residue_where_it_is_most_central():
    for width in (1, 2, 3, 8, 13):
        for overlap in range(width):
            for length in range(width + 1, 70):
                spans = windows(length, width, overlap)
                assert all(
                    stop - start == width and start <= first < last <= stop
                    for start, stop, first, last in spans[:-1]
                )
                assert [start for start, _, first, last in spans for _ in range(first, last)] == most_central(
                    length, width, overlap
                )
                assert [first for _, _, first, _ in spans] == [0, *(last for *_, last in spans[:-1])]
                assert spans[-1][3] == length


def test_truncate_embeds_the_first_residues_and_lists_the_records(tmp_path):
    done = embed_one(tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.truncate, include=EVERYTHING)
    check(done.load("a_ESM"), [(name, residues[:50]) for name, residues in LONG], is_each_kind=True)
    assert done.report.records["truncated"] == done.report.files[0].truncated == 2
    assert [
        (note["id"], note["outcome"], note["residues"], note["embedded"]) for note in done.notes("a_ESM")
    ] == [
        ("long", "truncated", "51", "50"),
        ("longer", "truncated", "333", "50"),
    ]


def test_null_embeds_all_residues_of_any_length(tmp_path):
    done = embed_one(tmp_path, LONG_TEXT, truncation_seq_length=None, include=EVERYTHING)
    check(done.load("a_ESM"), LONG, is_each_kind=True)


def test_skip_leaves_long_records_out_with_their_reason(tmp_path):
    done = embed_one(tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.skip)
    check(done.load("a_ESM"), LONG[:2])
    assert done.report.records["skipped_by_reason"] == {"too long": 2}


def test_fail_fails_the_file_and_names_the_record(tmp_path):
    message = failure_of(tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.fail)
    assert "long has 51 residues, more than truncation_seq_length=50" in message


@pytest.mark.parametrize("overlap", [0, 1, 16, 25, 49])
def test_windows_are_stitched_from_the_right_windows_and_averaged_over_all_residues(tmp_path, overlap):
    done = embed_one(
        tmp_path,
        LONG_TEXT,
        truncation_seq_length=50,
        long=Long.window,
        window_overlap=overlap,
        include=EVERYTHING,
    )
    content = done.load("a_ESM")
    assert content["lengths"] == [len(residues) for _, residues in LONG]
    num_windows = []
    for i, (_, residues) in enumerate(LONG):
        spans: list[tuple[int, int, int, int]] = []
        for residue, start in enumerate(
            most_central(len(residues), 50, overlap) if len(residues) > 50 else []
        ):
            if spans and spans[-1][0] == start:
                spans[-1] = (*spans[-1][:3], residue + 1)
            else:
                spans.append((start, start + 50, residue, residue + 1))
        right = expected(residues, spans=spans)
        assert np.array_equal(content["representations"][1][i].numpy(), right.rows)
        assert np.array_equal(content["mean_representations"][1][i].numpy(), right.mean)
        assert np.array_equal(content["bos_representations"][1][i].numpy(), right.bos)
        num_windows.append(len(windows(len(residues), 50, overlap)) if len(residues) > 50 else 0)
    assert done.report.records["windowed"] == 2
    assert done.report.records["windows"] == sum(num_windows)
    assert [int(note["windows"]) for note in done.notes("a_ESM")] == num_windows[2:]


# Counting and cutting.


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_the_parser_wherever_blocks_end(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    records = [(f"r{i} >;x", sequence(rng.randrange(40), i)) for i in range(30)]
    end = rng.choice(["\n", "\r\n", "\r"])
    width = rng.choice([1, 7, 60])
    text = "".join(
        f">{name}{end}" + "".join(residues[i : i + width] + end for i in range(0, len(residues), width))
        for name, residues in records
    )
    path = write(tmp_path / "a.fasta", text.removesuffix(end) if seed % 2 else text)
    parsed = list(SeqIO.parse(open(path, newline=None), "fasta"))  # noqa: SIM115
    lengths = [len(record.seq) for record in parsed]
    num_lines = len(text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"))
    for block in (1, 2, 3, 5, 16, 61, 997, 1 << 20):
        monkeypatch.setattr(scan, "BLOCK", block)
        for limit in (None, 1, 17):
            squares = sum(min(length, limit or length) ** 2 for length in lengths)
            assert count_records(whole_file(path), limit) == Count(
                len(parsed), sum(lengths), squares, num_lines
            )
        assert count_sequences(path) == len(parsed)
        assert count_sequences(write(tmp_path / "a.fasta.gz", gzip.compress(path.read_bytes()))) == len(
            parsed
        )


def cut_text(seed: int, end: str) -> bytes:
    rng = random.Random(seed)
    records = [
        f">r{i} a>b{end}" + "".join(sequence(rng.randrange(30), i + k) + end for k in range(rng.randrange(3)))
        for i in range(25)
    ]
    records[7] = f">huge{end}" + "".join(sequence(60, k) + end for k in range(30))
    return f"{end};remark{end}{''.join(records)}{rng.choice(['', end, end * 3])}".encode()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["plain", "bom", "bgzf 4", "bgzf 37", "bgzf 5000"])
def test_slices_hold_exactly_the_records_of_the_file(tmp_path, kind, end):
    content = (b"\xef\xbb\xbf" if kind == "bom" else b"") + cut_text(len(kind), end)
    is_bgzf = kind.startswith("bgzf")
    path = write(tmp_path / "a.fasta", block_gzip(content, int(kind.split()[1])) if is_bgzf else content)
    all_of_it = whole_file(path)
    right, total = read(all_of_it), count_records(all_of_it)
    assert len(right) == 25
    for num_slices in (1, 2, 3, 4, 5, 7, 11, 18, 40, 200):
        slices = cut_slice(all_of_it, path.stat().st_size, num_slices)
        assert len(slices) <= num_slices
        assert num_slices == 1 or (slices[0].start, slices[-1].stop) == (0, len(content))
        assert all(a.stop == b.start and content[b.start : b.start + 1] == b">" for a, b in pairwise(slices))
        assert b"".join(block for piece in slices for block in raw_blocks(piece)) == content
        counts = [count_records(piece) for piece in slices]
        assert sum(counts, Count()) == total
        assert [record for piece in slices for record in read(piece)] == right
        again = [smaller for piece in slices for smaller in cut_slice(piece, 0, 3)]
        assert [record for piece in again for record in read(piece)] == right


def test_slices_are_of_about_equal_size_and_ordinary_gzip_is_not_cut(tmp_path):
    text = "".join(f">r{i}\n{sequence(80, i)}\n" for i in range(1000)).encode()
    plain, blocked = write(tmp_path / "a.fasta", text), write(tmp_path / "b.fasta.gz", block_gzip(text, 1000))
    for path in (plain, blocked):
        slices = cut_slice(whole_file(path), path.stat().st_size, 10)
        assert len(slices) == 10
        assert max((piece.stop or 0) - piece.start for piece in slices) < len(text) / 10 + 200
    ordinary = write(tmp_path / "c.fasta.gz", gzip.compress(text))
    assert cut_slice(whole_file(ordinary), ordinary.stat().st_size, 10) == [whole_file(ordinary)]


def test_finding_borders_reads_a_file_once_however_few_there_are(tmp_path, monkeypatch):
    path = write(tmp_path / "a.fasta", ">only\n" + "MK\n" * 100_000)
    read_bytes = 0
    original = slices.raw_blocks

    def counting(piece):
        nonlocal read_bytes
        for block in original(piece):
            read_bytes += len(block)
            yield block

    monkeypatch.setattr(slices, "raw_blocks", counting)
    assert len(cut_slice(whole_file(path), path.stat().st_size, 500)) == 1
    assert 0 < read_bytes <= path.stat().st_size


def test_block_gzip_of_empty_blocks_only_is_an_empty_gzip(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 100)
    empty = write(tmp_path / "a.fasta.gz", bgzf._bgzf_eof * 50)
    assert cut_slice(whole_file(empty), empty.stat().st_size, 5) == [whole_file(empty)]
    assert "decompresses to nothing" in failure_of(
        tmp_path, bgzf._bgzf_eof * 50, "a.fasta.gz", unit_share=0.1
    )
    tiny = write(tmp_path / "b.fasta.gz", bgzf._bgzf_eof * 50 + block_gzip(b">\n"))
    assert cut_slice(whole_file(tiny), tiny.stat().st_size, 9)[0].start == 0
    assert [record for piece in cut_slice(whole_file(tiny), 0, 9) for record in read(piece)] == [("", b"")]


def damage(content: bytes, field: str, block: int) -> bytes:
    """BGZF with one field of one block changed."""
    offset = 0
    for _ in range(block):
        offset += struct.unpack("<H", content[offset + 16 : offset + 18])[0] + 1
    end = offset + struct.unpack("<H", content[offset + 16 : offset + 18])[0] + 1
    place = {"block size": offset + 16, "data": offset + 22, "crc": end - 8, "text size": end - 4}[field]
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("field", ["block size", "data", "crc", "text size"])
def test_block_gzip_with_any_damage_fails_cut_or_not(tmp_path, monkeypatch, field):
    text = "".join(f">r{i}\n{sequence(20, i)}\n" for i in range(40)).encode()
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 100)
    for size in (len(text) // 40, 61):
        content = block_gzip(text, size)
        num_blocks = -(-len(text) // size)
        for number, block in enumerate({0, 1, num_blocks // 2, num_blocks - 2, num_blocks - 1}):
            for share in (1.0, 0.1):
                place = tmp_path / f"{size} {number} {share}"
                if (
                    field == "block size"
                ):  # gzip itself does not need it: no reason to fail, but every record must be there
                    done = embed_one(place, damage(content, field, block), "a.fasta.gz", unit_share=share)
                    check(done.load("a_ESM"), [(f"r{i}", sequence(20, i)) for i in range(40)])
                else:
                    message = failure_of(place, damage(content, field, block), "a.fasta.gz", unit_share=share)
                    assert "damaged gzip" in message or "truncated gzip" in message


def test_a_failing_line_of_a_cut_file_is_counted_from_the_files_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 100)
    lines = [line for i in range(100) for line in (f">r{i}", sequence(30, i))]
    lines[151] = "MK\x01"
    for share in (1.0, 0.2, 0.01):
        message = failure_of(tmp_path / str(share), "\r\n".join(lines), unit_share=share)
        assert message.startswith("line 152 holds control characters")


# Parts, joins and identical sequences: other ways to the same numbers.

MANY = [(f"p{i % 37}", sequence(5 + (i * 7) % 40, i % 50)) for i in range(120)]
MANY_TEXT = "".join(
    f">{name} no {i}\n{residues}\n" + (">empty\n" if i % 10 == 9 else "")
    for i, (name, residues) in enumerate(MANY)
)


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return (
        torch.equal(one, other)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        else one == other
    )


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_a_file_that_was_cut_and_joined_is_the_file_uncut(tmp_path, monkeypatch, share, is_zipped):
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 50)
    content = block_gzip(MANY_TEXT.encode(), 90) if is_zipped else MANY_TEXT.encode()
    path = write(tmp_path / "a.fa.gz", content)
    uncut = embed_directory(path, tmp_path / "uncut", unit_share=1.0, include=EVERYTHING)
    joined = embed_directory(path, tmp_path / "cut", unit_share=share, include=EVERYTHING)
    assert len(uncut.plan.units_of(0)) == 1 < len(joined.plan.units_of(0))
    check(uncut.load("a_ESM"), MANY, is_each_kind=True)
    assert same(uncut.load("a_ESM"), joined.load("a_ESM"))
    assert uncut.notes("a_ESM") == joined.notes("a_ESM") != []
    assert joined.report.files[0].sequences == 132
    assert joined.report.files[0].outputs == ["a_ESM.pt"]


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("most", [1, 7, 50, 131])
def test_numbered_parts_end_to_end_are_the_file_in_one(tmp_path, monkeypatch, most, share):
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 50)
    done = embed_one(tmp_path, MANY_TEXT, max_proteins_per_output=most, unit_share=share, include=EVERYTHING)
    parts = [output for output in done.outputs() if output.startswith("a_ESM")]
    assert parts == [f"a_ESM.part{number + 1:05d}" for number in range(len(parts))]
    assert done.report.files[0].outputs == [f"{part}.pt" for part in parts]
    seen = []
    for part in parts:
        content = done.load(part)
        assert len(content["proteins"]) <= most
        check(content, MANY[len(seen) : len(seen) + len(content["proteins"])], is_each_kind=True)
        seen += content["proteins"]
    assert seen == [name for name, _ in MANY]
    assert sum(len(done.notes(part)) for part in parts) == done.report.records["skipped"] == 12


def test_a_file_of_exactly_as_many_proteins_as_a_part_holds_is_in_one(tmp_path):
    done = embed_one(tmp_path, MANY_TEXT, max_proteins_per_output=132)
    assert done.outputs() == ["a_ESM", "zz_good_ESM"]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"truncation_seq_length": 20},
        {"truncation_seq_length": 20, "long": Long.window, "window_overlap": 5},
    ],
)
def test_dedupe_changes_no_bit_and_its_saving_is_counted(tmp_path, overrides):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        rng = random.Random(seed)
        text = "".join(
            f">{name}{i}\n{sequence(rng.randrange(1, 45), rng.randrange(4))}\n" for i in range(150)
        )
        write(tmp_path / "in" / f"{name}.fasta", text)
    off = embed_directory(tmp_path / "in", tmp_path / "off", dedupe=False, include=EVERYTHING, **overrides)
    on = embed_directory(tmp_path / "in", tmp_path / "on", dedupe=True, include=EVERYTHING, **overrides)
    assert on.outputs() == off.outputs() == ["a_ESM", "b_ESM", "c_ESM"]
    for output in on.outputs():
        assert (on.output_dir / f"{output}.pt").read_bytes() == (off.output_dir / f"{output}.pt").read_bytes()
    kept = {key: value for key, value in on.report.records.items() if key != "deduplicated"}
    assert kept == {key: value for key, value in off.report.records.items() if key != "deduplicated"}
    assert off.report.records["deduplicated"] == 0
    saved = on.report.records["deduplicated"]
    distinct = {
        residues for path in (tmp_path / "in").iterdir() for residues in path.read_text().split("\n")[1::2]
    }
    if not overrides:
        assert saved == 450 - len(distinct) > 0
        assert on.engine.num_segments == len(distinct)
        assert off.engine.num_segments == 450
    assert on.engine.num_tokens < off.engine.num_tokens


def test_dedupe_forgets_old_answers_and_stays_right(tmp_path, monkeypatch):
    module = sys.modules[Reader.__module__]
    monkeypatch.setattr(
        module, "DEDUPE_BYTES", 16 * (module.LEADER_BYTES + 24)
    )  # room for 16 answers of one vector of 6 numbers
    rng = random.Random(0)
    records = [(f"r{i}", sequence(3 + rng.randrange(40))) for i in range(400)]
    done = embed_one(tmp_path, "".join(f">{name}\n{residues}\n" for name, residues in records))
    check(done.load("a_ESM"), records)
    assert 0 < done.report.records["deduplicated"] < 400 - 40
    assert done.engine.num_segments == 401 - done.report.records["deduplicated"]


# Packing and dealing out.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(3, 60), max_size=200), st.integers(3, 50), st.integers(1, 8))
def test_packs_hold_every_segment_once_and_no_more_than_fits(sizes, capacity, max_open):
    packer = Packer(capacity, max_open)
    packs = []
    for protein_index, size in enumerate(sizes):
        packs += packer.add(Segment(protein_index, 0, np.empty(size, np.uint8), (0, size - 2)))
    last = list(packer.flush())
    assert all(one.num_tokens + other.num_tokens > capacity for one, other in itertools.combinations(last, 2))
    packs += last
    tickets = [segment.protein for pack in packs for segment in pack.segments]
    assert sorted(tickets) == list(range(len(sizes)))
    assert all(pack.num_tokens <= capacity or len(pack.segments) == 1 for pack in packs)


def test_no_pack_is_left_open_for_ever():
    packer = Packer(100, max_open=4)
    packs = list(packer.add(Segment(0, 0, np.empty(55, np.uint8), (0, 53))))
    for protein_index in range(1, 20):
        packs += packer.add(Segment(protein_index, 0, np.empty(60, np.uint8), (0, 58)))
    assert 0 in [segment.protein for pack in packs for segment in pack.segments]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.integers(0, 50), max_size=30),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_file_goes_to_the_worker_with_the_fewest_sequences_so_far(given_counts, num_workers, rng):
    counts = {Path(name): number for name, number in given_counts.items()}
    bins = assign_files_by_size(counts, num_workers)
    assert len(bins) == num_workers
    assert Counter(path for own in bins for path in own) == Counter(list(counts))
    loads = [0] * num_workers
    left = [list(own) for own in bins]
    for path in sorted(counts, key=lambda path: (-counts[path], str(path))):
        (worker,) = [number for number, own in enumerate(left) if own[:1] == [path]]
        assert loads[worker] == min(loads)
        loads[worker] += counts[path]
        left[worker].pop(0)
    shuffled = list(counts.items())
    rng.shuffle(shuffled)
    assert assign_files_by_size(dict(shuffled), num_workers) == bins
    if len(counts) >= num_workers:
        assert all(bins)


def test_files_are_counted_when_no_counts_are_given(tmp_path):
    paths = [write(tmp_path / f"{n}.fasta", ">x\nMK\n" * n) for n in (1, 5, 3, 2)]
    assert assign_files_by_size(paths, 2) == [[paths[1], paths[0]], [paths[2], paths[3]]]
    assert assign_files_by_size(paths[:1], 3) == [[paths[0]], [], []]
    assert assign_files_by_size([], 2) == [[], []]


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 workers"):
        assign_files_by_size({"a": 1}, 0)
    with pytest.raises(ValueError, match="named twice"):
        assign_files_by_size({"a": 1, Path("a"): 2}, 1)
    path = write(tmp_path / "a.fasta", GOOD)
    with pytest.raises(ValueError, match="named twice"):
        assign_files_by_size([path, str(path)], 2)
    with pytest.raises(FastaError, match="truncated gzip"):
        count_sequences(write(tmp_path / "b.fasta.gz", ZIPPED[:50]))
    with pytest.raises(OSError, match="missing"):
        count_sequences(tmp_path / "missing.fasta")


def test_an_output_folder_inside_another_is_refused(tmp_path):
    """With format=fair_esm an output is a folder: a.fasta and a_ESM/b.fasta would get into each other's way."""
    write(tmp_path / "in/a.fasta", GOOD)
    write(tmp_path / "in/a_ESM/b.fasta", GOOD)
    files = find_files([str(tmp_path / "in")])
    with pytest.raises(ValueError, match=r"b\.fasta would be written inside the output folder of .*a\.fasta"):
        refuse_nested(files)
    refuse_nested(files[:1])
