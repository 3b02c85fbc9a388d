"""A sample of the input's proteins that is the same for any number of ranks: the shortest, the longest, the rest spread over lengths.

Proteins are told by a digest of their residues, so neither files nor their order decide which are taken, and none is taken twice. Those of
about one length share a bucket, sixteen to a doubling, and of each bucket only the `size` lowest digests are kept: memory is a few
thousand proteins at most, whatever the input. `choose` then takes one protein of each bucket in turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import Span, apply_length_policy, make_segments, num_embedded
from dist_esm.types import FastaFile, Segment, Unit

BUCKETS_PER_DOUBLING = 16


@dataclass(frozen=True, order=True)
class Sampled:
    """A protein that may be in the sample."""

    key: bytes
    """Digest of what is embedded."""
    source: str
    """Its file, as outputs name it."""
    number: int
    """Its place among the proteins of its unit that get an embedding, from 0."""
    id: str
    length: int
    """Residues after the policy for letters, before truncation."""
    embedded: int
    """Residues that its embedding is made of."""
    residues: bytes
    """These residues."""
    spans: tuple[Span, ...]
    """Of each of its segments."""


class Sampler:
    """Keeps what `choose` may take of the proteins that pass by.

    Parameters
    ----------
    size
        Proteins wanted.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_seen = 0
        self._kept: dict[int, dict[bytes, Sampled]] = {}
        self._ends: tuple[Sampled, Sampled] | None = None

    def add(self, one: Sampled) -> None:
        """Let a protein pass by."""
        self.num_seen += 1
        kept = self._kept.setdefault(bucket(one.embedded), {})
        kept[one.key] = min(one, kept.get(one.key, one))
        if len(kept) > self.size:
            del kept[max(kept)]
        shortest, longest = self._ends or (one, one)
        self._ends = min(shortest, one, key=_by_length), max(longest, one, key=_by_length)

    def candidates(self) -> list[Sampled]:
        """What was kept."""
        return [*(self._ends or ()), *(one for kept in self._kept.values() for one in kept.values())]


def draw(units: Iterable[Unit], files: Sequence[FastaFile], config: Config) -> tuple[Sampler, list[str]]:
    """Read units as `job=embed` does, residue policy, truncation and windows included.

    Returns
    -------
    the sampler that saw every protein that gets an embedding; a line for each unit that could not be read to its end
    """
    sampler = Sampler(config.selfcheck.proteins)
    problems = []
    for unit in units:
        problem = as_value(_read, unit, files[unit.file], config, sampler)
        if problem is not None:
            problems.append(f"{files[unit.file].path}: {' '.join(str(problem).split())}")
    return sampler, problems


def _read(unit: Unit, file: FastaFile, config: Config, sampler: Sampler) -> None:
    number = 0
    for protein in read_proteins(unit, config):
        shaped, _, spans = apply_length_policy(protein, config)
        if spans:
            residues = shaped.residues[: max(span.stop for span in spans)]
            embedded = num_embedded(spans)
            key = hashlib.blake2b(residues, digest_size=16).digest()
            sampler.add(
                Sampled(
                    key,
                    file.source,
                    number,
                    shaped.id,
                    shaped.num_residues,
                    embedded,
                    residues,
                    tuple(spans),
                )
            )
            number += 1


def choose(candidates: Iterable[Sampled], size: int) -> list[Sampled]:
    """At most `size` distinct proteins of those that any number of samplers of this size kept, the shortest first."""
    distinct: dict[bytes, Sampled] = {}
    for one in candidates:
        distinct[one.key] = min(one, distinct.get(one.key, one))
    everything = sorted(distinct.values(), key=_by_length)
    if len(everything) <= size:
        return everything
    chosen = [everything[-1], everything[0]][:size]
    buckets: dict[int, list[Sampled]] = {}
    for one in sorted(everything[1:-1]):
        buckets.setdefault(bucket(one.embedded), []).append(one)
    for turn in zip_longest(*(buckets[number] for number in sorted(buckets))):
        row = [one for one in turn if one is not None]
        room = size - len(chosen)
        chosen += row if len(row) <= room else [row[index * len(row) // room] for index in range(room)]
    return sorted(chosen, key=_by_length)


def segments_of(number: int, one: Sampled) -> list[Segment]:
    """What the forward sees of a protein."""
    return make_segments(number, one.residues, one.spans)


def bucket(num_residues: int) -> int:
    """The bucket of a length."""
    return int(BUCKETS_PER_DOUBLING * math.log2(num_residues))


def _by_length(one: Sampled) -> tuple[int, Sampled]:
    return one.embedded, one
