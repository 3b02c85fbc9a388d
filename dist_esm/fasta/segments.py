"""Segments: one forward sees all of a protein, its first residues, or one of several overlapping windows.

Files, notebooks and the checks of both cut proteins here, so that all of them see the same segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from dist_esm.config import Config, Long
from dist_esm.fasta.blocks import ELSEWHERE, FastaError
from dist_esm.fasta.tokens import tokenize
from dist_esm.types import Protein, RecordOutcome, Segment


class Span(NamedTuple):
    """The residues of one segment and those that the embedding takes from it, from 0 in the protein."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def apply_length_policy(protein: Protein, config: Config) -> tuple[Protein, RecordOutcome, list[Span]]:
    """Apply `truncation_seq_length` and `long`.

    Returns
    -------
    Protein
        Marked as skipped if the policy leaves it out.
    RecordOutcome
        How the record ends if nothing fails.
    list of Span
        One for each of its segments, in order; empty if it is skipped.

    Raises
    ------
    FastaError
        If it is too long and ``long=fail``.
    """
    if protein.skipped is not None:
        return protein, RecordOutcome.skipped, []
    num_residues, limit = protein.num_residues, config.truncation_seq_length
    if protein.num_unread and (limit is None or len(protein.residues) < limit):
        raise FastaError(
            f"{protein.id} has more letters than are looked at, and fewer than truncation_seq_length={limit} "
            "residues among those: no protein, perhaps a genome"
        )
    if limit is None or num_residues <= limit:
        return protein, RecordOutcome.ok, [Span(0, num_residues, 0, num_residues)]
    if config.long is Long.truncate:
        return protein, RecordOutcome.truncated, [Span(0, limit, 0, limit)]
    if config.long is Long.window:
        return protein, RecordOutcome.windowed, windows(num_residues, limit, config.window_overlap)
    if config.long is Long.fail:
        limit_in_words = f"{num_residues} residues, more than truncation_seq_length={limit}"
        raise FastaError(f"{protein.id} has {limit_in_words}: use long=truncate, skip or window {ELSEWHERE}")
    return protein._replace(skipped="too long"), RecordOutcome.skipped, []


def windows(num_residues: int, width: int, overlap: int) -> list[Span]:
    """Cut a long protein into overlapping windows of equal width.

    Neighbours share at least `overlap` residues: the last window is moved back to end with the protein.
    Each residue is taken from the window in which it is most central; ties go to the earlier window.
    """
    starts = [*range(0, num_residues - width, width - overlap), num_residues - width]
    borders = [0, *((a + b + width + 1) // 2 for a, b in pairwise(starts)), num_residues]
    kept = pairwise(borders)
    return [Span(start, start + width, *keep) for start, keep in zip(starts, kept, strict=True)]


def num_embedded(spans: Iterable[Span]) -> int:
    """Return the number of residues that the embedding is made of."""
    return sum(span.keep_stop - span.keep_start for span in spans)


def make_segments(protein_index: int, residues: bytes, spans: Sequence[Span]) -> list[Segment]:
    """Cut a protein into segments that carry its index. `residues` must reach the last span's end."""
    return [
        Segment(
            protein_index,
            part,
            tokenize(residues[span.start : span.stop]),
            (span.keep_start - span.start, span.keep_stop - span.start),
        )
        for part, span in enumerate(spans)
    ]
