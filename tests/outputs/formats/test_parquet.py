"""format=parquet through the libraries that its users read it with."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations_with_replacement

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_esm import load
from dist_esm.config import Compression, Format, SaveDtype, check
from dist_esm.outputs.formats import parquet as formats_parquet
from dist_esm.outputs.formats import parquet_pages
from dist_esm.outputs.formats.base import Place
from dist_esm.outputs.formats.parquet import PagesInPlace
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
from helpers.standin import WIDTH, make_config


def test_parquet_through_arrow_polars_pandas_and_duckdb(tmp_path):
    path = embed_text(tmp_path, Format.parquet, **EVERYTHING)
    schema = pq.read_schema(path)
    for name in ("mean_layer_0", "mean_layer_1", "bos_layer_0", "bos_layer_1"):
        assert schema.field(name).type == pa.list_(pa.float32(), WIDTH)  # LanceDB searches no other
        for got in (
            np.stack(pq.read_table(path)[name].to_pylist()).astype(np.float32),
            polars.read_parquet(path)[name].to_numpy(),
            np.stack(pandas.read_parquet(path)[name].to_numpy()),
            np.stack(duckdb.sql(f"select {name} from '{path}'").fetchnumpy()[name]).astype(np.float32),
        ):
            of, layer = (expected_mean if name.startswith("mean") else expected_bos), int(name[-1])
            assert_same(got, np.stack([of(residues, layer) for residues in SEQUENCES]))
    assert schema.field("per_tok_layer_1").type == pa.list_(pa.list_(pa.float32(), WIDTH))
    frame = polars.read_parquet(path)
    assert (frame["id"].to_list(), frame["index"].to_list()) == (IDS, list(range(len(IDS))))
    assert frame.schema["mean_layer_1"] == polars.Array(polars.Float32, WIDTH)
    for got, residues in zip(frame["per_tok_layer_1"], SEQUENCES, strict=True):
        assert_same(got.to_numpy(), expected_rows(residues))
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
    path = embed_text(tmp_path, Format.parquet, save_dtype=dtype, **EVERYTHING)
    table = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert (table["id"][:], table["header"][:]) == (IDS, HEADERS)
    assert table.features["mean_layer_1"] == datasets.List(datasets.Value(dtype.name), length=WIDTH)
    # Its NumPy and torch have float32 for every floating-point number, as its documentation says.
    for i, (row, residues) in enumerate(zip(table.with_format("numpy"), SEQUENCES, strict=True)):
        for layer in (0, 1):
            assert_same(
                row[f"mean_layer_{layer}"],
                expected_mean(residues, layer).astype(dtype.name).astype(np.float32),
            )
            assert_same(
                row[f"bos_layer_{layer}"], expected_bos(residues, layer).astype(dtype.name).astype(np.float32)
            )
            assert_same(
                row[f"per_tok_layer_{layer}"],
                expected_rows(residues, layer).astype(dtype.name).astype(np.float32),
            )
        assert_same(table.with_format("torch")[i]["mean_layer_1"], row["mean_layer_1"])


def test_parquet_through_lance_which_searches_it(tmp_path):
    lance = pytest.importorskip("lance", reason="Lance is not installed: pip install pylance")
    table = pq.read_table(embed_text(tmp_path, Format.parquet, **EVERYTHING))
    there = lance.write_dataset(table, tmp_path / "a.lance")
    assert there.schema.field("mean_layer_1").type == pa.list_(pa.float32(), WIDTH)
    assert there.to_table().equals(table)
    for i in (0, 3, len(IDS) - 1):
        found = there.to_table(nearest={"column": "mean_layer_1", "q": expected_mean(SEQUENCES[i]), "k": 1})
        assert (found["id"].to_pylist(), found["_distance"].to_pylist()) == ([IDS[i]], [0])


@pytest.mark.parametrize("dtype", SaveDtype)
def test_parquet_through_lancedb_which_searches_it(tmp_path, dtype):
    lancedb = pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install lancedb")
    path = embed_text(tmp_path, Format.parquet, save_dtype=dtype, **EVERYTHING)
    table = lancedb.connect(tmp_path / "db").create_table("proteins", pq.read_table(path))
    for i in (0, 3, len(IDS) - 1):
        wanted = expected_mean(SEQUENCES[i]).astype(dtype.name)
        (found,) = table.search(wanted, vector_column_name="mean_layer_1").limit(1).to_list()
        assert (found["id"], found["header"], found["_distance"]) == (IDS[i], HEADERS[i], 0)
        assert_same(np.array(found["mean_layer_1"], dtype.name), wanted)


LONG_AND_SHORT = ["MK" * 11, "M", "GAVLI", "MKTAYIAKQR" * 3, "MKT", "LK"]


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("dtype", SaveDtype)
def test_parquet_pages_that_end_within_a_protein_are_read_by_all(tmp_path, monkeypatch, dtype, compression):
    """Small limits: a page holds seven vectors, proteins with more are spread over several."""
    vector_bytes = WIDTH * np.dtype(dtype.name).itemsize
    monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 3 * vector_bytes)
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 7 * vector_bytes)
    text = "".join(f">p{i}\n{residues}\n" for i, residues in enumerate(LONG_AND_SHORT))
    path = embed_text(
        tmp_path, Format.parquet, text=text, save_dtype=dtype, compression=compression, **EVERYTHING
    )
    arrow = pq.read_table(path)
    arrow.validate(full=True)
    name = "per_tok_layer_1"
    for got in (
        arrow[name].to_pylist(),
        polars.read_parquet(path)[name].to_list(),
        duckdb.sql(f"select {name} from '{path}'").fetchnumpy()[name],
        pandas.read_parquet(path)[name],
        [load(path).residues(i) for i in range(len(LONG_AND_SHORT))],
    ):
        for rows, residues in zip(got, LONG_AND_SHORT, strict=True):
            assert_same(np.stack(list(rows)).astype(dtype.name), expected_rows(residues).astype(dtype.name))
    group = pq.ParquetFile(path).metadata.row_group(0)
    codecs = {
        group.column(i).compression
        for i in range(group.num_columns)
        if "_layer_" in group.column(i).path_in_schema
    }
    assert codecs == {"ZSTD" if compression is Compression.zstd else "UNCOMPRESSED"}


def test_parquet_says_of_its_columns_what_they_take(tmp_path):
    """Sizes in the footer add up to the file; nothing is left over of what pyarrow wrote in their place."""
    path = write_table(Format.parquet, table_of(["MKT"] * 300, width=640), tmp_path / "a")
    meta = pq.ParquetFile(path).metadata
    (group,) = (meta.row_group(i) for i in range(meta.num_row_groups))
    columns = [group.column(i) for i in range(group.num_columns)]
    assert group.total_byte_size == sum(column.total_uncompressed_size for column in columns)
    assert sum(column.total_compressed_size for column in columns) + meta.serialized_size + 12 == (
        path.stat().st_size
    )
    (numbers,) = (column for column in columns if "_layer_" in column.path_in_schema)
    assert numbers.num_values == 300 * 640
    assert 0 < numbers.total_compressed_size - 300 * 640 * 4 < 300 * 640 * 4 // 100


def test_a_format_that_cannot_compress_is_refused_with_one_that_can(tmp_path):
    for kind in Format:
        config = make_config("in", tmp_path, format=kind, compression=Compression.zstd)
        if kind is Format.parquet:
            check(config)
        else:
            with pytest.raises(
                ValueError, match=f"compression=zstd is not for format={kind.name}: .*format=parquet$"
            ):
                check(config)


def test_parquet_row_groups_are_cut_by_bytes_and_hold_whole_proteins(tmp_path, monkeypatch):
    monkeypatch.setattr(formats_parquet, "GROUP_BYTES", 2000)
    path = embed_text(tmp_path, Format.parquet, **EVERYTHING)
    file = pq.ParquetFile(path)
    assert 3 < file.num_row_groups < len(IDS)
    back = load(path)
    for i in (len(IDS) - 1, 0, 9, 10, 3):
        assert_same(back[i], expected_mean(SEQUENCES[i]))
        assert_same(back.residues(i), expected_rows(SEQUENCES[i]))
    assert_same(back.vectors, np.stack([expected_mean(residues) for residues in SEQUENCES]))
    monkeypatch.setattr(formats_parquet, "GROUP_ROWS", 2)
    monkeypatch.setattr(formats_parquet, "GROUP_BYTES", 1 << 30)
    write_table(Format.parquet, table_of(SEQUENCES[:5]), tmp_path / "b")
    meta = pq.ParquetFile(tmp_path / "b.parquet").metadata
    assert [meta.row_group(group).num_rows for group in range(meta.num_row_groups)] == [2, 2, 1]


def test_nothing_is_left_to_import_when_the_last_output_is_written(tmp_path):
    """pandas alone takes a third of a second, in which no device has anything to do."""
    code = """
