"""What a run writes, by the process's own counter.

`wchar` of /proc/self/io is what the process gave to the system to write. `write_bytes` is what went on to a
disk, and is zero on tmpfs and late or doubled on others; nothing here writes through a map, which `wchar`
would not see.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dist_esm.atomic import size_of
from dist_esm.config import Format, Include, ModelConfig, SaveDtype
from dist_esm.distributed import World
from dist_esm.jobs.embed import run
from dist_esm.outputs.row_buffer import Memory
from dist_esm.types import Pack, SegmentEmbedding
from helpers.standin import ReportRead, StandIn, make_config

WIDTH = 1280
MOST = {
    Format.pt: 1.05,
    Format.h5: 1.05,
    Format.safetensors: 1.05,
    Format.npy: 1.05,
    Format.fair_esm: 1.1,
    Format.parquet: 1.1,
}


class Wide(StandIn):
    """A stand-in whose rows are as wide as those of the 650M model."""

    def run(self, pack: Pack, num_rows: int | None = None) -> list[SegmentEmbedding]:
        def widen(rows: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
            return {layer: np.resize(values, (*values.shape[:-1], WIDTH)) for layer, values in rows.items()}

        return [
            SegmentEmbedding(widen(answer.sums), widen(answer.bos), {
                layer: values.astype(np.float16) for layer, values in widen(answer.rows).items()
            })
            for answer in super().run(pack, num_rows)
        ]  # fmt: skip


def written_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def share_written(tmp_path: Path, text: str, **settings) -> float:
    """Embed one file, and return the bytes that were written for each byte of output."""
    (tmp_path / "a.fasta").write_text(text)
    config = make_config(str(tmp_path / "a.fasta"), tmp_path / "out", **settings)
    config = replace(config, model=ModelConfig("stand-in", 1, WIDTH, 20, "random"), dedupe=False)
    wants_rows = Include.per_tok in config.include
    before = written_so_far()
    run(config, World(None, 0, 1, 0, 1), lambda *_: Wide([1], wants_rows, 20_000))  # type: ignore[arg-type, return-value]
    written = written_so_far() - before
    report = ReportRead.of(config.output_dir)
    (file,) = report.files
    assert report.status == "complete"
    return written / sum(size_of(config.output_dir / output) for output in file.outputs)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no counters of written bytes")
@pytest.mark.parametrize("include", [Include.mean, Include.per_tok], ids=lambda kind: kind.name)
@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.name)
def test_a_file_that_is_cut_is_written_once(tmp_path, kind, include):
    num_proteins = 3000 if include is Include.mean else 200
    text = "".join(
        f">sp|P{i:05d}|X_Y a protein of some family OS=Homo sapiens\n{'ACDEFGHIKL' * (10 + i % 40)}\n"
        for i in range(num_proteins)
    )
    settings = {"include": [include], "format": kind, "save_dtype": SaveDtype.float16, "unit_share": 0.1}
    share = share_written(tmp_path, text, **settings)
    assert 1 <= share < MOST[kind]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no counters of written bytes")
@pytest.mark.parametrize(
    "kind", [Format.pt, Format.safetensors, Format.npy, Format.h5], ids=lambda kind: kind.name
)
def test_an_output_larger_than_memory_is_written_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dist_esm.planning.layout.LARGE_BYTES", 0)
    monkeypatch.setattr("dist_esm.pipeline.worker.Memory", partial(Memory, 0))
    monkeypatch.setattr("dist_esm.outputs.row_buffer.KEPT_BYTES", 0)
    text = "".join(f">sp|P{i:05d}|X_Y\n{'ACDEFGHIKL' * (10 + i % 40)}\n" for i in range(200))
    settings = {"include": [Include.per_tok], "format": kind, "save_dtype": SaveDtype.float16}
    assert 1 <= share_written(tmp_path, text, **settings) < 1.05
