"""`dist_esm.load`: the same for every format, and what is no output."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import duckdb
import h5py
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from dist_esm import load
from dist_esm.attempt import as_value
from dist_esm.config import Format, Include, SaveDtype
from dist_esm.outputs.formats.registry import FORMATS
from helpers.compare import assert_same
from helpers.outputs import (
    EVERYTHING,
    HEADERS,
    IDS,
    PROVENANCE,
    SEQUENCES,
    embed_text,
    expected_bos,
    expected_mean,
    expected_rows,
    table_of,
    write_journal,
    write_table,
)
from helpers.standin import ALL_KINDS, WIDTH, embed_directory


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, {"include": [Include.per_tok]}, {"include": [Include.bos]}, {}],
    ids=["all", "per_tok", "bos", "mean"],
)
def test_load_gives_back_what_went_in(tmp_path, kind, settings):
    back = load(embed_text(tmp_path, kind, **settings))
    assert (len(back), back.ids, back.lengths) == (len(IDS), IDS, [len(residues) for residues in SEQUENCES])
    assert back.headers == HEADERS
    assert set(back.sources) == {"a.fasta"}
    assert_same(back.vectors, np.stack([expected_mean(residues) for residues in SEQUENCES]))
    for i, residues in enumerate(SEQUENCES):
        assert_same(back[i], expected_mean(residues))
        assert_same(back[IDS[i]], expected_mean(SEQUENCES[IDS.index(IDS[i])]))
    assert_same(back[-1], expected_mean(SEQUENCES[-1]))
    assert (back.positions("twin"), back.positions("a/b")) == ([4, 5, 24], [1])
    assert "a/b" in back
    assert "nobody" not in back
    with pytest.raises(KeyError, match="nobody"):
        back["nobody"]
    with pytest.raises(IndexError, match="position 26 of 26 proteins"):
        back[26]
    include = settings.get("include", [Include.mean])
    if Include.per_tok in include:
        for i, residues in enumerate(SEQUENCES):
            assert_same(back.residues(i), expected_rows(residues))
        assert_same(back.residues("../../evil"), expected_rows("MKTA"))
    else:
        with pytest.raises(
            ValueError, match=r"per_tok of layer 1 is not there, but mean of layer 1.*include=\[per_tok\]"
        ):
            back.residues(0)
    if Include.bos in include:
        assert_same(back.vectors_of("bos", 1), np.stack([expected_bos(residues) for residues in SEQUENCES]))
    if settings is EVERYTHING:
        assert_same(
            back.vectors_of("mean", 0), np.stack([expected_mean(residues, 0) for residues in SEQUENCES])
        )
        assert_same(
            back.vectors_of("bos", 0), np.stack([expected_bos(residues, 0) for residues in SEQUENCES])
        )
        assert_same(back.residues("a/b", 0), expected_rows("MK", 0))
    with pytest.raises(ValueError, match="mean of layer 7 is not there"):
        back.vectors_of("mean", 7)
    assert_same(pickle.loads(pickle.dumps(back))[3], expected_mean("GGG"))


@pytest.mark.parametrize("kind", Format)
def test_half_precision_is_saved_as_such_and_read_as_float32(tmp_path, kind):
    path = embed_text(tmp_path, kind, save_dtype=SaveDtype.float16, **EVERYTHING)
    back = load(path)
    assert_same(
        back.vectors,
        np.stack([expected_mean(residues) for residues in SEQUENCES]).astype(np.float16).astype(np.float32),
    )
    for i, residues in enumerate(SEQUENCES):
        assert_same(back.residues(i), expected_rows(residues).astype(np.float16).astype(np.float32))
    if kind is Format.parquet:
        assert pq.read_schema(path).field("mean_layer_1").type == pa.list_(pa.float16(), WIDTH)
        assert_same(
            np.stack(pandas.read_parquet(path)["mean_layer_1"].to_numpy()),
            np.stack([expected_mean(s) for s in SEQUENCES]).astype(np.float16),
        )
    elif kind is Format.h5:
        with h5py.File(path, "r") as file:
            assert file["con"].dtype == file["con"].attrs["mean_layer_1"].dtype == np.float16
    elif kind is Format.safetensors:
        with safe_open(path, framework="numpy") as file:
            assert file.get_tensor("per_tok.1").dtype == np.float16


@pytest.mark.parametrize("kind", Format)
def test_a_file_without_proteins_has_an_output_of_the_right_shape(tmp_path, kind):
    path = embed_text(tmp_path, kind, text="", **EVERYTHING)
    back = load(path)
    assert (len(back), back.ids, back.lengths, back.headers) == (0, [], [], [])
    assert back.vectors.shape == back.vectors_of("bos", 0).shape == (0, WIDTH)
    assert back.vectors.dtype == np.float32
    if kind is Format.parquet:
        assert polars.read_parquet(path).shape == (0, 19)
        assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(0,)]
        assert len(pandas.read_parquet(path)) == 0


@pytest.mark.parametrize("kind", Format)
def test_a_run_reads_back_in_input_order_from_joined_files_parts_and_folders(tmp_path, monkeypatch, kind):
    """One file was cut and joined, one is in parts, one empty, one in a folder; ids are in several files."""
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    inputs = tmp_path / "in"
    (inputs / "deep").mkdir(parents=True)
    kinds = "ACDEFGHIKLMNPQRSTVWY"
    counts = {"a": 9, "b": 0, "deep/c": 30, "z": 10}
    sequences = {
        name: [(kinds[i % 20] + kinds[i * 7 % 20] + kinds[::-1]) * (1 + i % 3) for i in range(n)]
        for name, n in counts.items()
    }
    for name, found in sequences.items():
        (inputs / f"{name}.fasta").write_text(
            "".join(f">p{i}\n{residues}\n" for i, residues in enumerate(found))
        )
    run = embed_directory(
        inputs, tmp_path / "out", format=kind, include=ALL_KINDS, unit_share=0.05, max_proteins_per_output=10
    )
    assert [len(entry.outputs) for entry in run.report.files][:2] == [1, 1]
    assert len(run.report.files[2].outputs) >= 3
    assert run.report.files[0].units > 1
    back = load(tmp_path / "out")
    everything = [
        residues
        for entry in run.report.files
        for residues in sequences[str(Path(entry.path).relative_to(inputs)).removesuffix(".fasta")]
    ]
    assert len(back) == len(everything) == 49
    assert back.ids == [f"p{i}" for entry in run.report.files for i in range(entry.sequences)]
    assert back.sources == [
        str(Path(entry.path).relative_to(inputs))
        for entry in run.report.files
        for _ in range(entry.sequences)
    ]
    assert_same(back.vectors, np.stack([expected_mean(residues) for residues in everything]))
    for i in (0, 48, 20, 9, 10, 11):
        assert_same(back[i], expected_mean(everything[i]))
        assert_same(back.residues(i), expected_rows(everything[i]))
    assert back.positions("p0") == [0, 9, 39]
    parts = [load(tmp_path / "out" / output).ids for output in run.report.files[2].outputs]
    assert [protein for ids in parts for protein in ids] == [f"p{i}" for i in range(30)]


def test_what_is_no_output_is_refused_with_path_and_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for output_format in FORMATS.values():
        if not output_format.is_folder:
            (tmp_path / f"torn{output_format.suffix}").write_bytes(b"\x10 this is torn")
    torch.save({"proteins": ["a"], "data": [torch.zeros(3)]}, tmp_path / "other.pt")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text('{"files": []}')
    for name, remedy in {
        "nowhere": "is not there: name an output_dir",
        "empty": "neither a journal in .dist_esm nor an ids.tsv",
        "notes.txt": r"is no output of dist_esm: name an output_dir, or a file that ends in .pt, .h5",
        "bad": "neither a journal in .dist_esm nor an ids.tsv",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}.*{remedy}") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("torn.pt", "torn.h5", "torn.parquet", "torn.safetensors", "other.pt"):
        with pytest.raises(
            ValueError, match=rf"{name} is damaged or no output of dist_esm .*embed its input again"
        ) as caught:
            len(load(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_an_output_of_a_run_that_is_gone_is_named_and_other_settings_are_not_mixed_in(tmp_path):
    for name, provenance in (("a", PROVENANCE), ("b", {**PROVENANCE, "weights": "sha256:4567"})):
        write_table(Format.pt, table_of(SEQUENCES, provenance), tmp_path / name)
    write_journal(tmp_path, "a.pt", "b.pt")
    with pytest.raises(ValueError, match=r"b.pt and .*a.pt were made under different settings"):
        load(tmp_path).vectors  # noqa: B018 - read for its error
    os.unlink(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt is not there or not whole: run again"):
        load(tmp_path).ids  # noqa: B018 - read for its error


def test_a_run_without_outputs_is_empty_and_says_so(tmp_path):
    write_journal(tmp_path)
    back = load(tmp_path)
    assert (len(back), back.ids, back.lengths) == (0, [], [])
    with pytest.raises(ValueError, match=r"no outputs.*see failed_files.txt"):
        back.vectors  # noqa: B018 - read for its error


def test_outputs_of_different_code_with_the_same_numerics_are_read_together(tmp_path):
    """Before numerics had a version they were the first."""
    versions = ({"dist_esm": "0.1.0"}, {"dist_esm": "0.2.0+g1a2b3c4", "numerics": 1}, {"numerics": 2})
    for name, code in zip("abc", versions, strict=True):
        write_table(Format.pt, table_of(SEQUENCES, {**PROVENANCE, **code}), tmp_path / name)
    write_journal(tmp_path, "a.pt", "b.pt")
    assert len(load(tmp_path)) == 2 * len(SEQUENCES)
    shutil.rmtree(tmp_path / ".dist_esm")
    write_journal(tmp_path, "b.pt", "c.pt")
    with pytest.raises(ValueError, match=r"c.pt and .*b.pt were made under different settings"):
        load(tmp_path).ids  # noqa: B018 - read for its error


def test_a_directory_is_read_by_its_journal_whatever_a_report_says(tmp_path):
    """All launches, each file once, as it was embedded last; the last launch alone if so asked."""
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for name in "ab":
        (inputs / f"{name}.fasta").write_text(f">{name}\nMKTAY\n")
    embed_directory(inputs, out)
    (inputs / "b.fasta").unlink()
    (inputs / "a.fasta").write_text(">anew\nMKTAYI\n")
    (inputs / "c.fasta").write_text(">c\nMKW\n")
    embed_directory(inputs, out)
    assert load(out).ids == ["anew", "b", "c"], "the report knows a and b alone"
    assert_same(load(out)["anew"], expected_mean("MKTAYI"))
    assert load(out, run="last").ids == ["anew", "c"]
    with pytest.raises(ValueError, match="run='first' is neither"):
        load(out, run="first")
    (out / "report.json").unlink()
    assert load(out).ids == ["anew", "b", "c"]
    shutil.rmtree(out / ".dist_esm" / "launches")
    with pytest.raises(ValueError, match="does not say which inputs its last run had"):
        load(out, run="last")
    (journal,) = (out / ".dist_esm" / "journal").glob("*2.00000.jsonl")
    journal.write_text("")
    (out / "report.json").write_text(json.dumps({"status": "complete", "files": [{"outputs": ["c_ESM.pt"]}]}))
    assert "c" not in load(out).ids, "a report that says more than the journal is not believed"


@pytest.mark.parametrize("kind", Format, ids=lambda kind: kind.name)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_whatever_is_read_of_a_damaged_output_names_it(tmp_path, kind, share):
    """Damage that opening does not meet is met by what reads the numbers."""
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">p{i}\n{'ACDEF' * (i + 1)}\n" for i in range(30)))
    embed_directory(path, tmp_path / "out", format=kind, include=ALL_KINDS)
    (output,) = (path for path in (tmp_path / "out").iterdir() if path.name.startswith("a_ESM"))
    for file in sorted(output.iterdir()) if output.is_dir() else [output]:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        back, errors = load(tmp_path / "out"), []
        for read in (
            lambda back: back.ids,
            lambda back: np.asarray(back.vectors),
            lambda back: back[7],
            lambda back: np.asarray(back.vectors_of("bos", 1)),
            lambda back: [back.residues(position) for position in range(30)],
            lambda back: back.headers,
        ):
            error = as_value(read, back)
            if isinstance(error, Exception):
                assert str(output) in str(error), repr(error)
                assert isinstance(error, ValueError)
                errors.append(error)
        # Some text may lose the end of its last line, and no more.
        assert errors or int(len(whole) * share) >= len(whole) - 1, file
        file.write_bytes(whole)