import sys
from pathlib import Path
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.formats.base import ContentSize
from dist_esm.outputs.formats.h5 import table_like
codec = FORMATS["parquet"].codec
assert "pandas" not in sys.modules
codec.prepare()
assert "pandas" in sys.modules
before = set(sys.modules)
kinds = {"mean": [1], "bos": [], "per_tok": [1]}
table = table_like(ContentSize(3, 30, 15, 30, ["mean", "per_tok"], kinds, 4, 4), 3)
codec.write(table, Path(sys.argv[1]))
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("lengths", [[], [5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [40, 1]])
def test_what_a_unit_needs_of_a_place_says_what_the_whole_place_says(monkeypatch, lengths):
    """Also for units without a row, at the beginning, between pages and at the end."""
    width, itemsize = 4, 2
    monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 8 * width * itemsize)
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 16 * width * itemsize)
    num_rows, row_bytes = sum(lengths), width * itemsize
    cut = parquet_pages.pages(lengths, 0, num_rows, row_bytes)
    whole = Place("", 4, PagesInPlace(cut, width, itemsize))
    rows = np.arange(num_rows * width, dtype=np.float16).reshape(-1, width)
    for first, stop in combinations_with_replacement(range(num_rows + 1), 2):
        own = whole.around(first, stop - first)
        for row in (first, stop):
            assert own.begin(row, row_bytes) == whole.begin(row, row_bytes)
        assert own.pieces(first, stop - first) == whole.pieces(first, stop - first)
        ours, all_of_it = (
            [block.tobytes() for block in place.blocks(first, [rows[first:stop]])] for place in (own, whole)
        )
        assert ours == all_of_it
    if num_rows == 41:
        assert len(whole.around(0, 1).pages.pages) == 1 < len(cut)
