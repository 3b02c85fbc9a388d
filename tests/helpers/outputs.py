"""Proteins with awkward ids and headers, and what an output must hold of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dist_esm.atomic import commit_together
from dist_esm.config import Format
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.write import write_output
from dist_esm.outputs.journal import Entry, encode
from dist_esm.types import Row, Tally, WrittenFile
from helpers.standin import ALL_KINDS, WIDTH, bos_of, embed_directory, expected, fair_esm_tokens

EVERYTHING = {"include": ALL_KINDS, "repr_layers": [0, 1]}
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


def expected_mean(residues: str, layer: int = 1) -> np.ndarray:
    """The mean over residues that the stand-in has for a protein, shape (WIDTH,)."""
    return expected(residues, layer).mean


def expected_bos(residues: str, layer: int = 1) -> np.ndarray:
    """The representation of BOS that the stand-in has for a protein, shape (WIDTH,)."""
    return bos_of(fair_esm_tokens(residues), layer).astype(np.float32)


def expected_rows(residues: str, layer: int = 1) -> np.ndarray:
    """The rows of residues that the stand-in has for a protein, shape (len(residues), WIDTH)."""
    return expected(residues, layer).rows


def embed_text(tmp_path: Path, kind: Format, name: str = "a.fasta", text: str = FASTA, **settings) -> Path:
    """Embed one file of this text; returns the path of its output."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    run = embed_directory(tmp_path / "in", tmp_path / "out", format=kind, **settings)
    assert not run.report.failed
    (entry,) = run.report.files
    return tmp_path / "out" / entry.output


def everything_below(folder: Path) -> set[str]:
    """Paths of all files and folders below a folder, from there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def table_of(sequences, provenance=None, width=WIDTH, ids=None, dtype=torch.float32) -> OutputTable:
    """An output as the collector hands it to a writer: the means count upwards from 0."""
    rows = [
        Row(ids[i] if ids else f"p{i}", f"p{i} header", i, len(residues), len(residues), "ok", 0, 0, 0, 0)
        for i, residues in enumerate(sequences)
    ]
    mean = torch.arange(len(rows) * width, dtype=dtype).reshape(-1, width)
    return OutputTable("in.fasta", provenance or {}, ["mean"], 33, rows, {33: mean}, {}, {}, [])


PROVENANCE = {
    "model": "esm2_t33_650M_UR50D",
    "weights": "sha256:0123",
    "layers": [33],
    "dtype": "bf16",
    "truncation_seq_length": None,
    "dist_esm": "0.1.0",
}


def write_table(kind: Format, table: OutputTable, stem: Path) -> Path:
    """Write and commit one output; its path."""
    scratch = stem.parent / ".scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        staged = write_output(kind, table, stem, scratch)
        (written,) = commit_together([staged], stem.parent)
        assert not isinstance(written, Exception), written
    finally:
        scratch.rmdir()
    return stem.parent / written.path


def write_journal(output_dir: Path, *outputs: str) -> None:
    """What a run leaves that says what is finished, of outputs of one input each."""
    lines = [
        Entry(
            name,
            f"{name}.fasta",
            [(0, None)],
            ["d"],
            [WrittenFile(name, 1, "s")],
            Tally(),
            0,
            1.0,
            is_last=True,
        )
        for name in outputs
    ]
    folder = output_dir / ".dist_esm" / "journal"
    folder.mkdir(parents=True)
    (folder / "00000000000000000001.00000.jsonl").write_bytes(b"".join(map(encode, lines)))
