"""Promises of every format: provenance, checksums, sizes, and nothing left when writing fails."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
import types
from enum import Enum

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from dist_esm import load
from dist_esm.atomic import commit_together
from dist_esm.checksum import read_back
from dist_esm.config import Format, check
from dist_esm.outputs.formats.base import About, Codec
from dist_esm.outputs.formats.registry import FORMATS, OutputFormat
from dist_esm.outputs.formats.write import write_output
from helpers.compare import assert_same
from helpers.outputs import PROVENANCE, SEQUENCES, everything_below, table_of, write_table
from helpers.standin import make_config


@pytest.mark.parametrize("kind", Format)
def test_every_output_says_where_its_numbers_come_from_and_is_the_same_bytes_each_time(tmp_path, kind):
    found = []
    for name in ("one", "two"):
        path = write_table(kind, table_of(SEQUENCES, PROVENANCE), tmp_path / name / "a_ESM")
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
    elif kind in (Format.fair_esm, Format.npy):
        assert json.loads((path / "provenance.json").read_text())["provenance"] == PROVENANCE
    else:
        assert torch.load(path, weights_only=True)["provenance"] == PROVENANCE


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize("num_proteins", [0, 3, 3000])
def test_the_checksum_that_is_taken_while_writing_is_that_of_the_file(tmp_path, kind, num_proteins):
    """Smaller and larger than what is buffered."""
    (tmp_path / "scratch").mkdir()
    table = table_of(["MKT"] * num_proteins, width=160)
    staged = write_output(kind, table, tmp_path / "a_ESM", tmp_path / "scratch")
    assert staged.checksum is not None
    assert not staged.path.exists()
    (written,) = commit_together([staged], tmp_path)
    assert written == read_back(tmp_path, staged.path.relative_to(tmp_path))
    if staged.path.is_file() and written.num_bytes <= 1 << 18:
        assert written.sha256 == hashlib.sha256(staged.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [Format.pt, Format.parquet, Format.safetensors])
def test_a_file_of_ten_thousand_proteins_is_no_larger_than_its_numbers(tmp_path, kind):
    path = write_table(kind, table_of(["M"] * 10_000, width=320), tmp_path / "a_ESM")
    size = 10_000 * 320 * 4
    assert size < path.stat().st_size < 1.12 * size  # pickled, a tensor of a list takes about 100 bytes
    back = load(path)
    assert_same(back["p7000"], np.arange(7000 * 320, 7001 * 320, dtype=np.float32))
    assert_same(back.vectors, np.arange(10_000 * 320, dtype=np.float32).reshape(-1, 320))


@pytest.mark.parametrize("kind", Format)
def test_a_writer_that_fails_leaves_nothing_and_what_was_there_stays(tmp_path, kind):
    path = write_table(kind, table_of(SEQUENCES), tmp_path / "a_ESM")
    before = everything_below(tmp_path)
    cannot_be_saved = table_of(SEQUENCES[:3], {"model": lambda: 0})
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        write_table(kind, cannot_be_saved, tmp_path / "a_ESM")
    assert everything_below(tmp_path) == before
    assert len(load(path)) == len(SEQUENCES)


@pytest.mark.parametrize(
    ("kind", "package"),
    [(Format.h5, "h5py"), (Format.parquet, "pyarrow")],
)
def test_a_format_whose_package_is_missing_is_refused_before_any_work(tmp_path, monkeypatch, kind, package):
    path = write_table(kind, table_of(SEQUENCES), tmp_path / "a")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)  # as Python has a package that cannot be imported
    with pytest.raises(
        ValueError, match=rf"format={kind.name} needs {package}: pip install 'dist_esm\[formats\]'"
    ):
        check(make_config("in", tmp_path, format=kind))
    with pytest.raises(ValueError, match=rf"reading .*a.{kind.name} needs {package}.*: pip install"):
        len(load(path))


def test_a_new_format_is_one_module_and_one_line(tmp_path, monkeypatch):
    """A format of vectors alone: written, committed, told by its suffix and loaded."""
    module = types.ModuleType("dist_esm.outputs.formats.vectors")

    def write_vectors(table, path):
        with open(path, "wb") as file:
            np.save(file, table.mean[table.main_layer].numpy())

    class OpenedVectors:
        def __init__(self, path):
            self.rows = np.load(path)
            self.about = About("in.fasta", 33, self.rows.shape[1], {"mean": [33]}, {})

            self.num_proteins = len(self.rows)

        def vectors(self, kind, layer, start=0, stop=None):
            return self.rows[start:stop]

    module.CODEC = Codec(write_vectors, OpenedVectors)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FORMATS, "vectors", OutputFormat("vectors", ".npy"))
    path = write_table(Enum("Format", ["vectors"]).vectors, table_of(SEQUENCES), tmp_path / "a_ESM")
    assert path == tmp_path / "a_ESM.npy"
    assert_same(load(path).vectors, table_of(SEQUENCES).mean[33].numpy())


def test_the_names_of_formats_are_known_without_what_writes_them():
    """Torch takes seconds to import; help and mistyped keys must not wait for it."""
    code = (
        "import sys; from dist_esm.config import Format;"
        "from dist_esm.outputs.formats.registry import FORMATS, package_of;"
        "assert [member.value for member in Format] == list(FORMATS) and Format.pt.name == 'pt';"
        "assert package_of('h5') == 'h5py' and package_of('pt') is None;"
        "assert not {'torch', 'h5py', 'pyarrow', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
