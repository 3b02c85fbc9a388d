"""Every format through the library that its users read it with, and through `dist_esm.load`: the same proteins, the same bits."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from urllib.parse import unquote

import duckdb
import h5py
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from esm import pretrained
from esm.data import FastaBatchedDataset
from safetensors import safe_open

from conftest import relative_error, run_ranks
from dist_esm import load
from dist_esm.atomic import SummedFile, fingerprint, written_file
from dist_esm.config import Format, Include, SaveDtype, check
from dist_esm.jobs.report import write_report
from dist_esm.jobs.verify import check_file
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats import parquet as formats_parquet
from dist_esm.outputs.formats.fair_esm import MAX_NAME, file_name
from dist_esm.outputs.formats.registry import WRITERS, write_output
from dist_esm.planning.inputs import find_files
from dist_esm.types import Row
from standin import WIDTH, bos_of, embed_directory, expected, fair_esm_tokens, journal_of, make_config

ALL = [Include.mean, Include.bos, Include.per_tok]
EVERYTHING = {"include": ALL, "repr_layers": [0, 1]}
LONG = "x" * 5000
RECORDS = [
    ("sp|P12345|X_Y", " some protein\twith a tab", "MKTAYIAKQR"),
    ("a/b", "", "MK"),
    ("../../evil", " climbs", "MKTA"),
    ("/etc/passwd", "", "GGG"),
    ("twin", " first", "ACDEF"),
    ("twin", " second", "GHIKL"),
    ("TWIN", " differs in case", "GHIKLM"),
    ("twin~2", " looks like our mark", "GHIK"),
    ("a:b*c?<d>", "", "MMM"),
    ("con", "", "MKW"),
    ("nul.x", "", "MKWW"),
    ("..", "", "MKWWW"),
    (".", "", "MKWWWW"),
    (".hidden.", "", "WWM"),
    ("100%2F", "", "WWMK"),
    ("αβγ_蛋白", " 🧬", "LLL"),
    (LONG, "", "LLK"),
    (LONG + "y", "", "LLKM"),
    ("unnamed", "", "LK"),
    ("", "", "LKM"),
    ("a\\b", "", "PPP"),
    ("ids.tsv", "", "PPPK"),
    ("soft", "", "mkta-y*"),
    ("Twin", " First", "GHIKLMN"),
    ("twin", " first", "ACDEFG"),
    ("50%", " of a~~~b in hélices 3.", "PPPKK"),
]
IDS = [name or "unnamed_20" for name, _, _ in RECORDS]
HEADERS = [name + rest for name, rest, _ in RECORDS]
SEQUENCES = [residues.upper().replace("-", "").rstrip("*") for _, _, residues in RECORDS]
FASTA = "".join(f">{name}{rest}\n{residues}\n" for name, rest, residues in RECORDS)


def vector(residues: str, layer: int = 1) -> np.ndarray:
    return expected(residues, layer).mean


def bos(residues: str, layer: int = 1) -> np.ndarray:
    return bos_of(fair_esm_tokens(residues), layer).astype(np.float32)


def rows(residues: str, layer: int = 1) -> np.ndarray:
    return expected(residues, layer).rows


def assert_same(got, want) -> None:
    """The same numbers of the same dtype, bit for bit."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def embed(tmp_path: Path, kind: Format, name: str = "a.fasta", text: str = FASTA, **settings) -> Path:
    """Embed one file; its output."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    run = embed_directory(tmp_path / "in", tmp_path / "out", format=kind, **settings)
    assert not run.report.failed
    (entry,) = run.report.files
    return tmp_path / "out" / entry.output


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Through the libraries of each format's users.


def test_pt_through_torch(tmp_path):
    content = torch.load(embed(tmp_path, Format.pt, **EVERYTHING), weights_only=True)
    assert (content["proteins"], content["headers"]) == (IDS, HEADERS)
    assert content["lengths"] == [len(residues) for residues in SEQUENCES]
    for i, residues in enumerate(SEQUENCES):
        assert_same(content["data"][i], vector(residues))
        for layer in (0, 1):
            assert_same(content["mean_representations"][layer][i], vector(residues, layer))
            assert_same(content["bos_representations"][layer][i], bos(residues, layer))
            assert_same(content["representations"][layer][i], rows(residues, layer))


def test_fair_esm_leaves_a_file_for_each_protein_as_esm_extract_does(tmp_path):
    folder = embed(tmp_path, Format.fair_esm, **EVERYTHING)
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
            assert_same(content["mean_representations"][layer], vector(residues, layer))
            assert_same(content["bos_representations"][layer], bos(residues, layer))
            assert_same(content["representations"][layer], rows(residues, layer))
            for tensor in (content["mean_representations"][layer], content["representations"][layer]):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        assert (folder / name).stat().st_size < 20_000


def test_no_id_leaves_the_folder_and_every_name_is_safe_anywhere_and_can_be_read_back(tmp_path):
    folder = embed(tmp_path, Format.fair_esm)
    assert {
        name for name in everything_below(tmp_path / "out") if not name.startswith((".dist_esm", "a_ESM"))
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
    """What fair-esm's own classes leave if they are put together as its extract script does, which its package lacks."""
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
    """A script that reads esm-extract's folder by label finds the same files, keys, labels, shapes, dtypes and numbers in ours."""
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


