#!/usr/bin/env python3
"""How long `dist_esm.load` takes to open a run of very many proteins, and what it reads and keeps.

    scripts/bench_load.py --outputs 1000 --proteins 10000 --width 1280

One output of each format is written by this package and linked under so many names, with a journal that has
all of them. So the run has the size of a real one for whoever reads it, and takes the disk space of one
output. Each format is opened by a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Table, begin, end, make_parser, parse_options

OPEN = "--open"


def main() -> int:
    """Make a run of each format, open each and print what that took."""
    if sys.argv[1:2] == [OPEN]:
        open_run(Path(sys.argv[2]), sys.argv[3] == "all")
        return 0
    parser = make_parser(__doc__)
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--proteins", type=int, default=10_000, help="of each output (10000)")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--formats", nargs="+", default=["npy", "safetensors", "parquet"])
    parser.add_argument("--dir", type=Path, help="where the outputs go (a temporary folder)")
    parser.add_argument("--ids", action="store_true", help="look for an id, too, for which all are read")
    options = parse_options(parser)
    results = begin()
    columns = (
        "format",
        "proteins",
        "load s",
        "open s",
        "read MB",
        "a slice ms",
        "a row ms",
        "an id s",
        "RSS MiB",
    )
    table, runs = Table("load", columns), {}
    for name in options.formats:
        with tempfile.TemporaryDirectory(dir=options.dir) as directory:
            make_run(Path(directory), name, options.outputs, options.proteins, options.width)
            line = [sys.executable, __file__, OPEN, directory, "all" if options.ids else "no"]
            told = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs[name] = run = json.loads(told.splitlines()[-1])
        figures = (run["load_s"], run["open_s"], run["read_mb"], run["slice_ms"], run["row_ms"])
        table.add(
            name,
            f"{run['proteins']:,}",
            *(f"{figure:.2f}" for figure in figures),
            *([f"{run['id_s']:.1f}"] if options.ids else ["not run"]),
            f"{run['rss_mib']:.0f}",
        )
    end({**results, "runs": runs}, [table], options)
    return 0


def make_run(output_dir: Path, name: str, num_outputs: int, num_proteins: int, width: int) -> None:
    """Write one output, link it under many names, and write the journal that has them."""
    import torch

    from dist_esm.atomic import commit_together
    from dist_esm.config import Format
    from dist_esm.outputs import journal
    from dist_esm.outputs.embeddings import OutputTable
    from dist_esm.outputs.formats.write import write_output
    from dist_esm.types import Row, Tally, WrittenFile

    rows = [
        Row(
            f"UniRef90_{place:07}",
            f"UniRef90_{place:07} a protein n=1 Tax=root",
            place,
            300,
            300,
            "ok",
            0,
            0,
            0,
            0,
        )
        for place in range(num_proteins)
    ]
    mean = torch.randn(num_proteins, width, generator=torch.Generator().manual_seed(0))
    provenance = {"model": "esm2_t33_650M_UR50D", "weights": "sha256:0", "layers": [33], "numerics": 1}
    table = OutputTable("a.fasta", provenance, ["mean"], 33, rows, {33: mean}, {}, {}, [])
    scratch = output_dir / "scratch"
    scratch.mkdir()
    staged = write_output(Format[name], table, output_dir / "a", scratch)
    written = commit_together([staged], output_dir)[0]
    assert isinstance(written, WrittenFile), written
    output = output_dir / written.path
    entries = []
    for number in range(num_outputs):
        path = Path(f"{number // 100:03}") / f"{number:05}_ESM{output.suffix}"
        (output_dir / path).parent.mkdir(exist_ok=True)
        if output.is_dir():
            shutil.copytree(output, output_dir / path, copy_function=os.link)
        else:
            os.link(output, output_dir / path)
        source, file = f"{number:05}.fasta", replace(written, path=str(path))
        entries.append(
            journal.Entry(
                f"{number:05}_ESM", source, [(0, None)], ["d"], [file], Tally(), 0, 1.0, is_last=True
            )
        )
    journal.folder(output_dir).mkdir(parents=True)
    lines = b"".join(map(journal.encode, entries))
    (journal.folder(output_dir) / "00000000000000000001.00000.jsonl").write_bytes(lines)


def open_run(output_dir: Path, looks_for_id: bool) -> None:
    """Open a run and print how long each step took, as JSON."""
    import numpy as np

    from dist_esm.outputs.load import load

    begun, read_before = time.monotonic(), read_bytes()
    run = load(output_dir)
    loaded = time.monotonic()
    vectors = run.vectors
    opened, read_after = time.monotonic(), read_bytes()
    rows = np.asarray(vectors[len(vectors) // 2 - 500 : len(vectors) // 2 + 500])
    assert np.isfinite(rows).all()
    sliced = time.monotonic()
    assert run[len(run) - 1].shape == vectors.shape[1:]
    figures = {
        "proteins": len(vectors),
        "load_s": loaded - begun,
        "open_s": opened - loaded,
        "read_mb": (read_after - read_before) / 1e6,
        "slice_ms": 1000 * (sliced - opened),
        "row_ms": 1000 * (time.monotonic() - sliced),
    }
    if looks_for_id:
        begun = time.monotonic()
        assert "UniRef90_0000017" in run
        figures["id_s"] = time.monotonic() - begun
    status = Path("/proc/self/status").read_text()
    figures["rss_mib"] = int(status.split("VmRSS:")[1].split()[0]) / 1024
    print(json.dumps(figures))


def read_bytes() -> int:
    """Return the bytes that this process has read, without what it mapped."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(main())
