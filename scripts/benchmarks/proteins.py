"""Proteins as every contestant gets them, and the packs that this tool makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from esm.data import FastaBatchedDataset

from dist_esm.fasta.tokens import tokenize
from dist_esm.pipeline.packer import Packer
from dist_esm.types import Pack, Segment

MAX_RESIDUES = 1022
"""Residues that are kept of a protein."""


@dataclass(frozen=True)
class Protein:
    """An id and its residues, truncated."""

    id: str
    residues: str

    @property
    def num_tokens(self) -> int:
        """Residues, BOS and EOS."""
        return len(self.residues) + 2


def load_proteins(path: Path, num_proteins: int) -> list[Protein]:
    """Read a FASTA file as fair-esm does; repeat it under other ids until there are `num_proteins`."""
    residues = [text[:MAX_RESIDUES] for text in FastaBatchedDataset.from_file(path).sequence_strs]
    return [Protein(f"p{index}", residues[index % len(residues)]) for index in range(num_proteins)]


def num_tokens(proteins: Iterable[Protein]) -> int:
    """Return the tokens of all proteins."""
    return sum(protein.num_tokens for protein in proteins)


def as_records(proteins: Iterable[Protein]) -> Iterator[tuple[bytes, bytes]]:
    """Return (header, residues) pairs, to be written as FASTA."""
    return ((protein.id.encode(), protein.residues.encode()) for protein in proteins)


def make_segments(proteins: Sequence[Protein]) -> list[Segment]:
    """Return one segment for each protein, with the protein's index in `proteins`."""
    return [
        Segment(index, 0, tokenize(protein.residues.encode()), (0, len(protein.residues)))
        for index, protein in enumerate(proteins)
    ]


def make_packs(proteins: Sequence[Protein], toks_per_batch: int) -> list[Pack]:
    """Return the proteins in packs of at most `toks_per_batch` tokens."""
    packer = Packer(toks_per_batch)
    packs = [pack for segment in make_segments(proteins) for pack in packer.add(segment)]
    return packs + list(packer.flush())
