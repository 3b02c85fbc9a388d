"""A run as pandas, polars and scanpy have it."""

from __future__ import annotations

import json
import sys

import anndata
import numpy as np
import pandas
import polars
import pytest

from dist_esm import load
from dist_esm.config import Format, Include
from dist_esm.outputs.convert import unique
from helpers.compare import assert_same
from helpers.outputs import EVERYTHING, IDS, SEQUENCES, embed_text, expected_bos, expected_mean, expected_rows
from helpers.standin import WIDTH

LENGTHS = [len(residues) for residues in SEQUENCES]
NAMES = ["mean_layer_0", "mean_layer_1", "bos_layer_0", "bos_layer_1"]


@pytest.fixture(scope="module", params=[Format.pt, Format.parquet], ids=lambda kind: kind.name)
def everything(request, tmp_path_factory):
    return load(embed_text(tmp_path_factory.mktemp("convert"), request.param, **EVERYTHING))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_a_row_for_each_protein(everything, library):
    frame = everything.to_frame(library)
    assert isinstance(frame, {"pandas": pandas, "polars": polars}[library].DataFrame)
    assert list(frame.columns) == ["id", "source", "length", *NAMES]
    assert (list(frame["id"]), list(frame["length"])) == (IDS, LENGTHS)
    assert set(frame["source"]) == {"a.fasta"}
    as_matrix = np.stack if library == "pandas" else polars.Series.to_numpy
    assert_same(
        as_matrix(frame["mean_layer_1"]), np.stack([expected_mean(residues) for residues in SEQUENCES])
    )
    assert_same(
        as_matrix(frame["bos_layer_0"]), np.stack([expected_bos(residues, 0) for residues in SEQUENCES])
    )


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_residues_come_if_they_are_asked_for(everything, library):
    frame = everything.to_frame(library, include=["per_tok"])
    assert list(frame.columns) == ["id", "source", "length", "per_tok_layer_0", "per_tok_layer_1"]
    for rows, residues in zip(frame["per_tok_layer_1"], SEQUENCES, strict=True):
        assert_same(rows if library == "pandas" else rows.to_numpy(), expected_rows(residues))


def test_an_array_is_a_copy_of_ones_own(everything):
    vectors = everything.to_numpy("bos", 0)
    assert_same(vectors, np.stack([expected_bos(residues, 0) for residues in SEQUENCES]))
    vectors[:] = 0
    assert_same(everything.to_numpy(), np.stack([expected_mean(residues) for residues in SEQUENCES]))
    assert everything.to_numpy("bos", 0).any()
    with pytest.raises(ValueError, match="mean of layer 7 is not there"):
        everything.to_numpy(layer=7)


def test_an_anndata_has_ids_lengths_and_sources_and_can_be_saved(everything, tmp_path):
    made = everything.to_anndata()
    made.write_h5ad(tmp_path / "a.h5ad")
    for proteins in (made, anndata.read_h5ad(tmp_path / "a.h5ad")):
        assert_same(proteins.X, np.stack([expected_mean(residues) for residues in SEQUENCES]))
        assert list(proteins.obs["id"]) == IDS
        assert list(proteins.obs["length"]) == LENGTHS
        assert set(proteins.obs["source"]) == {"a.fasta"}
        assert proteins.obs_names.is_unique
        assert [name for name in proteins.obs_names if name.startswith("twin")] == [
            "twin",
            "twin-1",
            "twin~2",
            "twin-2",
        ]
        assert set(proteins.obsm) == {"mean_layer_0", "bos_layer_0", "bos_layer_1"}
        assert_same(
            proteins.obsm["bos_layer_1"], np.stack([expected_bos(residues) for residues in SEQUENCES])
        )
        assert json.loads(proteins.uns["provenance"]) == everything.provenance


def test_names_are_made_unique_as_anndata_does_it():
    names = ["a", "b", "a", "a-1", "a", "c", "c", "a-1"]
    frame = anndata.AnnData(np.zeros((len(names), 1), np.float32), obs=pandas.DataFrame(index=names))
    frame.obs_names_make_unique()
    assert unique(names) == list(frame.obs_names)


@pytest.mark.parametrize("kind", [Format.pt, Format.parquet])
def test_a_file_without_proteins_has_columns_and_no_rows(tmp_path, kind):
    back = load(embed_text(tmp_path, kind, text="", include=[Include.mean, Include.per_tok]))
    for library in ("pandas", "polars"):
        frame = back.to_frame(library, include=["mean", "per_tok"])
        assert frame.shape == (0, 5)
    assert frame.schema["id"] == polars.String
    assert frame.schema["mean_layer_1"] == polars.Array(polars.Float32, WIDTH)
    assert frame.schema["per_tok_layer_1"] == polars.List(polars.Array(polars.Float32, WIDTH))
    assert back.to_numpy().shape == back.to_anndata().shape == (0, WIDTH)


def test_what_is_not_installed_or_unknown_is_one_line(everything, monkeypatch):
    for wrong in ("mean", ["median"]):
        with pytest.raises(ValueError, match="is no list of kinds: use any of mean, bos, per_tok"):
            everything.to_frame(include=wrong)
    with pytest.raises(ValueError, match="'arrow' is no library of data frames: use 'pandas' or 'polars'"):
        everything.to_frame("arrow")
    for package in ("pandas", "polars", "anndata"):
        monkeypatch.setitem(sys.modules, package, None)
    install = r": pip install 'dist_esm\[notebook\]'$"
    for make, what in (
        (everything.to_frame, "a data frame needs pandas"),
        (lambda: everything.to_frame("polars"), "a data frame needs polars"),
        (everything.to_anndata, "an AnnData needs anndata"),
    ):
        with pytest.raises(ValueError, match=what + install):
            make()
