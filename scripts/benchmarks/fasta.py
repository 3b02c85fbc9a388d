"""Generated FASTA: random proteins from a seed, the same on every machine. Imports no torch."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

LETTERS = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
"""The twenty residues, the commonest first."""
CHUNK = 20_000
"""Proteins drawn at once, so that memory does not grow with their number."""


def random_proteins(num: int, shortest: int, longest: int, seed: int) -> Iterator[bytes]:
    """Draw `num` sequences of random letters, every length from `shortest` to `longest` equally likely."""
    rng = np.random.default_rng(seed)
    for first in range(0, num, CHUNK):
        lengths = rng.integers(shortest, longest + 1, size=min(CHUNK, num - first))
        letters = LETTERS[rng.integers(0, len(LETTERS), size=int(lengths.sum()), dtype=np.uint8)].tobytes()
        stop = 0
        for length in lengths.tolist():
            start, stop = stop, stop + length
            yield letters[start:stop]


def with_uniref_headers(proteins: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Give each sequence a header such as UniRef's: its id and a description of about 60 letters."""
    for index, protein in enumerate(proteins):
        header = b"UniRef50_%08d Uncharacterized protein n=%d Tax=root TaxID=1" % (index, index % 97)
        yield header, protein


def write_fasta(path: Path, records: Iterable[tuple[bytes, bytes]], width: int = 60) -> int:
    """Write (header, residues) pairs in lines of `width` residues, as gzip if the name ends in `.gz`.

    Returns
    -------
    int
        Bytes of text.
    """
    num_bytes = 0
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else open(path, "wb") as file:
        for header, residues in records:
            lines = b"\n".join(residues[start : start + width] for start in range(0, len(residues), width))
            num_bytes += file.write(b">%b\n%b\n" % (header, lines))
    return num_bytes