@pytest.mark.parametrize("kind", Format)
def test_verify_finds_every_record_in_its_place(tmp_path, kind):
    """Ids are what verify looks for, whatever an output's names are made of."""
    path = embed(tmp_path, kind, **EVERYTHING)
    config = make_config(str(tmp_path / "in"), tmp_path / "out", format=kind, **EVERYTHING)
    assert (
        list(
            check_file(
                find_files(config.input_list())[0],
                [path.name],
                journal_of(tmp_path / "in" / "a.fasta", path),
                config,
            )
        )
        == []
    )


def test_a_folder_is_replaced_whole_and_only_if_it_is_ours(tmp_path):
    folder = embed(tmp_path, Format.fair_esm)
    (tmp_path / "in" / "a.fasta").write_text(">only\nMKT\n")
    assert not embed_directory(tmp_path / "in", tmp_path / "out", format=Format.fair_esm).report.failed
    assert everything_below(folder) == {"only.pt", "ids.tsv", "provenance.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_ESM", ".dist_esm"}
    (folder / "thesis").mkdir()
    run = embed_directory(tmp_path / "in", tmp_path / "out", format=Format.fair_esm)
    assert "is no folder of embeddings alone" in run.failure("a.fasta")
    assert (folder / "thesis").is_dir()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_ESM", ".dist_esm"}


def test_h5_is_flat_in_file_order_and_says_the_ids(tmp_path):
    with h5py.File(embed(tmp_path, Format.h5), "r") as file:
        assert file.attrs["model_name"] == ""  # the stand-in has no provenance
        names = list(file)
        assert all(isinstance(dataset, h5py.Dataset) for dataset in file.values())
        assert (names[0], names[1], names[4:8]) == (
            "sp|P12345|X_Y",
            "a%2Fb",
            ["twin", "twin~2", "TWIN", "twin%7E2"],
        )
        for i, (dataset, residues) in enumerate(zip(file.values(), SEQUENCES, strict=True)):
            assert_same(dataset[()], vector(residues))
            assert (dataset.attrs["original_id"], dataset.attrs["index"], dataset.attrs["length"]) == (
                IDS[i],
                i,
                len(residues),
            )
        assert [unquote(re.sub("~[0-9]+$", "", name)) for name in names] == IDS


def test_h5_with_residues_has_them_as_datasets_and_vectors_as_attributes(tmp_path):
    with h5py.File(embed(tmp_path, Format.h5, **EVERYTHING), "r") as file:
        assert (file.attrs["kind"], file.attrs["layer"]) == ("per_tok", 1)
        for dataset, residues in zip(file.values(), SEQUENCES, strict=True):
            assert_same(dataset[()], rows(residues))
            assert_same(dataset.attrs["per_tok_layer_0"], rows(residues, 0))
            for layer in (0, 1):
                assert_same(dataset.attrs[f"mean_layer_{layer}"], vector(residues, layer))
                assert_same(dataset.attrs[f"bos_layer_{layer}"], bos(residues, layer))


