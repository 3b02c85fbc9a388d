"""FASTA files for tests to write and to read."""

from __future__ import annotations

import io
import random
from pathlib import Path

from Bio import SeqIO, bgzf

from dist_esm.fasta.blocks import raw_blocks, whole_file
from dist_esm.fasta.letters import RESIDUES

LETTERS = RESIDUES.decode()


def random_sequence(length: int, seed: int = 0) -> str:
    """Residues of this length; each pair of length and seed has its own."""
    return "".join(random.Random(f"{seed} {length}").choices(LETTERS, k=length))


def varied_proteins(number: int, least: int = 20, most: int = 60) -> list[bytes]:
    """Proteins of so many residues whose compositions differ, as those of real proteins do."""
    draws = random.Random(0)
    proteins = []
    for _ in range(number):
        weights = [draws.gammavariate(8.0, 1.0) for _ in "ACDEFGHIKLMNPQRSTVWY"]
        residues = draws.choices("ACDEFGHIKLMNPQRSTVWY", weights, k=draws.randint(least, most))
        proteins.append("".join(residues).encode())
    return proteins


def write(path: Path, content: bytes | str) -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def block_gzip(content: bytes, block: int = 100) -> bytes:
    """BGZF in blocks of so many bytes, as Biopython writes it, with the end mark."""
    raw = io.BytesIO()
    writer = bgzf.BgzfWriter(fileobj=raw)
    for first in range(0, len(content), block):
        writer.write(content[first : first + block])
        writer.flush()
    raw.write(bgzf._bgzf_eof)
    return raw.getvalue()


def write_fasta(path: Path, text: str) -> Path:
    """Write a FASTA file: in block gzip if its name ends in .gz."""
    return write(path, block_gzip(text.encode()) if path.suffix == ".gz" else text)


def write_files(folder: Path, **files: str) -> Path:
    """Make a folder of FASTA files, named by their stems."""
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.fasta").write_text(text)
    return folder


def read_sequences(path: Path) -> dict[str, str]:
    """The residues of each protein of a file by its id, as Biopython reads them."""
    text = b"".join(raw_blocks(whole_file(path))).decode()
    return {record.id: str(record.seq) for record in SeqIO.parse(io.StringIO(text), "fasta")}
