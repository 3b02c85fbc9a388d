"""The residue policy: what becomes of every letter, and how it is counted."""

from __future__ import annotations

import re

import pytest

from dist_esm.config import Letter, ResidueConfig, SpecialTokens, Unknown
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import ALL_KINDS, Embedded


def changes_of(done: Embedded) -> dict[str, int]:
    return done.report.records["changed"]


def test_by_default_letters_are_put_right_and_every_change_is_counted(tmp_path):
    done = embed_beside_good(
        tmp_path,
        ">a\nmkVl*\n>b\nM-K..V\n>c\nM*KJ?1 V\n>d\nMKV\n>e\nmk-*j**\n>f\nM KV\t 12\n13 L\n",
        include=ALL_KINDS,
    )
    check_output(
        done.load("a_ESM"),
        [("a", "MKVL"), ("b", "MKV"), ("c", "MXKXXV"), ("d", "MKV"), ("e", "MKXX"), ("f", "MKVL")],
        has_all_kinds=True,
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
    done = embed_beside_good(tmp_path, ">a\nMk-lVJ.*\n", residues=ResidueConfig(**policy))
    check_output(done.load("a_ESM"), [("a", residues)])
    assert changes_of(done) == {**changed, "blanks_removed": 0, "digits_removed": 0, "records": 1}


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


def test_codes_of_three_letters_are_no_letters(tmp_path):
    """`MetLysVal` is three residues, and would be embedded as nine."""
    codes = ["MetLysVal", "Met-Lys-Val", "MET LYS\nVAL", "met-lys", "AlaTer"]
    proteins = ["METLYSVAL", "Metlysval", "MetLysValQ", "VAL"]
    text = "".join(f">{i}\n{letters}\n" for i, letters in enumerate([*codes, *proteins]))
    done = embed_beside_good(tmp_path / "1", text)
    whole = [(str(i + len(codes)), letters.upper()) for i, letters in enumerate(proteins)]
    check_output(done.load("a_ESM"), whole)
    assert done.report.records["skipped_by_reason"] == {"three-letter codes": len(codes)}
    policy = ResidueConfig(unknown=Unknown.fail)
    message = failure_of(tmp_path / "2", ">a\nMetLys\n", residues=policy)
    assert message.startswith("record 1 (a) is in codes of three letters; residues.unknown=replace skips")


def test_a_token_is_no_letters_and_its_record_is_skipped_or_its_file_failed(tmp_path):
    text = (
        ">a <mask> here\nMK<mask>V\n<eos>\n>b\nMK<cls\nV\n>c\nMK<ma\nsk>V\n>d\nM[MASK]V\n>e\nMK<a>V\n"
        ">f\nMKV\n>g\nK<mask\n>h\nMK(ac)V\n>i\nMKC[+57.02]V\n>j\nM{2}V\n"
    )
    done = embed_beside_good(tmp_path / "1", text)
    check_output(done.load("a_ESM"), [("f", "MKV")])
    assert done.report.records["skipped_by_reason"] == {
        "special token <eos>": 1,
        "special token <mask>": 1,
        "special token [mask]": 1,
        "text in brackets": 6,
    }
    for token, rest in (("<mask>", "V\n"), ("<m", "ask>V\n"), ("<CLS>", "\n")):
        message = failure_of(tmp_path / token, f">a\nMK{token}\n{rest}", special_tokens=SpecialTokens.fail)
        assert re.match(r"record 1 \(a\) has a special token <(mask|cls)>: special_tokens=skip", message)