@pytest.fixture
def protspace(monkeypatch):
    """ProtSpace's own loader of HDF5. It needs numpy and h5py, the package around it scikit-learn, UMAP and more, so its parents stay unexecuted."""
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
    path, _ = write_output(
        Format.h5,
        made_of(SEQUENCES, PROVENANCE, ids=IDS, dtype=getattr(torch, dtype.name)),
        tmp_path / "a_ESM",
    )
    found = protspace.load_h5([path])
    assert found.name == PROVENANCE["model"]
    assert [unquote(re.sub("~[0-9]+$", "", name)) for name in found.headers] == IDS
    assert_same(found.data, np.arange(len(IDS) * WIDTH, dtype=np.float32).reshape(-1, WIDTH))
    assert protspace.parse_identifier(found.headers[0]) == "P12345"


def test_h5_with_residues_is_refused_by_protspace(tmp_path, protspace):
    with pytest.raises(ValueError, match="looks like per-residue embeddings"):
        protspace.load_h5([embed(tmp_path, Format.h5, include=[Include.mean, Include.per_tok])])


def test_h5_takes_attributes_of_any_size(tmp_path):
    """Residues of a further layer are an attribute, which HDF5 before 1.8 ended at 64 KiB."""
    path = embed(
        tmp_path, Format.h5, text=f">long\n{'MKTAYIAKQR' * 500}\n", truncation_seq_length=None, **EVERYTHING
    )
    assert_same(load(path).residues("long", 0), rows("MKTAYIAKQR" * 500, 0))
    assert path.stat().st_size > 2 * 5000 * WIDTH * 4 > 1 << 17


def test_parquet_through_arrow_polars_pandas_and_duckdb(tmp_path):
    path = embed(tmp_path, Format.parquet, **EVERYTHING)
    schema = pq.read_schema(path)
    for name in ("mean_layer_0", "mean_layer_1", "bos_layer_0", "bos_layer_1"):
        assert schema.field(name).type == pa.list_(pa.float32(), WIDTH)  # LanceDB searches no other
        for got in (
            np.stack(pq.read_table(path)[name].to_pylist()).astype(np.float32),
            polars.read_parquet(path)[name].to_numpy(),
            np.stack(pandas.read_parquet(path)[name].to_numpy()),
            np.stack(duckdb.sql(f"select {name} from '{path}'").fetchnumpy()[name]).astype(np.float32),
        ):
            of, layer = (vector if name.startswith("mean") else bos), int(name[-1])
            assert_same(got, np.stack([of(residues, layer) for residues in SEQUENCES]))
    assert schema.field("per_tok_layer_1").type == pa.list_(pa.list_(pa.float32(), WIDTH))
    frame = polars.read_parquet(path)
    assert (frame["id"].to_list(), frame["index"].to_list()) == (IDS, list(range(len(IDS))))
    assert frame.schema["mean_layer_1"] == polars.Array(polars.Float32, WIDTH)
    for got, residues in zip(frame["per_tok_layer_1"], SEQUENCES, strict=True):
        assert_same(got.to_numpy(), rows(residues))
    columns = "embedded, length, outcome, upper_cased, stops_removed, gaps_removed, replaced, source"
    (soft,) = duckdb.sql(f"select {columns} from '{path}' where id = 'soft'").fetchall()
    assert soft == (5, 5, "ok", 5, 1, 1, 0, "a.fasta")
    group = pq.ParquetFile(path).metadata.row_group(0)
    codecs = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert {codec for name, codec in codecs.items() if "_layer_" in name} == {"UNCOMPRESSED"}
    assert {codec for name, codec in codecs.items() if "_layer_" not in name} == {"ZSTD"}


@pytest.mark.parametrize("dtype", SaveDtype)
def test_parquet_through_hugging_face_datasets(tmp_path, dtype):
    datasets = pytest.importorskip(
        "datasets", reason="Hugging Face datasets is not installed: pip install datasets"
    )
    path = embed(tmp_path, Format.parquet, save_dtype=dtype, **EVERYTHING)
    table = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert (table["id"][:], table["header"][:]) == (IDS, HEADERS)
    assert table.features["mean_layer_1"] == datasets.List(datasets.Value(dtype.name), length=WIDTH)
    # Its NumPy and torch have float32 for every floating-point number, as its documentation says.
    for i, (row, residues) in enumerate(zip(table.with_format("numpy"), SEQUENCES, strict=True)):
        for layer in (0, 1):
            assert_same(
                row[f"mean_layer_{layer}"], vector(residues, layer).astype(dtype.name).astype(np.float32)
            )
            assert_same(row[f"bos_layer_{layer}"], bos(residues, layer).astype(dtype.name).astype(np.float32))
            assert_same(
                row[f"per_tok_layer_{layer}"], rows(residues, layer).astype(dtype.name).astype(np.float32)
            )
        assert_same(table.with_format("torch")[i]["mean_layer_1"], row["mean_layer_1"])


