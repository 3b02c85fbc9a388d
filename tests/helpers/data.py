"""Where the test data lie."""

from __future__ import annotations

import gzip
from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

DATA = Path(__file__).parents[1] / "data"
PROTEINS = DATA / "proteins"
INTAKE = DATA / "intake"


def real_proteins() -> list[bytes]:
    """The sequences of the real proteins, of at most 1,022 residues that all are amino acids."""
    proteins = []
    for path in sorted(PROTEINS.rglob("*.fa*")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="ascii") as file:
            proteins += [letters.encode() for _, letters in SimpleFastaParser(file)]
    return [one for one in proteins if len(one) <= 1022 and set(one) <= set(b"ACDEFGHIKLMNPQRSTVWY")]
