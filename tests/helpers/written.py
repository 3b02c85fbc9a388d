"""What a run writes, by the process's own counter, with a stand-in as wide as the 650M model.

`wchar` of /proc/self/io is what the process gave to the system to write. `write_bytes` is what went on to a
disk, and is zero on tmpfs and late or doubled on others; nothing here writes through a map, which `wchar`
would not see.

As a script, for torchrun, it is one rank of a run whose bytes test_written_once.py adds up.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_esm.atomic import size_of
from dist_esm.config import Format, Include, ModelConfig, SaveDtype
from dist_esm.distributed import World
from dist_esm.jobs.embed import run
from dist_esm.pipeline.writer_processes import WriterProcesses
from dist_esm.types import Pack, Segment, SegmentEmbedding
from helpers.standin import ReportRead, StandIn, make_config

WIDTH, NUM_LAYERS = 1280, 2
MOST = {
    Format.pt: 1.05,
    Format.h5: 1.05,
    Format.safetensors: 1.05,
    Format.npy: 1.05,
    Format.fair_esm: 1.1,
    Format.parquet: 1.1,
}
"""Bytes that may be written for each byte of output."""


class Wide(StandIn):
    """A stand-in whose rows are as wide as those of the 650M model, and compress no better."""

    noise = np.random.default_rng(0).standard_normal((5000, WIDTH), dtype=np.float32).astype(np.float16)

    def run(self, pack: Pack, num_rows: int | None = None) -> list[SegmentEmbedding]:
        """Embed the segments of a pack, in their order: each is another part of the noise."""
        return list(map(self.embed, pack.segments))

    def embed(self, segment: Segment) -> SegmentEmbedding:
        """Embed a segment of at most 500 residues."""
        first = segment.protein * 487 % 4500
        rows = self.noise[first : first + len(segment.tokens) - 2]
        vectors = {layer: rows[0].astype(np.float32) for layer in self.layers}
        return SegmentEmbedding(vectors, vectors, dict.fromkeys(self.layers, rows) if self.wants_rows else {})


def so_far(counter: str, process: int | str = "self") -> int:
    """Return a counter of a process: the bytes that it gave to the system to write, or asked to read."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[counter])


def fasta(num_proteins: int) -> str:
    return "".join(
        f">sp|P{i:05d}|X_Y a protein of some family OS=Homo sapiens\n{'ACDEFGHIKL' * (10 + i % 40)}\n"
        for i in range(num_proteins)
    )


def share_of(written: int, output_dir: Path) -> float:
    """Return the bytes that were written for each byte of output."""
    report = ReportRead.of(output_dir)
    (file,) = report.files
    assert report.status == "complete"
    return written / sum(size_of(output_dir / output) for output in file.outputs)


def bytes_written(
    path: Path, output_dir: Path, world: World, processes: WriterProcesses | None = None, **settings
) -> int:
    """Embed one file, and return the bytes that this process wrote, without those of its writers."""
    config = make_config(str(path), output_dir, save_dtype=SaveDtype.float16, **settings)
    config = replace(config, model=ModelConfig("stand-in", NUM_LAYERS, WIDTH, 20, "random"), dedupe=False)
    wants_rows = Include.per_tok in config.include
    before = so_far("wchar")
    layers = sorted(layer % (NUM_LAYERS + 1) for layer in config.repr_layers)
    engine = Wide(layers, wants_rows, 20_000)
    run(config, world, lambda *_: engine, processes)  # type: ignore[arg-type, return-value]
    return so_far("wchar") - before


if __name__ == "__main__":
    fasta, output_dir, kind, include = sys.argv[1:]
    with World.connect() as world:
        written = bytes_written(
            Path(fasta),
            Path(output_dir),
            world,
            format=Format[kind],
            include=[Include[include]],
            unit_share=0.1,
        )
        Path(f"{output_dir}.{world.rank}").write_text(str(written))