def test_parquet_through_lance_which_searches_it(tmp_path):
    lance = pytest.importorskip("lance", reason="Lance is not installed: pip install pylance")
    table = pq.read_table(embed(tmp_path, Format.parquet, **EVERYTHING))
    there = lance.write_dataset(table, tmp_path / "a.lance")
    assert there.schema.field("mean_layer_1").type == pa.list_(pa.float32(), WIDTH)
    assert there.to_table().equals(table)
    for i in (0, 3, len(IDS) - 1):
        found = there.to_table(nearest={"column": "mean_layer_1", "q": vector(SEQUENCES[i]), "k": 1})
        assert (found["id"].to_pylist(), found["_distance"].to_pylist()) == ([IDS[i]], [0])


@pytest.mark.parametrize("dtype", SaveDtype)
def test_parquet_through_lancedb_which_searches_it(tmp_path, dtype):
    lancedb = pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install lancedb")
    path = embed(tmp_path, Format.parquet, save_dtype=dtype, **EVERYTHING)
    table = lancedb.connect(tmp_path / "db").create_table("proteins", pq.read_table(path))
    for i in (0, 3, len(IDS) - 1):
        wanted = vector(SEQUENCES[i]).astype(dtype.name)
        (found,) = table.search(wanted, vector_column_name="mean_layer_1").limit(1).to_list()
        assert (found["id"], found["header"], found["_distance"]) == (IDS[i], HEADERS[i], 0)
        assert_same(np.array(found["mean_layer_1"], dtype.name), wanted)


def test_parquet_row_groups_are_cut_by_bytes_and_hold_whole_proteins(tmp_path, monkeypatch):
    monkeypatch.setattr(formats_parquet, "GROUP_BYTES", 2000)
    path = embed(tmp_path, Format.parquet, **EVERYTHING)
    file = pq.ParquetFile(path)
    assert 3 < file.num_row_groups < len(IDS)
    back = load(path)
    for i in (len(IDS) - 1, 0, 9, 10, 3):
        assert_same(back[i], vector(SEQUENCES[i]))
        assert_same(back.residues(i), rows(SEQUENCES[i]))
    assert_same(back.vectors, np.stack([vector(residues) for residues in SEQUENCES]))
    monkeypatch.setattr(formats_parquet, "GROUP_ROWS", 2)
    monkeypatch.setattr(formats_parquet, "GROUP_BYTES", 1 << 30)
    write_output(Format.parquet, made_of(SEQUENCES[:5]), tmp_path / "b")
    meta = pq.ParquetFile(tmp_path / "b.parquet").metadata
    assert [meta.row_group(group).num_rows for group in range(meta.num_row_groups)] == [2, 2, 1]


def test_safetensors_through_its_own_library(tmp_path):
    with safe_open(embed(tmp_path, Format.safetensors, **EVERYTHING), framework="numpy") as file:
        said = file.metadata()
        assert (json.loads(said["ids"]), json.loads(said["lengths"])) == (
            IDS,
            [len(residues) for residues in SEQUENCES],
        )
        assert json.loads(said["headers"]) == HEADERS
        offsets = file.get_tensor("offsets")
        assert_same(offsets, np.cumsum([0, *(len(residues) for residues in SEQUENCES)]))
        assert set(file.keys()) == {
            "offsets",
            *(f"{kind}.{layer}" for kind in ("mean", "bos", "per_tok") for layer in (0, 1)),
        }
        for layer in (0, 1):
            assert_same(
                file.get_tensor(f"mean.{layer}"),
                np.stack([vector(residues, layer) for residues in SEQUENCES]),
            )
            assert_same(
                file.get_tensor(f"bos.{layer}"), np.stack([bos(residues, layer) for residues in SEQUENCES])
            )
            for i, residues in enumerate(SEQUENCES):
                assert_same(
                    file.get_slice(f"per_tok.{layer}")[offsets[i] : offsets[i + 1]], rows(residues, layer)
                )


