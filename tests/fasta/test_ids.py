"""Ids by accession: which, in every format, counted, compared and verified."""

from __future__ import annotations

import pytest

from dist_esm import load
from dist_esm.config import Chains, Format, ProteinId
from dist_esm.distributed import RefusedError
from dist_esm.fasta.ids import accession_of
from helpers.command import MODEL, read_report, run_ranks
from helpers.standin import embed_directory

ACCESSIONS = {
    "sp|P12345|AATM_RABIT": "P12345",
    "tr|A0A024RBG1|A0A024RBG1_HUMAN": "A0A024RBG1",
    "sp|P12345-2|AATM_RABIT": "P12345-2",
    "sp|P12345.3|AATM_RABIT": "P12345",
    "SP|P12345|AATM_RABIT": "P12345",
    "sp|P12345": "P12345",
    "gi|4|ref|NP_000001.1|": "NP_000001.1",
    "gi|129295|sp|P01013.1|OVAX_CHICK": "P01013",
    "gi|129295": "gi|129295",
    "ref|WP_000000001.1|": "WP_000000001.1",
    "gb|AAA12345.1|": "AAA12345.1",
    "emb|CAA12345.1|": "CAA12345.1",
    "dbj|BAA12345.1|": "BAA12345.1",
    "pdb|1ABC|A": "1ABC_A",
    "pdb|1ABC": "1ABC",
    "pdb|1ABC|": "1ABC",
    "pir||S12345": "S12345",
    "prf||0806162C": "0806162C",
    "gnl|mydb|protein7": "protein7",
    "lcl|contig1_1": "contig1_1",
    "nxp|NX_P12345-1|X": "NX_P12345-1",
    "sp||AATM_RABIT": "sp||AATM_RABIT",
    "sp|": "sp|",
    "|": "|",
    "jgi|Aspnid1|1234|gene": "jgi|Aspnid1|1234|gene",
    "UniRef50_P12345": "UniRef50_P12345",
    "P12345": "P12345",
    "a|b": "a|b",
}
FASTA = (
    ">sp|P12345|AATM_RABIT one\nMKV\n>tr|Q9XXX1|Q9XXX1_HUMAN\nMKVV\n>plain two\nMKVVV\n"
    ">sp|P12345|OTHER\nMK?V\n>\nMMM\n>pdb|1ABC|A\nMKV:MKVV\n"
)


@pytest.mark.parametrize("word", ACCESSIONS)
def test_the_accession_of_a_word(word):
    assert accession_of(word) == ACCESSIONS[word]


@pytest.mark.parametrize("kind", list(Format))
def test_ids_by_accession_in_every_format(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    (tmp_path / "a.fa").write_text(FASTA)
    for share in (1.0, 0.3):
        out = tmp_path / f"out{share}"
        settings = {"format": kind, "id": ProteinId.accession, "chains": Chains.split, "unit_share": share}
        done = embed_directory(tmp_path / "a.fa", out, **settings)
        run = load(out)
        assert run.ids == ["P12345", "Q9XXX1", "plain", "P12345", "unnamed_5", "1ABC_A_1", "1ABC_A_2"]
        assert run.headers[0] == "sp|P12345|AATM_RABIT one"
        assert run.positions("P12345") == [0, 3]
        assert done.report.records["duplicate_ids"] == 1
        (notes,) = out.glob("*.records.tsv")
        assert "\n4\tP12345\tok\t" in notes.read_text()


def test_a_directory_does_not_mix_ids(tmp_path):
    (tmp_path / "a.fa").write_text(">sp|P12345|X\nMKV\n")
    (tmp_path / "b.fa").write_text(">sp|P12345|X\nMKV\n")
    embed_directory(tmp_path / "a.fa", tmp_path / "out")
    with pytest.raises(RefusedError, match="id='word' before, 'accession' now"):
        embed_directory(tmp_path / "b.fa", tmp_path / "out", id=ProteinId.accession)
    embed_directory(tmp_path / "b.fa", tmp_path / "out", id=ProteinId.accession, resume=False)
    with pytest.raises(RefusedError, match="id='accession' before, 'word' now"):
        embed_directory(tmp_path / "a.fa", tmp_path / "out")


def test_the_command_takes_the_key_and_verifies_by_it(tmp_path):
    (tmp_path / "a.fa").write_text(FASTA)
    options = (f"input={tmp_path}/a.fa", f"output_dir={tmp_path}/out", MODEL, "device=cpu")
    done = run_ranks(None, *options, "model.weights=random", "id=accession")
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out")["config"]["id"] == "accession"
    assert load(tmp_path / "out").ids[0] == "P12345"
    checked = run_ranks(None, *options, "job=verify")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = run_ranks(None, *options, "id=acession")
    assert "id=acession is no choice: did you mean accession?" in wrong.stderr
