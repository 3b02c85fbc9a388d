"""Text and gzip in all their forms, read block by block."""

from __future__ import annotations

import gzip
import re

import pytest

from dist_esm.fasta import blocks
from helpers.fasta import block_gzip, random_sequence, write
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import ALL_KINDS

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
        b"; made by hand\n>one first\n;a remark > here\nMKVLA\n ; another\nAGIVG\n"
        b">two\nACDEFGHIKLMNPQRSTVWY\n>three\nXBUZO\n;end",
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
    monkeypatch.setattr(blocks, "BLOCK", block)
    for name, data in (
        ("a.fasta", content),
        ("a.fasta.gz", gzip.compress(content)),
        ("a.fa.gz", block_gzip(content, 11)),
    ):
        done = embed_beside_good(tmp_path / name, data, name, include=ALL_KINDS)
        assert done.report.status == "complete"
        check_output(done.load("a_ESM"), PLAIN, has_all_kinds=True)
        assert done.load("a_ESM")["headers"] == ["one first", "two", "three"]
        assert done.notes("a_ESM") == []


ZIPPED = gzip.compress("".join(f">r{i}\n{random_sequence(50, i)}\n" for i in range(40)).encode(), mtime=0)


def test_a_line_longer_than_a_block_and_one_of_many_blocks_are_read_whole(tmp_path):
    residues = random_sequence(400_000) * 3
    write(tmp_path / "a.fasta", f">long\n{residues[:900_000]}\n>b\nMK\n>{'h' * 3_000_000} title\nKM\n")
    done = embed_beside_good(tmp_path, (tmp_path / "a.fasta").read_bytes(), truncation_seq_length=None)
    check_output(done.load("a_ESM"), [("long", residues[:900_000]), ("b", "MK"), ("h" * 3_000_000, "KM")])


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
    done = embed_beside_good(tmp_path / "1", gzip.compress(b">a\nMK\n"), "a.fasta")
    check_output(done.load("a_ESM"), [("a", "MK")])
    done = embed_beside_good(tmp_path / "2", b">a\nMK\n", "a.fasta.gz")
    check_output(done.load("a_ESM"), [("a", "MK")])
    done = embed_beside_good(
        tmp_path / "3",
        gzip.compress(b">a\nM") + gzip.compress(b"") + gzip.compress(b"K\n>b\nKM") + bytes(64),
        "a.fasta.gz",
    )
    check_output(done.load("a_ESM"), [("a", "MK"), ("b", "KM")])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_LINE", 5000)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    assert "a line of more than 5000 bytes" in failure_of(tmp_path, b">a" + b"x" * 6000)