def test_safetensors_refuses_a_header_that_the_library_would_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_esm.outputs.formats.safetensors.MAX_HEADER", 600)
    with pytest.raises(ValueError, match="lower max_proteins_per_output"):
        write_output(Format.safetensors, made_of(SEQUENCES), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Through `dist_esm.load`, the same for every format.


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize(
    "settings",
    [EVERYTHING, {"include": [Include.per_tok]}, {"include": [Include.bos]}, {}],
    ids=["all", "per_tok", "bos", "mean"],
)
def test_load_gives_back_what_went_in(tmp_path, kind, settings):
    back = load(embed(tmp_path, kind, **settings))
    assert (len(back), back.ids, back.lengths) == (len(IDS), IDS, [len(residues) for residues in SEQUENCES])
    assert back.headers == HEADERS
    assert set(back.sources) == {"a.fasta"}
    assert_same(back.vectors, np.stack([vector(residues) for residues in SEQUENCES]))
    for i, residues in enumerate(SEQUENCES):
        assert_same(back[i], vector(residues))
        assert_same(back[IDS[i]], vector(SEQUENCES[IDS.index(IDS[i])]))
    assert_same(back[-1], vector(SEQUENCES[-1]))
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
            assert_same(back.residues(i), rows(residues))
        assert_same(back.residues("../../evil"), rows("MKTA"))
    else:
        with pytest.raises(
            ValueError, match=r"per_tok of layer 1 is not there, but mean of layer 1.*include=\[per_tok\]"
        ):
            back.residues(0)
    if Include.bos in include:
        assert_same(back.vectors_of("bos", 1), np.stack([bos(residues) for residues in SEQUENCES]))
    if settings is EVERYTHING:
        assert_same(back.vectors_of("mean", 0), np.stack([vector(residues, 0) for residues in SEQUENCES]))
        assert_same(back.vectors_of("bos", 0), np.stack([bos(residues, 0) for residues in SEQUENCES]))
        assert_same(back.residues("a/b", 0), rows("MK", 0))
    with pytest.raises(ValueError, match="mean of layer 7 is not there"):
        back.vectors_of("mean", 7)
    assert_same(pickle.loads(pickle.dumps(back))[3], vector("GGG"))


@pytest.mark.parametrize("kind", Format)
def test_half_precision_is_saved_as_such_and_read_as_float32(tmp_path, kind):
    path = embed(tmp_path, kind, save_dtype=SaveDtype.float16, **EVERYTHING)
    back = load(path)
    assert_same(
        back.vectors,
        np.stack([vector(residues) for residues in SEQUENCES]).astype(np.float16).astype(np.float32),
    )
    for i, residues in enumerate(SEQUENCES):
        assert_same(back.residues(i), rows(residues).astype(np.float16).astype(np.float32))
    if kind is Format.parquet:
        assert pq.read_schema(path).field("mean_layer_1").type == pa.list_(pa.float16(), WIDTH)
        assert_same(
            np.stack(pandas.read_parquet(path)["mean_layer_1"].to_numpy()),
            np.stack([vector(s) for s in SEQUENCES]).astype(np.float16),
        )
    elif kind is Format.h5:
        with h5py.File(path, "r") as file:
            assert file["con"].dtype == file["con"].attrs["mean_layer_1"].dtype == np.float16
    elif kind is Format.safetensors:
        with safe_open(path, framework="numpy") as file:
            assert file.get_tensor("per_tok.1").dtype == np.float16


@pytest.mark.parametrize("kind", Format)
def test_a_file_without_proteins_has_an_output_of_the_right_shape(tmp_path, kind):
    path = embed(tmp_path, kind, text="", **EVERYTHING)
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
    """A file that was cut and joined, one in numbered parts, an empty one, one in a folder, and the same ids in several files."""
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
        inputs, tmp_path / "out", format=kind, include=ALL, unit_share=0.05, max_proteins_per_output=10
    )
    write_report(run.report, tmp_path / "out")
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
    assert_same(back.vectors, np.stack([vector(residues) for residues in everything]))
    for i in (0, 48, 20, 9, 10, 11):
        assert_same(back[i], vector(everything[i]))
        assert_same(back.residues(i), rows(everything[i]))
    assert back.positions("p0") == [0, 9, 39]
    parts = [load(tmp_path / "out" / output).ids for output in run.report.files[2].outputs]
    assert [protein for ids in parts for protein in ids] == [f"p{i}" for i in range(30)]


