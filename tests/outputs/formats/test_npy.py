"""format=npy through numpy, FAISS, scikit-learn and the readers of its table."""

from __future__ import annotations

import json

import numpy as np
import pandas
import polars
import pytest

from dist_esm import load
from dist_esm.config import Format, SaveDtype
from helpers.compare import assert_same
from helpers.outputs import (
    EVERYTHING,
    HEADERS,
    IDS,
    SEQUENCES,
    embed_text,
    expected_bos,
    expected_mean,
    expected_rows,
    table_of,
    write_table,
)
from helpers.standin import embed_directory

LENGTHS = [len(residues) for residues in SEQUENCES]


@pytest.mark.parametrize("dtype", SaveDtype)
def test_npy_is_a_matrix_for_each_kind_and_layer_that_numpy_maps(tmp_path, dtype):
    folder = embed_text(tmp_path, Format.npy, save_dtype=dtype, **EVERYTHING)
    assert folder == tmp_path / "out" / "a_ESM"
    names = {f"{kind}_layer_{layer}.npy" for kind in ("mean", "bos", "per_tok") for layer in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {*names, "proteins.tsv", "provenance.json"}
    for layer in (0, 1):
        for kind, of in (("mean", expected_mean), ("bos", expected_bos), ("per_tok", expected_rows)):
            rows = np.load(folder / f"{kind}_layer_{layer}.npy", mmap_mode="r")
            assert isinstance(rows, np.memmap)
            assert rows.flags.c_contiguous
            stack = np.concatenate if kind == "per_tok" else np.stack
            assert_same(rows, stack([of(residues, layer) for residues in SEQUENCES]).astype(dtype.name))
    assert json.loads((folder / "provenance.json").read_text())["width"] == rows.shape[1]


def test_the_table_of_npy_is_read_as_it_stands_by_pandas_and_polars(tmp_path):
    folder = embed_text(tmp_path, Format.npy, **EVERYTHING)
    offsets = np.cumsum([0, *LENGTHS])[:-1].tolist()
    path = folder / "proteins.tsv"
    for frame in (
        pandas.read_csv(path, sep="\t", keep_default_na=False),
        polars.read_csv(path, separator="\t").fill_null(""),
    ):
        assert list(frame.columns) == ["id", "index", "length", "offset", "header"]
        assert [list(frame[name]) for name in frame.columns] == [
            IDS,
            list(range(len(IDS))),
            LENGTHS,
            offsets,
            HEADERS,
        ]


def test_headers_of_npy_with_quotation_marks_and_of_any_size_come_back(tmp_path):
    text = '>"a" is "quoted"\nMKT\n>b ' + "x" * 200_000 + '\nMK\n>c"\t"d\nM\n'
    folder = embed_text(tmp_path, Format.npy, text=text)
    back = load(folder)
    assert back.ids == ['"a"', "b", 'c"']
    assert back.headers == ['"a" is "quoted"', "b " + "x" * 200_000, 'c"\t"d']
    assert pandas.read_csv(folder / "proteins.tsv", sep="\t")["header"].to_list() == back.headers


def test_numbered_parts_of_npy_are_a_folder_each(tmp_path):
    (tmp_path / "a.fasta").write_text("".join(f">p{i}\n{'MKTAY' * (i + 1)}\n" for i in range(7)))
    run = embed_directory(
        tmp_path / "a.fasta", tmp_path / "out", format=Format.npy, max_proteins_per_output=3, **EVERYTHING
    )
    assert run.report.files[0].outputs == [f"a_ESM.part{part:05d}" for part in (1, 2, 3)]
    means = [np.load(tmp_path / "out" / name / "mean_layer_1.npy") for name in run.report.files[0].outputs]
    assert [len(rows) for rows in means] == [3, 3, 1]
    back = load(tmp_path / "out")
    assert_same(back.vectors, np.concatenate(means))
    for i in range(7):
        assert_same(back.residues(i), expected_rows("MKTAY" * (i + 1)))


def test_a_file_in_the_place_of_an_output_of_npy_stays(tmp_path):
    (tmp_path / "a_ESM").mkdir()
    (tmp_path / "a_ESM" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no folder of embeddings alone"):
        write_table(Format.npy, table_of(SEQUENCES), tmp_path / "a_ESM")
    assert (tmp_path / "a_ESM" / "thesis.txt").read_text() == "mine"


def test_npy_through_faiss(tmp_path):
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed: pip install faiss-cpu")
    folder = embed_text(tmp_path, Format.npy)
    vectors = np.load(folder / "mean_layer_1.npy", mmap_mode="r")
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    distances, found = index.search(np.stack([expected_mean(residues) for residues in SEQUENCES]), 1)
    assert distances.ravel().tolist() == [0] * len(IDS)
    assert found.ravel().tolist() == list(range(len(IDS)))


def test_npy_through_scikit_learn(tmp_path):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="not installed: pip install scikit-learn")
    folder = embed_text(tmp_path, Format.npy, **EVERYTHING)
    rows = np.load(folder / "per_tok_layer_1.npy", mmap_mode="r")
    searched = neighbors.NearestNeighbors(n_neighbors=1).fit(rows)
    distances, _ = searched.kneighbors(expected_rows(SEQUENCES[0]))
    assert distances.ravel().tolist() == [0] * LENGTHS[0]
