"""Inputs that were misread, dropped or trusted without a look, each with what it should come to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import socket
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio import SeqIO
from esm.data import Alphabet

from dist_esm import Embedder
from dist_esm.config import (
    Attention,
    Chains,
    Config,
    HeaderEncoding,
    Include,
    Letter,
    LinearKind,
    Long,
    ModelConfig,
    ResidueConfig,
    SpecialTokens,
    Unknown,
)
from dist_esm.fair_esm import fair_esm_tokens
from dist_esm.fasta.blocks import whole_file
from dist_esm.fasta.formats import is_readable
from dist_esm.fasta.letters import SPECIAL_TOKEN, is_nucleotide, make_proteins
from dist_esm.fasta.parser import look_at_first_records
from dist_esm.fasta.segments import Span, make_segments
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.engine import build_engine
from dist_esm.model.kernels.choose import choose_kernels
from dist_esm.planning import units
from dist_esm.planning.inputs import search_inputs
from dist_esm.types import MASK, Pack
from helpers.checkpoints import A8M, fair_esm_model, random_state
from helpers.command import MODEL, command, environment, read_report, run_ranks
from helpers.compare import relative_error
from helpers.fasta import block_gzip, random_sequence, write
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import embed_directory, expected

CASES = Path(__file__).parents[1] / "data" / "cases"
TWO = [("p1", "MKTAYIAKQR"), ("p2", "GAVLIPFMW")]
TWO_TEXT = (CASES / "two.faa").read_bytes()


def skipped(done) -> dict[str, int]:
    return done.report.records["skipped_by_reason"]


# Letters.


def test_blanks_are_removed_and_counted_as_fair_esm_and_biopython_do(tmp_path):
    done = embed_beside_good(tmp_path, (CASES / "blanks.fa").read_bytes())
    right = [
        (record.id, str(record.seq).replace(" ", "")) for record in SeqIO.parse(CASES / "blanks.fa", "fasta")
    ]
    check_output(done.load("a_ESM"), right)
    assert [len(residues) for _, residues in right] == [20, 10, 20, 10]
    assert done.report.records["changed"]["blanks_removed"] == 10
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    for line in ("MKTAYIAKQR QISFVKSHFS", "M K T\tA Y"):
        (protein,) = make_proteins("a", line, 1, Config())
        assert (
            convert([("a", line)])[2][0].tolist()[: len(protein.residues) + 1]
            == tokenize(protein.residues).tolist()[:-1]
        )


@pytest.mark.parametrize(
    ("text", "residues", "digits"),
    [
        ("        1 mktayiakqr qisfvkshfs\n       21 rq", "MKTAYIAKQRQISFVKSHFSRQ", 3),
        ("1 MKTAYIAKQR 11 QISFVKSHFS 21 RQ", "MKTAYIAKQRQISFVKSHFSRQ", 5),
        ("MKTAYIAKQR 10\nQISFVKSHFS 20\nRQ 22", "MKTAYIAKQRQISFVKSHFSRQ", 6),
        ("MKTAYIAKQR\t10\r\n20\nQISFVKSHFS", "MKTAYIAKQRQISFVKSHFS", 4),
        ("1MKTAYIAKQR 11QISFVKSHFS\nRQ22", "MKTAYIAKQRQISFVKSHFSRQ", 5),
        ("1. MKTAYIAKQR\n11. QISFVKSHFS\n//", "MKTAYIAKQRQISFVKSHFS", 3),
        ("  1 mktayiakqr\n//\n", "MKTAYIAKQR", 1),
        ("   10        20\nMKTAYIAKQRQISFVKSHFS", "MKTAYIAKQRQISFVKSHFS", 4),
        ("MKTAY\u00a0IAKQR\u2003QIS\x0bFVK\x0cSHFS", "MKTAYIAKQRQISFVKSHFS", 0),
    ],
)
def test_numbers_of_blocks_go_with_the_blanks(tmp_path, text, residues, digits):
    done = embed_beside_good(tmp_path, f">a\n{text}\n>b\nMKV\n")
    check_output(done.load("a_ESM"), [("a", residues), ("b", "MKV")])
    assert done.report.records["changed"]["digits_removed"] == digits
    assert done.report.records["changed"]["replaced"] == 0


def test_blanks_and_numbers_are_unknown_letters_if_one_wants_that(tmp_path):
    policy = ResidueConfig(blanks=Letter.unknown)
    done = embed_beside_good(tmp_path, ">a\n1 MK TV\n  AC\t\n2\n", residues=policy)
    check_output(done.load("a_ESM"), [("a", "XXMKXTVACX")])
    assert done.report.records["replaced_letters"] == {"\t": 2, "1": 1, "2": 1}
    (note,) = done.notes("a_ESM")
    assert note["replaced_letters"] == r"\t:2 1:1 2:1"


def test_the_specials_known_here_are_all_of_fair_esms():
    alphabet = Alphabet.from_architecture("ESM-1b")
    names = [token for token in alphabet.all_toks if token.startswith("<")]
    assert set(alphabet.all_special_tokens) <= set(names)
    assert all(SPECIAL_TOKEN.fullmatch(name) for name in names)
    for name in names:
        (protein,) = make_proteins("a", f"MK{name}V", 1, Config())
        assert (protein.residues, protein.skipped) == (b"", f"special token {name}")


def test_tokens_are_skipped_with_their_name_failed_or_the_mask_embedded(tmp_path):
    content = (CASES / "tokens.fa").read_bytes()
    done = embed_beside_good(tmp_path / "skip", content)
    check_output(done.load("a_ESM"), [("x", "KAXISQ")])
    assert skipped(done) == {"special token <mask>": 1, "special token <cls>": 1}
    assert "record 1 (m) has a special token <mask>" in failure_of(
        tmp_path / "fail", content, special_tokens=SpecialTokens.fail
    )
    done = embed_beside_good(tmp_path / "mask", content, special_tokens=SpecialTokens.mask)
    assert done.load("a_ESM")["proteins"] == ["m", "x"]
    assert np.array_equal(
        done.load("a_ESM")["data"][0].numpy(), expected(["K", "A", "<mask>", "I", "S", "Q"]).mean
    )
    assert skipped(done) == {"special token <cls>": 1}


def test_a_control_character_that_stands_for_the_mask_cannot_be_smuggled_in():
    (protein,) = make_proteins("a", "MK\x1aVL", 1, Config(special_tokens=SpecialTokens.mask))
    assert protein.residues == b"MKXVL"


def test_masked_tokens_are_embedded_as_fair_esm_does_and_in_any_company(tmp_path, checkpoint_8m):
    """With its token dropout, which depends on how many tokens of this sequence are masked."""
    masked = {
        "one": "KA<mask>ISQ",
        "many": "<mask>" * 7 + "MKV",
        "all": "<mask><mask>",
        "none": "KAXISQMKVLA",
        "wrapped": "MKV<ma\nsk>LL",
    }
    text = "".join(f">{name}\n{letters}\n" for name, letters in masked.items())
    settings = [
        MODEL,
        f"model.weights={checkpoint_8m}",
        "device=cpu",
        "dtype=fp32",
        "repr_layers=[0,3,-1]",
        "include=[mean,bos,per_tok]",
        "special_tokens=mask",
    ]
    together, alone = write(tmp_path / "in" / "a.fa", text), tmp_path / "alone"
    for name, letters in masked.items():
        write(alone / f"{name}.fa", f">{name}\n{letters}\n")
    for path, out, most in ((together, "together", 1000), (alone, "apart", 8)):
        result = run_ranks(
            None, f"input={path}", f"output_dir={tmp_path / out}", *settings, f"toks_per_batch={most}"
        )
        assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "together" / "a_ESM.pt", weights_only=True)
    assert content["proteins"] == list(masked)
    oracle = fair_esm_model(A8M, random_state(A8M))
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    for i, (name, letters) in enumerate(masked.items()):
        tokens = convert([(name, letters.replace("\n", ""))])[2]
        with torch.inference_mode():
            hidden = oracle(tokens, repr_layers=[0, 3, 6])["representations"]
        single = torch.load(tmp_path / "apart" / f"{name}_ESM.pt", weights_only=True)
        for layer in (0, 3, 6):
            rows = hidden[layer][0, 1:-1]
            assert content["representations"][layer][i].shape == rows.shape
            assert (content["representations"][layer][i] - rows).abs().max() <= 1e-5 * rows.abs().max()
            assert relative_error(content["bos_representations"][layer][i], hidden[layer][0, 0]) <= 1e-5
            assert torch.equal(content["representations"][layer][i], single["representations"][layer][0])
            assert torch.equal(
                content["mean_representations"][layer][i], single["mean_representations"][layer][0]
            )
    # At layer 0 a mask is 0, and selfcheck takes a vector that is 0 for wrong.
    layers = [item for item in settings if "repr_layers" not in item] + ["repr_layers=[3,-1]"]
    checked = run_ranks(
        None, "job=selfcheck", f"input={together}", f"output_dir={tmp_path / 'check'}", *layers
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masked_tokens_on_a_gpu_are_fair_esms_in_any_company(dtype, checkpoint_8m):
    config = Config(
        model=ModelConfig(
            "esm2_t6_8M_UR50D", A8M.num_layers, A8M.embed_dim, A8M.attention_heads, str(checkpoint_8m)
        ),
        repr_layers=[0, 3, 6],
        include=[Include.mean, Include.per_tok],
        toks_per_batch=1024,
    )
    device = torch.device("cuda", 0)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    kernels = choose_kernels(Attention.auto, LinearKind.auto, device, precision, A8M.head_dim)
    engine = build_engine(config, device, precision, kernels)
    texts = [b"KA" + MASK + b"ISQ", MASK * 7 + b"MKV", random_sequence(80).encode(), b"MKV" * 30 + MASK]
    segments = [make_segments(i, text, [Span(0, len(text), 0, len(text))])[0] for i, text in enumerate(texts)]
    alone = [engine.run(Pack((segment,)))[0] for segment in segments]
    together = engine.run(Pack(tuple(reversed(segments))))[::-1]
    oracle = fair_esm_model(A8M, random_state(A8M))
    for text, one, other in zip(texts, alone, together, strict=True):
        with torch.inference_mode():
            hidden = oracle(fair_esm_tokens(text), repr_layers=[0, 3, 6])["representations"]
        for layer in (0, 3, 6):
            np.testing.assert_array_equal(one.rows[layer], other.rows[layer])
            np.testing.assert_array_equal(one.sums[layer], other.sums[layer])
            rows = hidden[layer][0, 1:-1]
            most = 1e-5 if dtype == "fp32" else 0.05
            assert (torch.from_numpy(one.rows[layer]) - rows).norm() <= most * rows.norm()


CHAINS = ">a one\nMKV:LAG\n>b\nMKV/LAG\n>c\nMK|LA|V*\n>d\nMKVXLAG\n>e\nMKV/\n>\nAC:DE\n"


def test_chains_are_no_protein_together_and_each_is_one_if_one_wants_that(tmp_path):
    done = embed_beside_good(tmp_path / "skip", CHAINS)
    check_output(done.load("a_ESM"), [("d", "MKVXLAG")])
    assert skipped(done) == {"chain separators": 5}
    done = embed_beside_good(tmp_path / "split", CHAINS, chains=Chains.split)
    right = [
        ("a_1", "MKV"),
        ("a_2", "LAG"),
        ("b_1", "MKV"),
        ("b_2", "LAG"),
        ("c_1", "MK"),
        ("c_2", "LA"),
        ("c_3", "V"),
    ]
    right += [("d", "MKVXLAG"), ("e", "MKV"), ("unnamed_6_1", "AC"), ("unnamed_6_2", "DE")]
    check_output(done.load("a_ESM"), right)
    assert done.load("a_ESM")["headers"][:2] == ["a one", "a one"]
    assert done.report.records["in"] == done.report.records["ok"] == 12
    assert done.report.records["more_chains"] == 5


@pytest.mark.parametrize("share", [1.0, 0.2, 0.02])
@pytest.mark.parametrize("most", [3, 7, 1000])
def test_chains_go_where_their_record_goes_however_the_file_is_cut(tmp_path, monkeypatch, share, most):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 60)
    records = [(f"r{i}", [random_sequence(5 + i % 7, i + k) for k in range(1 + i % 4)]) for i in range(50)]
    text = "".join(f">{name}\n{':'.join(chains)}\n" for name, chains in records)
    right = [
        (f"{name}_{k + 1}" if len(chains) > 1 else name, chain)
        for name, chains in records
        for k, chain in enumerate(chains)
    ]
    done = embed_beside_good(
        tmp_path, text, chains=Chains.split, unit_share=share, max_proteins_per_output=most
    )
    found = []
    for output in [output for output in done.outputs() if output.startswith("a_ESM")]:
        content = done.load(output)
        check_output(content, right[len(found) : len(found) + len(content["proteins"])])
        found += content["proteins"]
    assert found == [name for name, _ in right]
    assert done.report.records["in"] == len(right) + 1
    assert done.report.records["more_chains"] == len(right) - 50


@pytest.mark.parametrize(
    "text",
    [
        "40 40 40 38 37 12\n40 39",
        "9887655432100",
        "-1 -2 3 5",
        "????M",
        "3.14 2.71 0.5",
        "\u041c\u0410\u041b\u0410M",
        "1, 2, 3, 4",
        "0",
    ],
)
def test_a_record_that_is_mostly_no_residues_is_skipped_with_the_reason(tmp_path, text):
    done = embed_beside_good(tmp_path / "1", f">q scores\n{text}\n>b\nMKV\n")
    check_output(done.load("a_ESM"), [("b", "MKV")])
    assert skipped(done) == {"mostly no residues": 1}
    assert [note["note"] for note in done.notes("a_ESM")] == ["mostly no residues"]
    message = failure_of(
        tmp_path / "2", f">q scores\n{text}\n>b\nMKV\n", residues=ResidueConfig(unknown=Unknown.fail)
    )
    assert message.startswith("record 1 (q) is mostly no residues")


def test_gaps_masked_residues_and_unusual_letters_are_residues_enough(tmp_path):
    done = embed_beside_good(tmp_path, ">a\n-----M-K.......-*\n>b\nXXXXXXXXXX\n>c\nJJJ\n>d\nM??\n>e\nMK??\n")
    check_output(done.load("a_ESM"), [("a", "MK"), ("b", "X" * 10), ("c", "XXX"), ("e", "MKXX")])
    assert done.report.records["replaced_letters"] == {"J": 3, "?": 2}


def test_a_notebook_follows_the_same_policy(checkpoint_8m):
    embedder = Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu")
    same = ["MKTAYIAKQR", "M K T A Y\tIAKQR", "1 mktay\n  6 iakqr", " MKTAY IAKQR* "]
    vectors = embedder.embed(same)
    assert all(np.array_equal(vector, vectors[0]) for vector in vectors)
    for letters, reason in (
        ("KA<mask>ISQ", "special token <mask>"),
        ("MKV:LAG", "chain separators"),
        ("40 40 38", "mostly no residues"),
        (" \n", "empty sequence"),
    ):
        with pytest.raises(ValueError, match=f"sequence 1 is left out: {reason}"):
            embedder.embed(["MKV", letters])


def test_verify_reads_the_inputs_under_the_same_policy(tmp_path):
    write(tmp_path / "in" / "a.fa", CHAINS + ">m\nK<mask>V\n>n\n1 MK 3 LA\n>q\n40 40\n")
    write(tmp_path / "in" / "b.fa", (CASES / "toy_pir.fa").read_bytes() + (CASES / "latin1.fa").read_bytes())
    result = cli(f"input={tmp_path / 'in'}", "chains=split", "special_tokens=mask", tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    checked = cli("job=verify", f"input={tmp_path / 'in'}", tmp_path=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.startswith("ok: 2 files, 18 proteins checked, 0 findings")
    other = cli(f"input={tmp_path / 'in'}", "special_tokens=mask", tmp_path=tmp_path)
    assert "made under other settings (chains='split' before, 'skip' now)" in other.stderr


# PIR.


def test_pir_is_read_as_pir(tmp_path):
    done = embed_beside_good(tmp_path, (CASES / "toy_pir.fa").read_bytes())
    check_output(done.load("a_ESM"), [("TOY1", "MKTAYIAKQRQISFVKSHFSRQ"), ("TOY2", "GAVLIPFMW")])
    assert done.load("a_ESM")["headers"] == ["TOY1 Toy alpha chain - Imaginary virus", "TOY2 Toy beta chain"]


PIR = """>F1;FRAG

