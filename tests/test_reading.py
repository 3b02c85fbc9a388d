"""The code in docs/reading.md, run on outputs of the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_esm
from helpers.command import MODEL, run_ranks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reading.md"
IDS = ["P12345", "P12345_twin", *(f"Q{number}" for number in range(18)), "P12345_twin"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def blocks() -> dict[str, str]:
    """Each section's code, for the model that the tests run: 8M has 6 layers and 320 numbers."""
    sections = re.split(r"^## (\w+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        found[name] = code.replace("layer_33", "layer_6").replace("1280", "320")
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Two runs: `embeddings/` of two files of proteins as parquet, and VirNucPro's folder."""
    folder = tmp_path_factory.mktemp("reading")
    (folder / "proteins").mkdir()
    (folder / "sample_protein").mkdir()
    sequences = {name: RESIDUES[number:] * 2 + RESIDUES[:number] for number, name in enumerate(IDS)}
    sequences["P12345"] = RESIDUES * 2 + "A"
    sequences["P12345_twin"] = RESIDUES * 2 + "G"
    records = [f">{name} a protein\n{sequences[name]}\n" for name in IDS]
    (folder / "proteins" / "a.fasta").write_text("".join(records[:12]))
    (folder / "proteins" / "b.fasta").write_text("".join(records[12:]))
    (folder / "sample_protein" / "output_0.fa").write_text("".join(records[:3]))
    for names in ("proteins embeddings format=parquet", "sample_protein sample_protein"):
        inputs, out, *others = names.split()
        paths = [f"input={folder / inputs}", f"output_dir={folder / out}"]
        done = run_ranks(None, *paths, MODEL, "model.weights=random", "device=cpu", *others)
        assert done.returncode == 0, done.stderr
    return folder


def run_block(name: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, *packages: str) -> dict[str, Any]:
    """Run a section's code where the outputs are, and return what it defines."""
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(outputs)
    values: dict[str, Any] = {}
    exec(compile(blocks()[name], f"docs/reading.md, {name}", "exec"), values)
    return values


@pytest.fixture
def vectors(outputs) -> np.ndarray:
    run = dist_esm.load(outputs / "embeddings")
    assert run.ids == IDS
    return run.vectors


@pytest.mark.parametrize("name", ["polars", "pandas"])
def test_frames(name, outputs, vectors, monkeypatch):
    values = run_block(name, outputs, monkeypatch, name)
    assert values["ids"] == IDS
    assert values["vectors"].dtype == np.float32
    assert np.array_equal(values["vectors"], vectors)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Of the first protein with each."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit[0]


def test_the_most_similar_in_duckdb(outputs, vectors, monkeypatch):
    nearest = run_block("DuckDB", outputs, monkeypatch, "duckdb")["nearest"]
    assert [name for name, _ in nearest[:2]] == ["P12345_twin"] * 2
    expected = sorted(cosines(vectors)[1:], reverse=True)[:5]
    np.testing.assert_allclose([similarity for _, similarity in nearest], expected, atol=1e-5)


def test_a_data_set_of_pytorch(outputs, vectors, monkeypatch):
    values = run_block("PyTorch", outputs, monkeypatch)
    assert np.array_equal(values["vector"], vectors[0])
    batches = list(values["loader"])
    assert sorted(torch.cat([places for _, places in batches]).tolist()) == list(range(len(IDS)))
    assert all(np.array_equal(vectors[places], batch) for batch, places in batches)


def test_an_index_of_faiss(outputs, vectors, monkeypatch):
    values = run_block("FAISS", outputs, monkeypatch, "faiss")
    assert values["nearest"][:3] == ["P12345", "P12345_twin", "P12345_twin"]
    expected = sorted(cosines(vectors), reverse=True)[:6]
    np.testing.assert_allclose(values["similarities"][0], expected, atol=1e-5)


def test_a_map_of_scanpy(outputs, vectors, monkeypatch):
    numba = pytest.importorskip("numba", reason="could not import scanpy")
    monkeypatch.setattr(
        numba.config, "DISABLE_JIT", 1
    )  # to compile UMAP takes ten times as long as to run it
    proteins = run_block("scanpy", outputs, monkeypatch, "scanpy")["proteins"]
    assert np.array_equal(proteins.X, vectors)
    assert proteins.obsm["X_umap"].shape == (len(IDS), 2)
    assert set(proteins.obs_names) == {*IDS, "P12345_twin-1"}
    assert list(proteins.obs["length"]) == [41, 41, *range(38, 20, -1), 41]


def test_what_virnucpro_reads(outputs, vectors, monkeypatch):
    values = run_block("VirNucPro", outputs, monkeypatch)
    assert list(values["vectors"]) == IDS[:3]
    assert np.array_equal(torch.stack(list(values["vectors"].values())), vectors[:3])


def test_every_section_with_code_has_a_test():
    assert set(blocks()) == {"polars", "pandas", "DuckDB", "PyTorch", "FAISS", "scanpy", "VirNucPro"}
