"""A sample of the input's proteins: the shortest, the longest, and the rest spread over the lengths between.

It is the same for any number of ranks. A digest of its residues stands for a protein, so neither files nor
their order decide which are taken, and none is taken twice. Proteins of about the same length share a
bucket, sixteen to a doubling. Of each bucket only the `size` lowest digests are kept, so memory holds tens of
thousands of proteins at most, whatever the input, and ranks tell each other of a few hundred.
`choose_sample` then takes a protein of each bucket in turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import Span, apply_length_policy, make_segments, num_embedded
from dist_esm.names import one_line
from dist_esm.types import FastaFile, Segment, Unit

BUCKETS_PER_DOUBLING = 16


@dataclass(frozen=True, order=True)
class SampledProtein:
    """A protein that may be in the sample."""

    key: bytes
    """Digest of the residues that are embedded."""
    source: str
    """Its file, as outputs name it."""
    place: int
    """Its place among the proteins of its unit that get an embedding, from 0."""
    id: str
    length: int
    """Residues after the policy for letters, before truncation."""
    embedded: int
    """Residues that its embedding is made of."""
    residues: bytes
    """These residues."""
    spans: tuple[Span, ...]
    """The span of each of its segments."""


def with_spans(protein: SampledProtein) -> SampledProtein:
    """Restore a protein that another rank sent: its spans came as lists."""
    return replace(protein, spans=tuple(Span(*span) for span in protein.spans))


class Sampler:
    """Keeps those of the proteins that pass by which `choose_sample` may take.

    Parameters
    ----------
    size
        Proteins of the sample.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_seen = 0
        self._kept: dict[int, dict[bytes, SampledProtein]] = {}
        self._highest: dict[int, bytes] = {}
        self._ends: tuple[SampledProtein, SampledProtein] | None = None

    def add(self, protein: SampledProtein) -> None:
        """Let a protein pass by."""
        self.num_seen += 1
        self._keep_lowest(bucket(protein.embedded), protein)
        shortest, longest = self._ends or (protein, protein)
        self._ends = min(shortest, protein, key=_by_length), _longer(longest, protein)

    def _keep_lowest(self, length: int, protein: SampledProtein) -> None:
        """Keep a protein if its digest is one of the lowest of its bucket."""
        if protein.key > self._highest.get(length, protein.key):  # of a large input nearly always so
            return
        kept = self._kept.setdefault(length, {})
        kept[protein.key] = min(protein, kept.get(protein.key, protein))
        if len(kept) > self.size:
            del kept[max(kept)]
        if len(kept) == self.size:
            self._highest[length] = max(kept)

    def candidates(self) -> list[SampledProtein]:
        """Return the proteins that `choose_sample` may take, whatever other samplers saw.

        It goes through all buckets in turn, so the more buckets there are the fewer it takes of each. Two
        more of each bucket make up for the shortest and the longest, which it takes apart.
        """
        sizes = [len(proteins) for proteins in self._kept.values()]
        enough = (depth for depth in range(1, self.size) if sum(min(depth, n) for n in sizes) >= self.size)
        depth = next(enough, self.size) + 2
        kept = (sorted(proteins.values())[:depth] for proteins in self._kept.values())
        return [*(self._ends or ()), *(protein for proteins in kept for protein in proteins)]


def read_candidates(
    units: Iterable[Unit], files: Sequence[FastaFile], config: Config
) -> tuple[Sampler, list[str]]:
    """Read units as `job=embed` does, residue policy, truncation and windows included.

    Returns
    -------
    the sampler that saw every protein that gets an embedding; a line for each unit not read to its end
    """
    sampler = Sampler(config.selfcheck.proteins)
    unread = []
    for unit in units:
        problem = as_value(_read, unit, files[unit.file], config, sampler)
        if problem is not None:
            unread.append(f"{files[unit.file].path}: {one_line(problem)}")
    return sampler, unread


def _read(unit: Unit, file: FastaFile, config: Config, sampler: Sampler) -> None:
    place = 0
    for record in read_proteins(unit, config):
        protein, _, spans = apply_length_policy(record, config)
        if spans:
            residues = protein.residues[: max(span.stop for span in spans)]
            sampler.add(
                SampledProtein(
                    key=hashlib.blake2b(residues, digest_size=16).digest(),
                    source=file.source,
                    place=place,
                    id=protein.id,
                    length=protein.num_residues,
                    embedded=num_embedded(spans),
                    residues=residues,
                    spans=tuple(spans),
                )
            )
            place += 1


def choose_sample(candidates: Iterable[SampledProtein], size: int) -> list[SampledProtein]:
    """Choose at most `size` distinct proteins, the shortest first.

    The candidates are those that any number of samplers of this size kept.
    """
    distinct: dict[bytes, SampledProtein] = {}
    for protein in candidates:
        distinct[protein.key] = min(protein, distinct.get(protein.key, protein))
    by_length = sorted(distinct.values(), key=_by_length)
    if len(by_length) <= size:
        return by_length
    chosen = [by_length[-1], by_length[0]][:size]
    buckets: dict[int, list[SampledProtein]] = {}
    for protein in sorted(by_length[1:-1]):
        buckets.setdefault(bucket(protein.embedded), []).append(protein)
    for turn in zip_longest(*(buckets[length] for length in sorted(buckets))):
        row = [protein for protein in turn if protein is not None]
        room = size - len(chosen)
        chosen += row if len(row) <= room else [row[index * len(row) // room] for index in range(room)]
    return sorted(chosen, key=_by_length)


def segments_of(protein_index: int, protein: SampledProtein) -> list[Segment]:
    """Cut a protein into the segments that the forward sees; they carry its index in the sample."""
    return make_segments(protein_index, protein.residues, protein.spans)


def bucket(num_residues: int) -> int:
    """Return the bucket of a length."""
    return int(BUCKETS_PER_DOUBLING * math.log2(num_residues))


def _by_length(protein: SampledProtein) -> tuple[int, SampledProtein]:
    return protein.embedded, protein


def _longer(one: SampledProtein, other: SampledProtein) -> SampledProtein:
    """Return the later of two in the order of length; of two with the same residues, the one that is read
    first, whichever rank saw it."""
    return min(one, other) if one.key == other.key else max(one, other, key=_by_length)