@pytest.mark.parametrize("kind", [Format.fair_esm, Format.h5, Format.parquet, Format.safetensors])
def test_a_file_that_was_cut_and_joined_has_the_bytes_of_the_file_uncut(tmp_path, monkeypatch, kind):
    """`pt` alone keeps the residues of each piece apart; its content is compared in test_intake.py."""
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    monkeypatch.setattr(
        "dist_esm.outputs.formats.parquet.GROUP_BYTES", 1 << 14
    )  # groups begin and end within pieces
    (tmp_path / "a.fasta").write_text(
        "".join(f">p{i}\n{'ACDEFGHIKL' * (1 + i * 7 % 5)}\n" for i in range(40))
    )
    found = []
    for share in (1.0, 0.1):
        run = embed_directory(
            tmp_path / "a.fasta", tmp_path / str(share), format=kind, include=ALL, unit_share=share
        )
        assert (run.report.files[0].units > 1) == (share < 1)
        (output,) = (tmp_path / str(share) / name for name in run.report.files[0].outputs)
        found.append(
            {path.name: path.read_bytes() for path in (output.iterdir() if output.is_dir() else [output])}
        )
    assert found[0] == found[1]


def made_of(sequences, provenance=None, width=WIDTH, ids=None, dtype=torch.float32) -> OutputTable:
    """OutputTable as the collector hands them to a writer."""
    found = [
        Row(ids[i] if ids else f"p{i}", f"p{i} header", i, len(residues), len(residues), "ok", 0, 0, 0, 0)
        for i, residues in enumerate(sequences)
    ]
    mean = torch.arange(len(found) * width, dtype=dtype).reshape(-1, width)
    return OutputTable("in.fasta", provenance or {}, ["mean"], 33, found, {33: mean}, {}, {}, [])


PROVENANCE = {
    "model": "esm2_t33_650M_UR50D",
    "weights": "sha256:0123",
    "layers": [33],
    "dtype": "bf16",
    "truncation_seq_length": None,
    "dist_esm": "0.1.0",
}


@pytest.mark.parametrize("kind", Format)
def test_every_output_says_where_its_numbers_come_from_and_is_the_same_bytes_each_time(tmp_path, kind):
    found = []
    for name in ("one", "two"):
        path, _ = write_output(kind, made_of(SEQUENCES, PROVENANCE), tmp_path / name / "a_ESM")
        assert load(path).provenance == PROVENANCE
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found.append({file.name: file.read_bytes() for file in files})
        time.sleep(1.1 if kind is Format.h5 and name == "one" else 0)
    assert found[0] == found[1]
    if kind is Format.h5:
        with h5py.File(path, "r") as file:
            assert (file.attrs["model_name"], json.loads(file.attrs["provenance"])) == (
                "esm2_t33_650M_UR50D",
                PROVENANCE,
            )
    elif kind is Format.parquet:
        assert json.loads(pq.read_schema(path).metadata[b"provenance"]) == PROVENANCE
    elif kind is Format.safetensors:
        with safe_open(path, framework="numpy") as file:
            assert json.loads(file.metadata()["provenance"]) == PROVENANCE
    elif kind is Format.fair_esm:
        assert json.loads((path / "provenance.json").read_text())["provenance"] == PROVENANCE
    else:
        assert torch.load(path, weights_only=True)["provenance"] == PROVENANCE


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize("num_proteins", [0, 3, 3000])
def test_the_checksum_that_is_taken_while_writing_is_that_of_the_file(tmp_path, kind, num_proteins):
    """Smaller and larger than what is buffered."""
    output = write_output(kind, made_of(["MKT"] * num_proteins, width=160), tmp_path / "a_ESM")
    assert (output.sha256 is None) == (kind in (Format.h5, Format.fair_esm))
    written = written_file(tmp_path, output)
    assert written == fingerprint(tmp_path, output.path.relative_to(tmp_path))
    if output.path.is_file():
        assert written.sha256 == hashlib.sha256(output.path.read_bytes()).hexdigest()


