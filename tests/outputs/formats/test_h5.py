"""format=h5 through h5py and ProtSpace."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pytest
import torch

from dist_esm import load
from dist_esm.config import Format, Include, SaveDtype
from dist_esm.outputs.embeddings import ChunkedTensor
from helpers.compare import assert_same
from helpers.outputs import (
    EVERYTHING,
    IDS,
    PROVENANCE,
    SEQUENCES,
    embed_text,
    expected_bos,
    expected_mean,
    expected_rows,
    table_of,
    write_table,
)
from helpers.standin import WIDTH


def meant_by(name: str) -> str:
    """The id that a name is made of, as far as it says it."""
    return unquote(re.sub("~(h[0-9a-f]{16}|[0-9]+)$", "", name))


def as_named(ids: list[str]) -> list[str]:
    """What names say of ids."""
    return [protein if len(protein) <= 1024 else protein[: 1024 - len("~h") - 16] for protein in ids]


def test_h5_is_flat_in_file_order_and_says_the_ids(tmp_path):
    with h5py.File(embed_text(tmp_path, Format.h5), "r") as file:
        assert file.attrs["model_name"] == "stand-in"
        names = list(file)
        assert all(isinstance(dataset, h5py.Dataset) for dataset in file.values())
        assert (names[0], names[1], names[4:8]) == (
            "sp|P12345|X_Y",
            "a%2Fb",
            ["twin", "twin~2", "TWIN", "twin%7E2"],
        )
        for i, (dataset, residues) in enumerate(zip(file.values(), SEQUENCES, strict=True)):
            assert_same(dataset[()], expected_mean(residues))
            assert (dataset.attrs["original_id"], dataset.attrs["index"], dataset.attrs["length"]) == (
                IDS[i],
                i,
                len(residues),
            )
        assert [meant_by(name) for name in names] == as_named(IDS)


def test_h5_with_residues_has_them_as_datasets_and_vectors_as_attributes(tmp_path):
    with h5py.File(embed_text(tmp_path, Format.h5, **EVERYTHING), "r") as file:
        assert (file.attrs["kind"], file.attrs["layer"]) == ("per_tok", 1)
        for dataset, residues in zip(file.values(), SEQUENCES, strict=True):
            assert_same(dataset[()], expected_rows(residues))
            assert_same(dataset.attrs["per_tok_layer_0"], expected_rows(residues, 0))
            for layer in (0, 1):
                assert_same(dataset.attrs[f"mean_layer_{layer}"], expected_mean(residues, layer))
                assert_same(dataset.attrs[f"bos_layer_{layer}"], expected_bos(residues, layer))


@pytest.fixture
def protspace(monkeypatch):
    """ProtSpace's own loader of HDF5.

    The loader needs numpy and h5py alone, the package around it scikit-learn, UMAP and more. So its parents
    stay unexecuted.
    """
    found = importlib.util.find_spec("protspace")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("ProtSpace is not installed: pip install --no-deps protspace")
    for name in ("protspace", "protspace.data", "protspace.data.loaders"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(found.submodule_search_locations[0], *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("protspace.data.loaders.h5")


@pytest.mark.parametrize("dtype", SaveDtype)
def test_h5_through_protspace(tmp_path, protspace, dtype):
    path = write_table(
        Format.h5,
        table_of(SEQUENCES, PROVENANCE, ids=IDS, dtype=getattr(torch, dtype.name)),
        tmp_path / "a_ESM",
    )
    found = protspace.load_h5([path])
    assert found.name == PROVENANCE["model"]
    assert [meant_by(name) for name in found.headers] == as_named(IDS)
    assert_same(found.data, np.arange(len(IDS) * WIDTH, dtype=np.float32).reshape(-1, WIDTH))
    assert protspace.parse_identifier(found.headers[0]) == "P12345"


def test_h5_with_residues_is_refused_by_protspace(tmp_path, protspace):
    with pytest.raises(ValueError, match="looks like per-residue embeddings"):
        protspace.load_h5([embed_text(tmp_path, Format.h5, include=[Include.mean, Include.per_tok])])


def test_h5_takes_attributes_of_any_size(tmp_path):
    """Residues of a further layer are an attribute, which HDF5 before 1.8 ended at 64 KiB."""
    path = embed_text(
        tmp_path, Format.h5, text=f">long\n{'MKTAYIAKQR' * 500}\n", truncation_seq_length=None, **EVERYTHING
    )
    assert_same(load(path).residues("long", 0), expected_rows("MKTAYIAKQR" * 500, 0))
    assert path.stat().st_size > 2 * 5000 * WIDTH * 4 > 1 << 17


@pytest.mark.parametrize("most_small", [500, 2])
@pytest.mark.parametrize("width", [6, 320])
def test_residues_of_further_layers_stand_by_themselves_or_among_descriptions(
    tmp_path, monkeypatch, width, most_small
):
    """HDF5 keeps those of at most 4 KiB elsewhere: there are such proteins, and others, in every order, and
    more than have places."""
    monkeypatch.setattr("dist_esm.outputs.formats.h5.MAX_KEPT", 3)
    monkeypatch.setattr("dist_esm.outputs.formats.h5.MAX_SMALL", most_small)
    monkeypatch.setattr("dist_esm.outputs.formats.h5.MAX_SMALL_SHARE", 1)
    lengths = [1, 2, 60, 170, 2, 3, 200, 1]
    table = table_of(["M" * length for length in lengths], width=width)
    numbers = torch.arange(sum(lengths) * width, dtype=torch.float32).view(-1, width)
    per_tok = {layer: ChunkedTensor([numbers + layer]) for layer in (5, 33, 12)}
    path = write_table(Format.h5, replace(table, include=["per_tok"], per_tok=per_tok), tmp_path / "a_ESM")
    first = 0
    with h5py.File(path, "r") as file:
        for dataset, length in zip(file.values(), lengths, strict=True):
            rows = numbers[first : first + length].numpy()
            assert np.array_equal(dataset[()], rows + 33)
            assert np.array_equal(dataset.attrs["per_tok_layer_5"], rows + 5)
            assert np.array_equal(dataset.attrs["per_tok_layer_12"], rows + 12)
            assert (dataset.attrs["length"], len(dataset.attrs)) == (length, 6)
            first += length


@pytest.mark.parametrize("place", [0, 2, 19])
def test_an_id_as_long_as_a_protein_is_cut_in_its_name_alone(tmp_path, place):
    """HDF5 would keep a name of 4 KiB among the numbers, and a protein without a line break is such an id."""
    ids = [f"p{i}" for i in range(20)]
    ids[place] = "MKTAYIAKQR" * 500
    path = write_table(Format.h5, table_of(["M" * 30] * 20, width=1280, ids=ids), tmp_path / "a_ESM")
    assert load(path).ids == ids
    with h5py.File(path, "r") as file:
        name = list(file)[place]
        assert re.fullmatch("[A-Z]{1006}~h[0-9a-f]{16}", name)
        assert file[name].attrs["original_id"] == ids[place]


@pytest.mark.parametrize("kind", ["mean", "per_tok"])
def test_an_output_of_so_many_proteins_that_hdf5_reads_again_what_it_wrote(tmp_path, kind):
    """It keeps a few thousand descriptions in memory, and reads on into the numbers behind one of them."""
    table = table_of(["MK"] * 12_000, width=2)
    if kind == "per_tok":
        numbers = torch.arange(48_000, dtype=torch.float32).view(-1, 2)
        table = replace(table, include=["per_tok"], per_tok={33: ChunkedTensor([numbers])})
    path = write_table(Format.h5, table, tmp_path / "a_ESM")
    with h5py.File(path, "r") as file:
        found = np.stack([dataset[()] for dataset in file.values()])
        assert file["p11999"].attrs["original_id"] == "p11999"
    assert np.array_equal(found.ravel(), np.arange(found.size, dtype=np.float32))
