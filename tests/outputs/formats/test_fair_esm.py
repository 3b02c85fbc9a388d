"""format=fair_esm: a file for each protein, as fair-esm's extract script leaves it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from esm import pretrained
from esm.data import FastaBatchedDataset

from dist_esm import load
from dist_esm.config import Format
from dist_esm.outputs.formats.fair_esm import MAX_NAME, file_name
from helpers.command import run_ranks
from helpers.compare import assert_same, relative_error
from helpers.outputs import (
    EVERYTHING,
    HEADERS,
    IDS,
    SEQUENCES,
    embed_text,
    everything_below,
    expected_bos,
    expected_mean,
    expected_rows,
)
from helpers.standin import embed_directory

REPORTS = ("report.html", "report.json")


def test_fair_esm_leaves_a_file_for_each_protein_as_esm_extract_does(tmp_path):
    folder = embed_text(tmp_path, Format.fair_esm, **EVERYTHING)
    assert folder == tmp_path / "out" / "a_ESM"
    head, *lines, last = (folder / "ids.tsv").read_bytes().decode().split("\n")
    assert (head.split("\t"), last) == (["file", "id", "index", "length", "header"], "")
    table = [line.split("\t", 4) for line in lines]
    assert [line[1] for line in table] == IDS
    assert {path.name for path in folder.iterdir()} == {line[0] for line in table} | {
        "ids.tsv",
        "provenance.json",
    }
    for (name, protein, _, length, header), residues in zip(table, SEQUENCES, strict=True):
        content = torch.load(folder / name, weights_only=True)
        assert (content["label"], content["id"], int(length)) == (header or protein, protein, len(residues))
        for layer in (0, 1):
            assert_same(content["mean_representations"][layer], expected_mean(residues, layer))
            assert_same(content["bos_representations"][layer], expected_bos(residues, layer))
            assert_same(content["representations"][layer], expected_rows(residues, layer))
            for tensor in (content["mean_representations"][layer], content["representations"][layer]):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        assert (folder / name).stat().st_size < 20_000


def test_no_id_leaves_the_folder_and_every_name_is_safe_anywhere_and_can_be_read_back(tmp_path):
    folder = embed_text(tmp_path, Format.fair_esm)
    assert {
        name
        for name in everything_below(tmp_path / "out")
        if not name.startswith((".dist_esm", "a_ESM", *REPORTS))
    } == set()
    assert {name for name in everything_below(tmp_path) if not name.startswith(("in", "out"))} == set()
    names = [
        line.split("\t")[0] for line in (folder / "ids.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    ]
    assert len({name.casefold() for name in names}) == len(names)
    labels = [header or protein for header, protein in zip(HEADERS, IDS, strict=True)]
    for name, label in zip(names, labels, strict=True):
        assert len(name.encode()) <= 255
        assert not re.search(r'[/\\:*?"<>\x00-\x1f]|^\.|^(con|nul)\.', name, re.IGNORECASE)
        if len(label) < 100:
            assert unquote(re.sub("~[0-9]+$", "", name.removesuffix(".pt"))) == label
    plain = [
        "twin first",
        "twin second",
        "TWIN differs in case",
        "twin~2 looks like our mark",
        "αβγ_蛋白 🧬",
        "unnamed",
        "unnamed_20",
        "ids.tsv",
        "soft",
    ]
    assert [label for name, label in zip(names, labels, strict=True) if name == f"{label}.pt"] == [
        *plain,
        "50% of a~~~b in hélices 3.",
    ]
    others = [
        "a%2Fb.pt",
        "%2E.%2F..%2Fevil climbs.pt",
        "%63on.pt",
        "%6Eul.x.pt",
        "100%252F.pt",
        "Twin First~2.pt",
        "twin first~3.pt",
    ]
    assert set(others) <= set(names)
    assert (file_name(""), file_name("~".join("x2")), file_name("x~2x"), file_name("%zz%")) == (
        "%",
        "x%7E2",
        "x~2x",
        "%zz%",
    )
    assert file_name("Q9/" * 100).startswith("Q9%2FQ9%2F")
    assert not re.search("%.?~", " ".join(file_name("é" * n + "/" * 300) for n in range(12)))
    for label in ("y" * MAX_NAME, "y" * (MAX_NAME + 1), "蛋" * 300, "/" * 300):
        assert len(f"{file_name(label)}~9999999.pt".encode()) <= 255
    assert file_name("y" * MAX_NAME) == "y" * MAX_NAME
    assert len({file_name("蛋" * n) for n in range(80, 90)}) == 10


def extract(checkpoint: Path, fasta: Path, output_dir: Path, layers: list[int], truncation: int) -> None:
    """Put fair-esm's own classes together as its extract script does, which its package lacks."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, weights_only=True)
    model, alphabet = pretrained.load_model_and_alphabet_core(checkpoint.stem, content)
    model.eval()
    data = FastaBatchedDataset.from_file(fasta)
    convert = alphabet.get_batch_converter(truncation)
    for batch in data.get_batch_indices(400, extra_toks_per_seq=1):
        labels, letters, tokens = convert([data[i] for i in batch])
        with torch.inference_mode():
            found = model(tokens, repr_layers=layers)["representations"]
        for i, label in enumerate(labels):
            rows = {layer: found[layer][i, 1 : min(truncation, len(letters[i])) + 1] for layer in layers}
            kinds = {
                "representations": rows,
                "mean_representations": {layer: row.mean(0) for layer, row in rows.items()},
            }
            kinds["bos_representations"] = {layer: found[layer][i, 0] for layer in layers}
            torch.save(
                {
                    "label": label,
                    **{kind: {layer: row.clone() for layer, row in by.items()} for kind, by in kinds.items()},
                },
                output_dir / f"{label}.pt",
            )


