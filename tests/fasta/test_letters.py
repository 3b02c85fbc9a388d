"""The residue policy: what becomes of every letter, and how it is counted."""

from __future__ import annotations

import re

import pytest

from dist_esm.config import Letter, ResidueConfig, Unknown
from helpers.intake import check_output, embed_beside_good
from helpers.standin import ALL_KINDS, Embedded


def changes_of(done: Embedded) -> dict[str, int]:
    return done.report.records["changed"]


def test_by_default_letters_are_put_right_and_every_change_is_counted(tmp_path):
    done = embed_beside_good(
        tmp_path, ">a\nmkVl*\n>b\nM-K..V\n>c\nM*KJ?1 V\n>d\nMKV\n>e\nmk-*j**\n", include=ALL_KINDS
    )
    check_output(
        done.load("a_ESM"),
        [("a", "MKVL"), ("b", "MKV"), ("c", "MXKXXXXV"), ("d", "MKV"), ("e", "MKXX")],
        has_all_kinds=True,
    )
    assert changes_of(done) == {
        "upper_cased": 3 + 3,
        "stops_removed": 1 + 2,
        "gaps_removed": 3 + 1,
        "replaced": 5 + 2,
        "records": 4,
    }
    keys = (
        "record",
        "id",
        "residues",
        "embedded",
        "upper_cased",
        "stops_removed",
        "gaps_removed",
        "replaced",
    )
    assert [tuple(note[key] for key in keys) for note in done.notes("a_ESM")] == [
        ("1", "a", "4", "4", "3", "1", "0", "0"),
        ("2", "b", "3", "3", "0", "0", "3", "0"),
        ("3", "c", "8", "8", "0", "0", "0", "5"),
        ("5", "e", "4", "4", "3", "2", "1", "2"),
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
    done = embed_beside_good(tmp_path, ">a\nMk-lVJ.*\n", residues=ResidueConfig(**policy))
    check_output(done.load("a_ESM"), [("a", residues)])
    assert changes_of(done) == {**changed, "records": 1}


@pytest.mark.parametrize("key", ["lower_case", "gaps", "trailing_stop", "none"])
@pytest.mark.parametrize("unknown", list(Unknown))
def test_unknown_letters_become_x_or_skip_the_record_or_fail_the_file(tmp_path, unknown, key):
    text = {"lower_case": "Mk", "gaps": "M-K", "trailing_stop": "MK*", "none": "M?K"}[key]
    replaced = {"lower_case": "MX", "gaps": "MXK", "trailing_stop": "MKX", "none": "MXK"}[key]
    letter = {"lower_case": "k", "gaps": "-", "trailing_stop": r"\*", "none": r"\?"}[key]
    policy = ResidueConfig(unknown=unknown, **({} if key == "none" else {key: Letter.unknown}))
    done = embed_beside_good(tmp_path, f">a\nMK\n>b\n{text}\n>c\nKM\n", residues=policy)
    if unknown is Unknown.fail:
        assert re.search(
            rf"record 2 \(b\) has letters outside the alphabet: '{letter}'", done.failure("a.fasta")
        )
    else:
        middle = [("b", replaced)] if unknown is Unknown.replace else []
        check_output(done.load("a_ESM"), [("a", "MK"), *middle, ("c", "KM")])
        assert done.report.records["skipped_by_reason"] == ({} if middle else {"unknown letters": 1})


def test_text_that_looks_like_a_token_has_no_special_meaning(tmp_path):
    done = embed_beside_good(tmp_path / "1", ">a <mask> here\nMK<mask>V\n<eos>\n>b\nMK<cls\nV<mask\n")
    check_output(done.load("a_ESM"), [("a", "MKXMASKXVXEOSX"), ("b", "MKXCLSVXMASK")])
