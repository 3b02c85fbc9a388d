"""Headers, records and ids, and files that are no FASTA."""

from __future__ import annotations

import gzip
import re

import pytest

from dist_esm.planning import units
from helpers.fasta import random_sequence
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import ALL_KINDS


def test_headers_in_utf8_and_with_any_punctuation_are_kept_in_full(tmp_path):
    headers = [
        "prot\u00e9ine_\u03b1 souche \u2116 5",
        "sp|P1|A_B desc\x01gi|2|second",
        "x>y >z ;w",
        "tab\tafter",
        "\U0001f9ec",
    ]
    done = embed_beside_good(tmp_path, "".join(f">{header}\nMK\n" for header in headers))
    content = done.load("a_ESM")
    assert content["headers"] == headers
    assert content["proteins"] == [header.split()[0] for header in headers]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\r\n\r\n", b"  \n\t\n", b"; only a remark\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"],
)
def test_a_file_without_proteins_gives_an_empty_output(tmp_path, content):
    done = embed_beside_good(tmp_path, content, include=ALL_KINDS)
    assert done.report.status == "complete"
    output = done.load("a_ESM")
    check_output(output, [])
    assert output["mean_representations"][1].shape == (0, 6)


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


@pytest.mark.parametrize("line", ["MKV>b second", ">MKV>b", "<mask>MK>b", "<a<b>c>"])
def test_a_header_in_the_middle_of_a_line_fails_the_file(tmp_path, line):
    """Joining files without a last line end with cat leaves such a header.

    A token in brackets does not hide it.
    """
    assert "line 2 has a '>'" in failure_of(tmp_path, f">a\n {line}\n")


def test_records_without_residues_are_skipped_with_their_reason(tmp_path):
    done = embed_beside_good(tmp_path, ">a\n>b\nMK\n>c\n\n  \n>d\n-*\n>e\n", include=ALL_KINDS)
    check_output(done.load("a_ESM"), [("b", "MK")], has_all_kinds=True)
    assert done.report.records["skipped_by_reason"] == {"empty sequence": 3, "no residues left": 1}
    assert [(note["record"], note["outcome"], note["note"]) for note in done.notes("a_ESM")] == [
        ("1", "skipped", "empty sequence"),
        ("3", "skipped", "empty sequence"),
        ("4", "skipped", "no residues left"),
        ("5", "skipped", "empty sequence"),
    ]


def test_duplicate_ids_are_kept_in_order_and_counted(tmp_path):
    done = embed_beside_good(tmp_path, ">a 1\nMK\n>b\nKM\n>a 2\nVV\n>a 1\nMK\n")
    check_output(done.load("a_ESM"), [("a", "MK"), ("b", "KM"), ("a", "VV"), ("a", "MK")])
    assert done.load("a_ESM")["headers"] == ["a 1", "b", "a 2", "a 1"]
    assert done.report.records["duplicate_ids"] == 2


def test_records_without_an_id_get_one_that_is_stable_and_says_so(tmp_path, monkeypatch):
    text = (
        "".join(f">{'' if i % 3 else f'n{i}'}\n{random_sequence(20, i)}\n" for i in range(30)) + ">   \nMK\n"
    )
    ids = ["" if i % 3 else f"n{i}" for i in range(30)] + [""]
    right = [
        (name or f"unnamed_{i + 1}", random_sequence(20, i) if i < 30 else "MK") for i, name in enumerate(ids)
    ]
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    for number, share in enumerate((1.0, 0.3, 0.05)):
        done = embed_beside_good(tmp_path / str(number), text, unit_share=share)
        check_output(done.load("a_ESM"), right)
        assert done.report.records["unnamed"] == 21
        assert [note["id"] for note in done.notes("a_ESM")] == [
            name for name, _ in right if name.startswith("unnamed")
        ]
        assert {note["note"] for note in done.notes("a_ESM")} == {"no id in the header"}