@pytest.mark.filterwarnings("ignore:Regression weights not found")
def test_fair_esm_takes_the_place_of_what_esm_extract_leaves(tmp_path, checkpoint_8m):
    """A script that reads esm-extract's folder by label finds the same in this one.

    Files, keys, labels, shapes, dtypes and numbers are alike.
    """
    headers = [
        "sp|P12345|X_Y Putative protein OS=Frog virus 3 (isolate Goorha) GN='a' PE=4 SV=1 ",
        "0|beta-lactamase_P20P|1.581033423",
        " id [Homo sapiens].",
    ]
    sequences = ["MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKLMNPQRSTVWYXBZUO" * 3, "MKW"]
    (tmp_path / "a.fasta").write_text(
        "".join(f">{header}\n{residues}\n" for header, residues in zip(headers, sequences, strict=True))
    )
    (tmp_path / "theirs").mkdir()
    extract(checkpoint_8m, tmp_path / "a.fasta", tmp_path / "theirs", [0, 6], 60)
    settings = [
        "format=fair_esm",
        "include=[mean,bos,per_tok]",
        "repr_layers=[0,6]",
        "truncation_seq_length=60",
        f"model.weights={checkpoint_8m}",
    ]
    result = run_ranks(
        None,
        f"input={tmp_path / 'a.fasta'}",
        f"output_dir={tmp_path / 'out'}",
        "model=esm2_t6_8M_UR50D",
        *settings,
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "a_ESM"
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {f"{header.strip()}.pt" for header in headers}
    assert {path.name for path in folder.iterdir()} - {"ids.tsv", "provenance.json"} == names
    for name in names:
        mine, theirs = (
            torch.load(where / name, weights_only=True) for where in (folder, tmp_path / "theirs")
        )
        assert list(mine) == ["label", "id", *list(theirs)[1:]]
        assert mine["label"] == theirs["label"]
        for kind in list(theirs)[1:]:
            assert list(mine[kind]) == list(theirs[kind])
            for layer, tensor in theirs[kind].items():
                assert (mine[kind][layer].dtype, mine[kind][layer].shape) == (tensor.dtype, tensor.shape)
                assert relative_error(mine[kind][layer], tensor) <= 1e-5
    assert load(folder).ids == ["sp|P12345|X_Y", "0|beta-lactamase_P20P|1.581033423", "id"]


def test_a_folder_is_replaced_whole_and_only_if_it_is_ours(tmp_path):
    folder = embed_text(tmp_path, Format.fair_esm)
    (tmp_path / "in" / "a.fasta").write_text(">only\nMKT\n")
    assert not embed_directory(tmp_path / "in", tmp_path / "out", format=Format.fair_esm).report.failed
    assert everything_below(folder) == {"only.pt", "ids.tsv", "provenance.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_ESM", ".dist_esm", *REPORTS}
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("one")
    run = embed_directory(tmp_path / "in", tmp_path / "out", format=Format.fair_esm)
    assert "is no folder of embeddings alone" in run.failure("a.fasta")
    assert (folder / "thesis" / "chapter.txt").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_ESM",
        ".dist_esm",
        *REPORTS,
        "failed_files.txt",
    }