MKTAY*
>P1;1abc
structureX:1abc:1 :A:21 :A:toxin > here:somewhere: 1.9:0.20
GAV--LIP
FMW*
C;Species: something
R;Someone, A.
>XX;MANY
 chains
MK/LA*
>P1;plain like FASTA
MKVLA
GGG
>P1;stop
MKVLAG*
>N1;lower
; a remark that is the description
mkt 10
ayi*

>P1;LAST
ONEWORD
MKV
*
"""


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_pir_in_all_its_forms_cut_or_not(tmp_path, monkeypatch, share):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 30)
    done = embed_beside_good(tmp_path, PIR, unit_share=share)
    right = [("FRAG", "MKTAY"), ("1abc", "GAVLIPFMW"), ("P1;plain", "MKVLAGGG"), ("P1;stop", "MKVLAG")]
    check_output(done.load("a_ESM"), [*right, ("lower", "MKTAYI"), ("LAST", "MKV")])
    assert skipped(done) == {"chain separators": 1}
    assert done.report.records["in"] == 8


def test_letters_behind_the_end_of_a_pir_sequence_are_not_dropped_in_silence(tmp_path):
    done = embed_beside_good(
        tmp_path, ">P1;A\nsome protein\nMKV*\nLAG\n>P1;B\nother protein\nMKV*LAG\n>c\nMK\n"
    )
    check_output(done.load("a_ESM"), [("c", "MK")])
    assert skipped(done) == {"text behind the end of a PIR sequence": 2}


# DNA.


def test_dna_is_warned_of_once_for_a_file_and_embedded(tmp_path, caplog):
    contigs = (CASES / "contigs.fa").read_bytes()
    write(tmp_path / "in" / "contigs.fa", contigs)
    write(
        tmp_path / "in" / "rna.fa",
        ">r\n" + "ACGUUGCANN" * 9 + "\n>p\n" + random_sequence(60) + "\n>q\nACGTACGTAC\n",
    )
    write(tmp_path / "in" / "good.fa", ">p\n" + random_sequence(60) + "\n>q\nACGTACGTAC\n>short\nGATTACA\n")
    done = embed_directory(tmp_path / "in", tmp_path / "out")
    assert done.report.status == "complete"
    remarks = {Path(file.path).name: file.remarks for file in done.report.files}
    assert remarks == {
        "contigs.fa": ["looks like DNA: 2 of 2 records"],
        "good.fa": [],
        "rna.fa": ["looks like DNA: 2 of 3 records"],
    }
    # The helper makes the plan, and the run makes it again: each warns once for a file.
    warned = [text for record in caplog.records if "looks like DNA" in (text := record.getMessage())]
    assert [Path(line.split(" looks like DNA")[0]).name for line in warned] == ["contigs.fa", "rna.fa"] * 2
    assert set(done.plan.remarks) == {0, 2}


def test_a_file_that_cannot_be_read_gives_no_warning(tmp_path):
    assert (
        look_at_first_records(whole_file(write(tmp_path / "a.fa", ">a\nACGTACGTACGT\n")), Config())
        is not None
    )
    assert look_at_first_records(whole_file(write(tmp_path / "b.fa", "ACGTACGTACGT\n")), Config()) is None
    assert look_at_first_records(whole_file(write(tmp_path / "c.fa", "")), Config()) is None


@pytest.mark.parametrize(
    ("letters", "is_dna"),
    [
        ("ACGTACGT", True),
        ("ACGTACG", False),
        ("ACGU" * 30 + "RYKM", True),
        ("ACGT" * 5 + "MKL", False),
        ("MKTAYIAKQR", False),
    ],
)
def test_what_looks_like_dna(letters, is_dna):
    assert is_nucleotide(letters.encode()) is is_dna


# Headers and limits.


def test_a_latin1_header_is_read_as_latin1_and_listed(tmp_path):
    content = (CASES / "latin1.fa").read_bytes()
    done = embed_beside_good(tmp_path / "auto", content)
    check_output(done.load("a_ESM"), TWO)
    assert done.load("a_ESM")["headers"] == [content.split(b"\n")[0][1:].decode("latin-1"), "p2"]
    assert done.report.records["latin1_headers"] == 1
    assert [(note["record"], note["note"]) for note in done.notes("a_ESM")] == [
        ("1", "header read as Latin-1")
    ]
    assert done.report.files[0].remarks == ["headers read as Latin-1, not UTF-8: 1"]
    message = failure_of(tmp_path / "utf8", content, header_encoding=HeaderEncoding.utf8)
    assert re.match(r"line 1, byte 7 \(0xef\) is not UTF-8 text", message)
    assert "line 2, byte 3 (0xef)" in failure_of(
        tmp_path / "letters", ">a\nMK\udcefV\n".encode("utf-8", "surrogateescape")
    )


@pytest.mark.parametrize("long", list(Long))
@pytest.mark.parametrize("limit", [50, None])
def test_a_record_of_any_length_is_truncated_or_refused_as_no_protein(tmp_path, long, limit):
    genome = ("ACGT" * 250 + "\n") * 1001
    done = embed_beside_good(
        tmp_path, f">genome\n{genome}>b\nMKV\n", long=long, truncation_seq_length=limit, window_overlap=5
    )
    if limit is None or long in (Long.fail, Long.window):
        assert "reaches line 1002 has more than 1000000 letters" in done.failure("a.fasta")
    elif long is Long.skip:
        check_output(done.load("a_ESM"), [("b", "MKV")])
        assert skipped(done) == {"too long": 1}
    else:
        check_output(done.load("a_ESM"), [("genome", ("ACGT" * 13)[:50]), ("b", "MKV")])
        assert [(note["id"], note["residues"], note["embedded"]) for note in done.notes("a_ESM")] == [
            ("genome", "1001000", "50")
        ]


def test_a_record_whose_residues_begin_behind_the_limit_is_not_cut_short(tmp_path):
    text = ">a\nMKV\n" + ("-" * 1000 + "\n") * 1001 + "LAG\n"
    assert "more letters than are looked at" in failure_of(tmp_path, text)


# Compression and other formats.


def archive(make) -> bytes:
    content = io.BytesIO()
    make(content)
    return content.getvalue()


def tar(content: io.BytesIO) -> None:
    with tarfile.open(fileobj=content, mode="w") as file:
        info = tarfile.TarInfo("a.fa")
        info.size = len(TWO_TEXT)
        file.addfile(info, io.BytesIO(TWO_TEXT))


def zipped(content: io.BytesIO) -> None:
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a.fa", TWO_TEXT)


@pytest.mark.parametrize("name", ["e.faa.bz2", "b.fa.gz", "x.fa"])
def test_bz2_and_xz_are_read_through_whatever_the_name(tmp_path, name):
    done = embed_beside_good(tmp_path, (CASES / name).read_bytes(), name)
    content = done.load(f"{name.split('.')[0]}_ESM")
    if name == "x.fa":
        right = [
            tuple(record.split("\n", 1))
            for record in lzma.decompress((CASES / name).read_bytes()).decode().split(">")[1:]
        ]
        check_output(content, [(header.split()[0], letters.replace("\n", "")) for header, letters in right])
        assert len(right) == 6000
    else:
        check_output(content, TWO)


def test_zstd_is_read_through_or_named_with_a_remedy(tmp_path):
    header = b"\x28\xb5\x2f\xfd\x20" + bytes([len(TWO_TEXT)])  # a frame of one block that is not compressed
    content = header + (8 * len(TWO_TEXT) + 1).to_bytes(3, "little") + TWO_TEXT
    if is_readable("zstd"):
        for name, data in (
            ("a.fa", content),
            ("b.fa.zst", content + content),
            ("c.fa", b"\x50\x2a\x4d\x18\x03\0\0\0abc" + content),
        ):
            done = embed_beside_good(tmp_path / name, data, name)
            check_output(done.load(f"{name[0]}_ESM"), TWO * (2 if name == "b.fa.zst" else 1))
        assert "truncated zstd" in failure_of(tmp_path / "cut", content[:-3], "a.fa")
        assert "truncated zstd" in failure_of(tmp_path / "kept", (CASES / "z.fa").read_bytes(), "a.fa")
    else:
        remedy = "install backports.zstd, or unpack it (unzstd)"
        message = failure_of(tmp_path, content, "a.fa")
        assert message == f"this is compressed by zstd, which this Python cannot read: {remedy}"


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_compressed_members_follow_each_other_and_damage_is_found(tmp_path, compress):
    name = "bz2" if compress is bz2.compress else "xz"
    text = "".join(f">r{i}\n{random_sequence(50, i)}\n" for i in range(400)).encode()
    right = [(f"r{i}", random_sequence(50, i)) for i in range(400)]
    packed = compress(text[:9000]) + compress(text[9000:])
    check_output(embed_beside_good(tmp_path / "1", packed).load("a_ESM"), right)
    assert f"truncated {name}: the file ends at byte {len(packed) - 5}" in failure_of(
        tmp_path / "2", packed[:-5]
    )
    damaged = packed[:300] + bytes([packed[300] ^ 255]) + packed[301:]
    assert f"damaged {name} at or before byte" in failure_of(tmp_path / "3", damaged)
    assert f"damaged {name}" in failure_of(tmp_path / "4", packed + b"rubbish behind it")
    assert f"empty {name} file: it decompresses to nothing" in failure_of(tmp_path / "5", compress(b""))
    assert f"truncated {name}" in failure_of(tmp_path / "6", packed[:7])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(archive(tar)), "this is a tar archive: unpack it (tar xf)"),
        (archive(tar), "this is a tar archive: unpack it (tar xf)"),
        (bz2.compress(archive(tar)), "this is a tar archive"),
        ((CASES / "tar.fa.gz").read_bytes(), "this is a tar archive"),
        ((CASES / "twice.fa.gz").read_bytes(), "this is compressed twice: unpack it (gunzip)"),
        (
            gzip.compress(bz2.compress(TWO_TEXT)),
            "this is compressed by bz2, and again by gzip: unpack it (gunzip)",
        ),
        (archive(zipped), "this is a zip archive: unpack it (unzip)"),
        (gzip.compress(archive(zipped)), "this is a zip archive"),
        ((CASES / "utf16.fa").read_bytes(), "this is text in UTF-16: convert it (iconv -f utf-16 -t utf-8)"),
        (
            TWO_TEXT.decode().encode("utf-16-be"),
            "this is text in UTF-16: convert it (iconv -f utf-16be -t utf-8)",
        ),
        (
            TWO_TEXT.decode().encode("utf-16-le"),
            "this is text in UTF-16: convert it (iconv -f utf-16le -t utf-8)",
        ),
        (gzip.compress(TWO_TEXT.decode().encode("utf-16")), "this is text in UTF-16"),
        (TWO_TEXT.decode().encode("utf-32"), "this is text in UTF-32"),
        (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(60), "this is a 7z archive"),
        (b"Rar!\x1a\x07\x01\0" + bytes(60), "this is a rar archive"),
        (b"\x1f\x9d\x90" + bytes(60), "this is compressed by compress"),
        (b"\x04\x22\x4d\x18" + bytes(60), "this is compressed by lz4"),
        (lzma.compress(TWO_TEXT, lzma.FORMAT_ALONE), "this is compressed by lzma"),
        (gzip.compress(b"BAM\x01" + bytes(60)), "this is a BAM file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "this is an HDF5 file"),
        (b"SQLite format 3\0" + bytes(60), "this is an SQLite database"),
        (b"LOCUS       AB000001  120 bp\n", "line 1 has text before the first '>'.*this is a GenBank file"),
        (b"ID   TOY_VIRUS   Reviewed;  10 AA.\n", "this is an EMBL or UniProt flat file"),
        (b"CLUSTAL W (1.83)\n\na MKV\n", "this is an alignment in Clustal format"),
        (b"# STOCKHOLM 1.0\n", "this is an alignment in Stockholm format"),
        (b'{"sequences": []}\n', "this looks like JSON"),
        (b"<html><body>404</body></html>\n", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
    ],
    # A name made of the bytes would hold gzip's time stamp, and pytest's workers must agree on names.
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
@pytest.mark.parametrize("share", [1.0, 0.01])
def test_what_is_no_fasta_is_named_by_its_first_bytes(tmp_path, monkeypatch, content, words, share):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 30)
    message = failure_of(tmp_path, content, "a.fa", unit_share=share)
    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), message), message


def test_block_gzip_cut_at_a_block_border_fails_as_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    text = "".join(f">r{i}\n{random_sequence(50, i)}\n" for i in range(60)).encode()
    whole = block_gzip(text, 300)
    borders = [match.start() for match in re.finditer(re.escape(b"\x1f\x8b\x08\x04"), whole)]
    for border in (borders[1], borders[7], borders[-1]):
        for share in (1.0, 0.1):
            message = failure_of(tmp_path / f"{border} {share}", whole[:border], "a.fa.gz", unit_share=share)
            assert message.startswith(
                "truncated gzip: this is block-gzip (BGZF), and its end block is missing"
            )
    joined = whole + gzip.compress(b">last\nMKV\n")
    for name, content, more in (
        ("joined", joined, [("last", "MKV")]),
        ("twice", whole + whole, [(f"r{i}", random_sequence(50, i)) for i in range(60)]),
        ("padded", whole + bytes(100), []),
    ):
        done = embed_beside_good(tmp_path / name, content, "a.fa.gz")
        check_output(done.load("a_ESM"), [*((f"r{i}", random_sequence(50, i)) for i in range(60)), *more])


# What a search finds.


def names_and_reasons(*items: Path) -> tuple[list[str], dict[str, str]]:
    inputs = search_inputs([str(item) for item in items])
    return [file.path.name for file in inputs.files], {
        item.path.name: item.reason for item in inputs.passed_over
    }


def test_what_a_search_passes_over_is_listed_with_the_reason(tmp_path):
    for name in (
        "a.faa",
        "b.pep",
        "c.aa",
        "d.mpfa",
        "e.faa.bz2",
        "f.fa.lz4",
        "g.txt.gz",
        ".h.fa",
        "i.fa~",
        "README",
        "~j.fa",
        "k.tar.gz",
        ".git/l.fa",
        "m.fa.tmp",
    ):
        write(tmp_path / name, TWO_TEXT)
    os.mkfifo(tmp_path / "n.fa")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "o.fa"))
        files, passed_over = names_and_reasons(tmp_path)
        assert names_and_reasons(tmp_path / "[ano].f*")[1] == {"n.fa": "pipe", "o.fa": "socket"}
    (tmp_path / "p.pep").symlink_to("nowhere")
    assert files == ["a.faa", "e.faa.bz2"]
    reasons = {
        "b.pep": ".pep",
        "c.aa": ".aa",
        "d.mpfa": ".mpfa",
        "f.fa.lz4": ".lz4",
        "g.txt.gz": ".txt.gz",
        ".h.fa": "hidden or temporary",
    }
    reasons |= {
        "i.fa~": ".fa~",
        "README": "no suffix",
        "~j.fa": "hidden or temporary",
        "k.tar.gz": ".tar.gz",
        ".git": "hidden or temporary",
    }
    assert passed_over == {**reasons, "m.fa.tmp": ".tmp", "n.fa": "pipe", "o.fa": "socket"}
    assert names_and_reasons(tmp_path)[1]["p.pep"] == "link that leads nowhere"


def test_a_file_named_outright_is_taken_whatever_its_suffix(tmp_path):
    names = ["b.pep", "c.AA", "GCF_0001.1", "noname", "d.fa.lz4", ".hidden", "e.txt.gz", "f.mpfa"]
    for name in names:
        write(tmp_path / name, TWO_TEXT)
    inputs = search_inputs([str(tmp_path / name) for name in names])
    outputs = {file.path.name: str(file.output) for file in inputs.files}
    assert outputs == {
        "b.pep": "b_ESM",
        "c.AA": "c_ESM",
        "GCF_0001.1": "GCF_0001.1_ESM",
        "noname": "noname_ESM",
        "d.fa.lz4": "d.fa.lz4_ESM",
        ".hidden": ".hidden_ESM",
        "e.txt.gz": "e_ESM",
        "f.mpfa": "f_ESM",
    }
    assert not inputs.passed_over
    assert names_and_reasons(tmp_path / "*.pep") == (["b.pep"], {})
    write(tmp_path / "a.fa", TWO_TEXT)
    files, passed_over = names_and_reasons(tmp_path, tmp_path / "b.pep")
    assert files == ["a.fa", "b.pep"]
    assert sorted(passed_over) == sorted({*names} - {"b.pep"})


def test_outputs_of_an_earlier_run_are_not_inputs_that_were_passed_over(tmp_path):
    write(tmp_path / "a.fa", TWO_TEXT)
    for name in (
        "out/report.json",
        "out/a_ESM.pt",
        "out/a_ESM.records.tsv",
        "out/notes.txt",
        "out/b_ESM/x.pt",
        "out/.dist_esm/lock",
    ):
        write(tmp_path / name, "x")
    for output_dir in (tmp_path / "out", Path(os.path.relpath(tmp_path / "out"))):
        inputs = search_inputs([str(tmp_path)], output_dir=output_dir)
        assert [item.path.name for item in inputs.passed_over] == ["notes.txt"]


def cli(
    *arguments: object, tmp_path: Path, stdin: int | str = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    fixed = [MODEL, "model.weights=random", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    return run_ranks(None, *fixed, *arguments, stdin=stdin)


def test_the_command_says_what_it_passed_over_and_fails_links_that_lead_nowhere(tmp_path):
    write(tmp_path / "in" / "a.fa", TWO_TEXT)
    write(tmp_path / "in" / "b.pep", TWO_TEXT)
    (tmp_path / "in" / "c.fa").symlink_to("/nowhere/c.fa")
    result = cli(f"input={tmp_path / 'in'}", tmp_path=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("passed over 1 file (1 .pep): name a file outright to embed it") == 1
    report = read_report(tmp_path / "out")
    assert report["passed_over"] == {
        "files": 1,
        "by_reason": {".pep": 1},
        "listed": [{"path": str(tmp_path / "in" / "b.pep"), "reason": ".pep"}],
    }
    assert [failure["error_message"] for failure in report["failed"]] == [
        "it is a link to /nowhere/c.fa, which is not there"
    ]


# Pipes.


@pytest.mark.parametrize("how", ["stdin", "redirected", "fifo", "gzip"])
def test_pipes_are_read_once_and_embedded_as_the_file_would_be(tmp_path, how):
    write(tmp_path / "a.fa", TWO_TEXT)
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(TWO_TEXT))
    fifo = tmp_path / "p.fa"
    os.mkfifo(fifo)

    def run() -> subprocess.CompletedProcess[str]:
        if how == "stdin":
            return cli("input=-", tmp_path=tmp_path, stdin=TWO_TEXT.decode())
        if how == "fifo":
            with subprocess.Popen(["sh", "-c", f"cat {tmp_path / 'a.fa'} > {fifo}"]):
                return cli(f"input={fifo}", tmp_path=tmp_path)
        source, name = {"redirected": (tmp_path / "a.fa", "/dev/stdin"), "gzip": (packed, "-")}[how]
        with source.open() as file:
            return cli(f"input={name}", tmp_path=tmp_path, stdin=file.fileno())

    assert_embedded_once(run, "p" if how == "fifo" else "stdin", tmp_path)


def test_what_a_shell_substitutes_is_embedded_as_the_file_would_be(tmp_path):
    write(tmp_path / "a.fa", TWO_TEXT)
    words = [MODEL, "model.weights=random", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    line = " ".join([*command(None, *words), f"input=<(cat {tmp_path / 'a.fa'})"])
    bash = shutil.which("bash")
    assert bash is not None

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bash, "-c", line], capture_output=True, text=True, timeout=120, env=environment(), check=False
        )

    assert_embedded_once(run, r"fd\d+", tmp_path)


def assert_embedded_once(
    run: Callable[[], subprocess.CompletedProcess[str]], name: str, tmp_path: Path
) -> None:
    """The two proteins are in one output, and another launch has nothing to do."""
    result = run()
    assert result.returncode == 0, result.stderr
    (output,) = (tmp_path / "out").glob("*.pt")
    assert re.fullmatch(name + r"_ESM\.pt", output.name)
    content = torch.load(output, weights_only=True)
    assert (content["proteins"], content["lengths"]) == (["p1", "p2"], [10, 9])
    assert not list((tmp_path / "out" / ".dist_esm").glob("pipes/*"))
    again = run()
    assert again.returncode == 0, again.stderr
    assert "(1 by earlier launches)" in again.stdout


@pytest.mark.distributed
def test_ranks_share_what_one_of_them_read_from_standard_input(tmp_path):
    text = "".join(f">r{i}\n{random_sequence(30, i)}\n" for i in range(50))
    line = command(
        2, MODEL, "model.weights=random", "device=cpu", f"output_dir={tmp_path / 'out'}", "input=-"
    )
    result = subprocess.run(
        line, input=text, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "out" / "stdin_ESM.pt", weights_only=True)
    assert content["proteins"] == [f"r{i}" for i in range(50)]
    assert read_report(tmp_path / "out")["files"][0]["units"] == 1


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/urandom"])
def test_devices_are_refused(tmp_path, device):
    result = cli(f"input={device}", tmp_path=tmp_path)
    assert result.returncode == 1
    assert f"input={device} is a device, which cannot be read twice" in result.stderr
    with open(device, "rb") as file:
        result = cli("input=-", tmp_path=tmp_path, stdin=file.fileno())
    assert "standard input is a device" in result.stderr


def test_a_pipe_that_gives_nothing_or_was_read_already_is_refused(tmp_path):
    result = cli("input=-", tmp_path=tmp_path, stdin="")
    assert "input=- is empty: did the command that should fill the pipe fail?" in result.stderr
    assert result.returncode == 1
    words = [MODEL, "model.weights=random", f"output_dir={tmp_path / 'out'}", "input=-"]
    result = run_ranks(None, *words, stdin=">a\nMK\n", TORCHELASTIC_RESTART_COUNT="1")
    assert "input=- was read before torchrun restarted the ranks" in result.stderr


def test_a_pipe_named_twice_is_refused(tmp_path):
    result = cli("input=[-,/dev/stdin]", tmp_path=tmp_path, stdin=">a\nMK\n")
    assert "is a pipe and is named twice" in result.stderr
