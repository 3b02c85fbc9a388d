"""What is given to the system to write, beside what is there in the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from dist_esm.atomic import size_of
from dist_esm.config import Compression, Format, Include, ReportKind
from dist_esm.distributed import World
from dist_esm.outputs.row_buffer import Memory
from helpers.command import HELPERS, run_ranks
from helpers.written import MOST, bytes_written, fasta, share_of, so_far

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no counters of written bytes")


def name_of(value: object) -> str:
    return getattr(value, "name", str(value))


def share_written(tmp_path: Path, num_proteins: int, **settings) -> float:
    """Embed one file with one rank, and return the bytes that were written for each byte of output."""
    path, out = tmp_path / "a.fasta", tmp_path / "out"
    path.write_text(fasta(num_proteins))
    return share_of(bytes_written(path, out, World(None, 0, 1, 0, 1), **settings), out)


@pytest.mark.parametrize(
    ("include", "num_proteins"), [(Include.mean, 3000), (Include.per_tok, 200)], ids=name_of
)
@pytest.mark.parametrize("kind", list(Format), ids=name_of)
def test_a_file_that_is_cut_is_written_once(tmp_path, kind, include, num_proteins):
    settings = {"include": [include], "format": kind, "unit_share": 0.1}
    assert 1 <= share_written(tmp_path, num_proteins, **settings) < MOST[kind]


@pytest.mark.parametrize("kind", list(Format), ids=name_of)
def test_residues_of_several_layers_are_written_once(tmp_path, kind):
    settings = {"include": [Include.mean, Include.bos, Include.per_tok], "repr_layers": [0, 1, 2]}
    assert 1 <= share_written(tmp_path, 100, format=kind, unit_share=0.1, **settings) < MOST[kind]


@pytest.mark.parametrize(("unit_share", "most"), [(1.0, 1.05), (0.1, 1.5)], ids=["uncut", "cut"])
def test_vectors_that_are_attributes_of_an_h5_are_written_twice_and_no_more(tmp_path, unit_share, most):
    """They are part of what HDF5 writes of each protein, whose place depends on all proteins before it."""
    settings = {"format": Format.h5, "include": [Include.mean, Include.bos]}
    share = share_written(tmp_path, 1000, unit_share=unit_share, **settings)
    assert most - 0.1 < share < most


@pytest.mark.distributed
@pytest.mark.parametrize("kind", list(Format), ids=name_of)
def test_two_ranks_write_no_more_than_one(tmp_path, kind):
    """Means of one format, residues of the next: each launch takes seconds."""
    include, num_proteins = [("mean", 3000), ("per_tok", 200)][list(Format).index(kind) % 2]
    (tmp_path / "a.fasta").write_text(fasta(num_proteins))
    out = tmp_path / "out"
    words = [tmp_path / "a.fasta", out, kind.name, include]
    result = run_ranks(2, *words, script=HELPERS / "written.py")
    assert result.returncode == 0, result.stderr
    by_rank = [int(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)]
    assert min(by_rank) > 0
    assert 1 <= share_of(sum(by_rank), out) < MOST[kind]


@pytest.mark.parametrize("unit_share", [1.0, 0.3], ids=["uncut", "cut"])
@pytest.mark.parametrize("memory", [0, 3 << 20])
@pytest.mark.parametrize("kind", list(Format), ids=name_of)
def test_an_output_larger_than_memory_is_written_once(tmp_path, monkeypatch, kind, memory, unit_share):
    """It may be larger by so much that not one protein finds room, or that some do."""
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, memory))
    monkeypatch.setattr("dist_esm.outputs.row_buffer.KEPT_BYTES", 0)
    settings = {"include": [Include.per_tok], "format": kind}
    share = share_written(tmp_path, 200, unit_share=unit_share, **settings)
    assert 1 <= share < MOST[kind]


@pytest.mark.parametrize("kind", [kind for kind in Format if kind is not Format.fair_esm], ids=name_of)
def test_an_output_larger_than_memory_is_moved_where_files_have_no_second_names(tmp_path, monkeypatch, kind):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 0))
    settings = {"include": [Include.per_tok], "format": kind}
    assert 1 <= share_written(tmp_path, 200, unit_share=1.0, **settings) < MOST[kind]


@pytest.mark.parametrize(("unit_share", "most"), [(1.0, 1.1), (0.1, 2.1)], ids=["uncut", "cut"])
def test_compressed_numbers_of_a_file_that_is_cut_are_written_twice_and_no_more(tmp_path, unit_share, most):
    """Where they belong is known when all before them are compressed."""
    settings = {"format": Format.parquet, "compression": Compression.zstd, "include": [Include.per_tok]}
    share = share_written(tmp_path, 200, unit_share=unit_share, **settings)
    assert most - 0.2 < share < most


@pytest.mark.parametrize("kind", list(Format), ids=name_of)
def test_what_was_written_is_not_read_again(tmp_path, kind):
    """Checksums are taken while there is still something to do for the device."""
    before = so_far("rchar")
    settings = {"include": [Include.per_tok], "format": kind, "report": ReportKind.json}
    share_written(tmp_path, 400, unit_share=0.1, **settings)
    (output,) = (path for path in (tmp_path / "out").iterdir() if path.name.startswith("a_ESM"))
    assert so_far("rchar") - before < 0.05 * size_of(output)