def test_what_was_summed_cannot_be_written_over(tmp_path):
    with SummedFile(tmp_path / "a") as file:
        file.write(b"abc")
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    assert file.sha256() == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("kind", [Format.pt, Format.parquet, Format.safetensors])
def test_a_file_of_ten_thousand_proteins_is_no_larger_than_its_numbers(tmp_path, kind):
    path, _ = write_output(kind, made_of(["M"] * 10_000, width=320), tmp_path / "a_ESM")
    size = 10_000 * 320 * 4
    assert size < path.stat().st_size < 1.12 * size  # pickled, a tensor of a list takes about 100 bytes
    back = load(path)
    assert_same(back["p7000"], np.arange(7000 * 320, 7001 * 320, dtype=np.float32))
    assert_same(back.vectors, np.arange(10_000 * 320, dtype=np.float32).reshape(-1, 320))


@pytest.mark.parametrize("kind", Format)
def test_a_writer_that_fails_leaves_nothing_and_what_was_there_stays(tmp_path, kind):
    path, _ = write_output(kind, made_of(SEQUENCES), tmp_path / "a_ESM")
    before = everything_below(tmp_path)
    cannot_be_saved = made_of(SEQUENCES[:3], {"model": lambda: 0})
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        write_output(kind, cannot_be_saved, tmp_path / "a_ESM")
    assert everything_below(tmp_path) == before
    assert len(load(path)) == len(SEQUENCES)


# What is no output, in one line.


def test_what_is_no_output_is_refused_with_path_and_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for suffix, _ in WRITERS.values():
        if suffix:
            (tmp_path / f"torn{suffix}").write_bytes(b"\x10 this is torn")
    torch.save({"proteins": ["a"], "data": [torch.zeros(3)]}, tmp_path / "other.pt")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text("{}")
    for name, remedy in {
        "nowhere": "is not there: name an output_dir",
        "empty": "neither a report.json nor an ids.tsv",
        "notes.txt": r"is no output of dist_esm: name an output_dir, or a file that ends in .pt, .h5",
        "bad": "report.json is no report of dist_esm",
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
        write_output(Format.pt, made_of(SEQUENCES, provenance), tmp_path / name)
    (tmp_path / "report.json").write_text(
        json.dumps({"files": [{"outputs": ["a.pt"]}, {"outputs": ["b.pt"]}]})
    )
    with pytest.raises(ValueError, match=r"b.pt and .*a.pt were made under different settings"):
        load(tmp_path).vectors  # noqa: B018 - read for its error
    os.unlink(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt is not there or not whole: run again"):
        load(tmp_path).ids  # noqa: B018 - read for its error


def test_a_run_without_outputs_is_empty_and_says_so(tmp_path):
    (tmp_path / "report.json").write_text('{"files": []}')
    back = load(tmp_path)
    assert (len(back), back.ids, back.lengths) == (0, [], [])
    with pytest.raises(ValueError, match=r"no outputs.*see failed_files.txt"):
        back.vectors  # noqa: B018 - read for its error


@pytest.mark.parametrize(
    ("kind", "package"),
    [(Format.h5, "h5py"), (Format.parquet, "pyarrow"), (Format.safetensors, "safetensors")],
)
def test_a_format_whose_package_is_missing_is_refused_before_any_work(tmp_path, monkeypatch, kind, package):
    path, _ = write_output(kind, made_of(SEQUENCES), tmp_path / "a")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)  # as Python has a package that cannot be imported
    with pytest.raises(
        ValueError, match=rf"format={kind.name} needs {package}: pip install 'dist_esm\[formats\]'"
    ):
        check(make_config("in", tmp_path, format=kind))
    with pytest.raises(ValueError, match=rf"reading .*a.{kind.name} needs {package}.*: pip install"):
        len(load(path))


def test_importing_the_package_imports_neither_torch_nor_a_format_and_opening_reads_no_output(tmp_path):
    write_output(Format.pt, made_of(SEQUENCES), tmp_path / "a")
    (tmp_path / "report.json").write_text(json.dumps({"files": [{"outputs": ["gone.pt"]}]}))
    code = (
        "import sys, dist_esm; heavy = {'torch', 'h5py', 'pyarrow', 'safetensors'}; assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        f"dist_esm.load({str(tmp_path)!r}); assert not heavy - {{'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
