"""The records of a rank's bin as a run would read them: what only the parser and the policies know.

All of the bin is read if it is not too large, else units that are drawn from it, up to a number of bytes.
Then what is said is of a sample, and says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.fasta.blocks import FastaError
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import Span, apply_length_policy, num_embedded
from dist_esm.outputs.records_tsv import count_record
from dist_esm.pipeline.duplicates import Duplicates
from dist_esm.planning.units import Plan
from dist_esm.types import Protein, RecordOutcome, RecordRead, Tally

READ_BYTES = 256 << 20
"""Bytes of text, about, that each rank reads of its bin."""
MOST_LENGTHS = 4096
"""Lengths that are kept for the calibration."""
NUM_SPECIAL = 2
"""BOS and EOS, which each forward sees beside the residues."""


@dataclass
class Reading:
    """What the records of a bin hold, all of them or a sample."""

    is_all: bool = True
    tally: Tally = field(default_factory=Tally)
    """Of all that was read; what fails is in it as far as it was read."""
    tokens: int = 0
    """Of what the device would see: identical sequences once."""
    squares: int = 0
    """Sum of the squared lengths of the same."""
    saved_tokens: int = 0
    """Of identical sequences, which the device would not see."""
    seen: int = 0
    """Sum over the units that were read of what a scan says that one forward sees."""
    lengths: list[int] = field(default_factory=list)
    """Residues of some segments, over all that was read."""
    failures: list[list[str]] = field(default_factory=list)
    """Paths of files that will fail, and why."""
    nucleotides: dict[str, list[int]] = field(default_factory=dict)
    """Path to records that look like DNA, and records that would be embedded, of the units that have any of
    the former."""


def read_bin(plan: Plan, rank: int, config: Config) -> Reading:
    """Read the bin of a rank, or a sample of it."""
    own = plan.bins[rank]
    counts = [plan.units[index].count for index in own]
    is_all = sum(count.residues + count.headers for count in counts) <= READ_BYTES
    order = own if is_all else random.Random(0).sample(own, len(own))
    return _Reader(plan, config, is_all).read(order)


class _Reader:
    """Reads units one after the other, as long as there is room for more."""

    def __init__(self, plan: Plan, config: Config, is_all: bool) -> None:
        self._plan = plan
        self._config = config
        self._result = Reading(is_all=is_all)
        self._duplicates = Duplicates(config)
        self._num_read = 0
        self._num_bytes = 0
        self._stride = 1
        self._num_segments = 0

    def read(self, order: Sequence[int]) -> Reading:
        """Read units, given their indices in the plan."""
        for index in order:
            if self._is_full:
                break
            unit = self._plan.units[index]
            path = str(self._plan.files[unit.file].path)
            before = Tally()
            before.add(self._result.tally)
            problem = as_value(self._read_unit, index)
            if isinstance(problem, Exception):
                if not isinstance(problem, (FastaError, OSError)):
                    raise problem
                self._result.failures.append([path, str(problem)])
            tally = self._result.tally
            if found := tally.nucleotides - before.nucleotides:
                embedded = tally.sequences - before.sequences
                embedded -= tally.outcomes.get("skipped", 0) - before.outcomes.get("skipped", 0)
                known = self._result.nucleotides.setdefault(path, [0, 0])
                known[0] += found
                known[1] += embedded
        return self._result

    @property
    def _is_full(self) -> bool:
        return not self._result.is_all and self._num_bytes > READ_BYTES

    def _read_unit(self, index: int) -> None:
        unit = self._plan.units[index]
        num_read = 0
        for protein in read_proteins(unit, self._config):
            self._take(protein)
            num_read += not protein.is_continued
            if self._is_full:
                break
        self._result.seen += round(unit.count.seen * min(1, num_read / max(1, unit.count.sequences)))

    def _take(self, protein: Protein) -> None:
        index = self._num_read
        self._num_read += 1
        self._num_bytes += protein.num_residues + len(protein.header) + NUM_SPECIAL
        protein, outcome, spans = apply_length_policy(protein, self._config)
        num_residues = num_embedded(spans)
        record = RecordRead(index, 0, protein, outcome, num_residues, len(spans))
        count_record(record, self._result.tally)
        if outcome is RecordOutcome.skipped:
            return
        tokens = sum(span.stop - span.start + NUM_SPECIAL for span in spans)
        if self._config.dedupe:
            first = self._duplicates.first(index, protein.residues[:num_residues], len(spans))
            for _ in self._duplicates.evicted():
                pass
            if first not in (None, index):
                self._result.tally.deduplicated += 1
                self._result.saved_tokens += tokens
                return
        self._result.tokens += tokens
        for length in self._lengths_of(spans):
            self._result.squares += length**2

    def _lengths_of(self, spans: Sequence[Span]) -> Iterator[int]:
        """Yield the tokens of each segment, and keep the residues of some, evenly over all that is read."""
        for span in spans:
            length = span.stop - span.start
            if self._num_segments % self._stride == 0:
                self._result.lengths.append(length)
                if len(self._result.lengths) >= MOST_LENGTHS:
                    self._result.lengths = self._result.lengths[::2]
                    self._stride *= 2
            self._num_segments += 1
            yield length + NUM_SPECIAL
