"""The glossary: the values that pass between stages, none of which knows a device, a process group or a file
format.

A *file* is one input FASTA; a *unit* is what a rank takes, a whole file or a slice of one; a *protein* is one
record; a *segment* is what one forward sees of a protein (all of it, its first residues, or one window); a
*pack* is whole segments laid end to end; an *outcome* is what became of a unit, a value and never an
exception that escapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_esm.config import Include
from dist_esm.names import one_line, printable

Compression = Literal["gzip", "bz2", "xz", "zstd"]
"""What a file may be compressed with."""
MASK = b"\x1a"
"""The byte that stands for fair-esm's mask token among residues, under ``special_tokens=mask``."""


class WorkerStatus(Enum):
    """What a rank is doing, as published through the process group's store."""

    IDLE = "idle"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


class RecordOutcome(Enum):
    """What became of one FASTA record. Over a run the counts of these add up to the records that were
    read."""

    ok = "ok"
    truncated = "truncated"
    windowed = "windowed"
    skipped = "skipped"
    failed = "failed"


@dataclass(frozen=True)
class FastaFile:
    """One input file as the plan saw it."""

    path: Path
    output: Path
    """Its output relative to `output_dir`, without format suffix: ``viruses/a_ESM``."""
    num_bytes: int
    mtime_ns: int
    source: str = ""
    """Its path relative to the common root of the inputs, as outputs name it."""
    problem: str | None = None
    """Why it cannot be read, if that is known already."""
    copy: Path | None = None
    """The file that it was copied to, if it is a pipe or standard input."""

    @property
    def location(self) -> Path:
        """Where its bytes are."""
        return self.copy or self.path


@dataclass(frozen=True)
class Slice:
    """A range of whole records of one file, in bytes of its decompressed text.

    A block-gzip file can be entered at a block: `seek` is a pair (offset in the file, offset in the text) at
    or before `start`.
    """

    path: Path
    start: int = 0
    stop: int | None = None
    """None: to the end."""
    seek: tuple[int, int] = (0, 0)
    compression: Compression | None = None


@dataclass(frozen=True)
class Count:
    """What a scan of a slice's bytes found, before any record is parsed."""

    sequences: int = 0
    """Lines that begin with `>`."""
    residues: int = 0
    """Bytes of sequence lines."""
    squares: int = 0
    """Sum over records of (residues that one forward sees) squared: the work of attention."""
    lines: int = 0
    text: int = 0
    """Bytes that ids and headers take in JSON at most; 0 if the format has no limit for them."""
    part_size: int = 0
    """Records of a numbered part that keep within that limit; 0: as many as one wants."""
    seen: int = 0
    """Sum over records of the residues that one forward sees."""
    num_long: int = 0
    """Records of more residues than one forward sees."""
    headers: int = 0
    """Bytes of header lines."""

    def flops(self, embed_dim: int) -> int:
        """Return the floating-point operations of one layer of width D, for what one forward sees of each
        record: 24 D^2 for each residue, and 4 D L^2 for the attention of L residues."""
        return 24 * embed_dim**2 * self.seen + 4 * embed_dim * self.squares

    def __add__(self, other: Count) -> Count:
        return Count(
            sequences=self.sequences + other.sequences,
            residues=self.residues + other.residues,
            squares=self.squares + other.squares,
            lines=self.lines + other.lines,
            text=self.text + other.text,
            part_size=min(filter(None, (self.part_size, other.part_size)), default=0),
            seen=self.seen + other.seen,
            num_long=self.num_long + other.num_long,
            headers=self.headers + other.headers,
        )


LENGTH_EDGES = (1, 50, 100, 200, 300, 400, 500, 700, 1000, 1500, 2000, 3000, 5000, 10_000)
"""Where the bins of a `LengthHistogram` begin; in front of the first are records without a residue."""


@dataclass
class LengthHistogram:
    """How long records are, as a scan sees them."""

    bins: list[int] = field(default_factory=lambda: [0] * (len(LENGTH_EDGES) + 1))
    """Records of fewer residues than the first edge, from the first to below the second, and so on."""
    longest: int = 0
    """Residues."""

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count records by their residues, shape (records,)."""
        if len(lengths):
            places = np.searchsorted(LENGTH_EDGES, lengths, "right")
            found = np.bincount(places, minlength=len(self.bins)).tolist()
            self.bins = [mine + other for mine, other in zip(self.bins, found, strict=True)]
            self.longest = max(self.longest, int(lengths.max()))

    def merge(self, other: LengthHistogram) -> None:
        """Count what another histogram counted."""
        self.bins = [mine + theirs for mine, theirs in zip(self.bins, other.bins, strict=True)]
        self.longest = max(self.longest, other.longest)


@dataclass(frozen=True)
class Extent:
    """How much of one output some records of its file take."""

    proteins: int = 0
    """Records with an embedding."""
    residues: int = 0
    """Embedded residues."""
    text: int = 0
    """Bytes that their ids and headers take in front of the numbers, in the format's own way; 0 if the
    numbers come first."""

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.proteins + other.proteins, self.residues + other.residues, self.text + other.text)


@dataclass(frozen=True)
class Layout:
    """Where the proteins of a unit belong in the one output of its file."""

    before: Extent
    """The units of the same file that come first."""
    own: Extent
    total: Extent
    """All units of the file."""
    digest: str
    """Of the extents of all units: what is written under another layout is in other places."""
    lengths: tuple[int, ...] = ()
    """Embedded residues of all proteins of the file, if places depend on them."""

    @property
    def own_lengths(self) -> list[int]:
        """Those of the unit's own proteins."""
        first = self.before.proteins
        return list(self.lengths[first : first + self.own.proteins])


@dataclass(frozen=True)
class Unit:
    """What a rank takes: a whole file, or one slice of a file that is too large for one rank."""

    file: int
    """Index of its file in the plan."""
    ordinal: int
    """0, 1, ... among the units of its file."""
    slice: Slice
    count: Count
    before: Count
    """The units of the same file that come first, so that line and record numbers are those of the file."""
    is_whole: bool
    """It is all of its file."""
    first_part: int | None = None
    """Number of its first numbered part, if its file has too many proteins for one output."""
    part_size: int | None = None
    """Records of one of its numbered parts; None: as the configuration has it."""
    unreadable: str | None = None
    """Why the scan could not read it; reading it will fail with the same reason."""
    layout: Layout | None = None
    """Where its proteins belong, if they are written to their places in the output of a file that was cut."""
    parts: tuple[Layout, ...] = ()
    """Where its proteins belong in each of its outputs, if it is no shard and has more to write than waits in
    memory."""

    @property
    def is_shard(self) -> bool:
        """Whether what is written of it is to be joined with others to the one output of its file."""
        return not self.is_whole and self.first_part is None


class Changes(NamedTuple):
    """Letters of one record that were put right or replaced."""

    upper_cased: int = 0
    stops_removed: int = 0
    gaps_removed: int = 0
    replaced: int = 0
    blanks_removed: int = 0
    digits_removed: int = 0

    def __bool__(self) -> bool:
        return any(self)


NO_CHANGES = Changes()


class Protein(NamedTuple):
    """One FASTA record after the residue policy, or the reason why it has none."""

    id: str
    header: str
    residues: bytes
    """Letters of fair-esm's alphabet; empty if the record is skipped."""
    changes: Changes = NO_CHANGES
    is_unnamed: bool = False
    """The record had no id and was given one."""
    skipped: str | None = None
    """Why the record gets no embedding."""
    replaced_letters: tuple[tuple[str, int], ...] = ()
    """Letters that X was put in place of, and how often."""
    num_unread: int = 0
    """Letters of the record behind `residues`, not looked at since truncation drops them."""
    is_continued: bool = False
    """It is a second or later chain of its record."""
    is_nucleotide: bool = False
    """It looks like DNA or RNA."""
    is_latin1: bool = False
    """Its header is not UTF-8 and was read as Latin-1."""

    @property
    def num_residues(self) -> int:
        """Residues before truncation."""
        return len(self.residues) + self.num_unread


class Row(NamedTuple):
    """A protein that has an embedding, as outputs know it."""

    id: str
    header: str
    number: int
    """Index of the record in its file, from 0, skipped ones counted."""
    length: int
    """Residues after the policy, before truncation."""
    embedded: int
    """Residues that the embedding was made of."""
    outcome: str
    """ok, truncated or windowed."""
    upper_cased: int
    stops_removed: int
    gaps_removed: int
    replaced: int
    blanks_removed: int = 0
    digits_removed: int = 0

    @classmethod
    def of(cls, protein: Protein, number: int, embedded: int, outcome: RecordOutcome) -> Row:
        """From a protein after the policies for letters and lengths, and its record's index in its file."""
        lengths = protein.num_residues, embedded
        return cls(protein.id, protein.header, number, *lengths, outcome.name, *protein.changes)


NOTE_COLUMNS = (
    "record",
    "id",
    "outcome",
    "residues",
    "embedded",
    "windows",
    "upper_cased",
    "stops_removed",
    "gaps_removed",
    "replaced",
    "blanks_removed",
    "digits_removed",
    "replaced_letters",
    "note",
)
"""Columns of an output's ``.records.tsv``; ``record`` counts from 1."""


@dataclass(frozen=True)
class RecordRead:
    """One record as the reader passed it on."""

    protein_index: int
    unit: int
    protein: Protein
    outcome: RecordOutcome
    num_embedded: int
    """Residues that get an embedding."""
    num_segments: int
    duplicate_of: int | None = None
    """Ticket of the first record with the same residues, whose answer is kept; its own if it is the first."""
    evicted: tuple[int, ...] = ()
    """Tickets whose answers no later record will ask for."""


@dataclass(frozen=True)
class Segment:
    """What one forward sees of a protein, and which of its residues the answer is taken from."""

    protein: int
    """Ticket of the protein; the segments of one protein share it."""
    part: int
    """0, 1, ... among the segments of its protein."""
    tokens: NDArray[np.uint8]
    """fair-esm's tokens, BOS and EOS included; shape (residues + 2,)."""
    keep: tuple[int, int]
    """First and one past the last residue, within the segment, that the protein's answer takes from it."""


@dataclass(frozen=True)
class Pack:
    """Whole segments laid end to end, without padding."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    def halves(self) -> tuple[Pack, Pack]:
        """Two packs of about as many segments each."""
        middle = len(self.segments) // 2
        return Pack(self.segments[:middle]), Pack(self.segments[middle:])


@dataclass(frozen=True)
class SegmentEmbedding:
    """The wanted representations of one segment, on the host."""

    sums: dict[int, NDArray[np.float32]]
    """Layer to the sum over the kept residues, shape (D,)."""
    bos: dict[int, NDArray[np.float32]]
    """Layer to the representation of BOS, shape (D,)."""
    rows: dict[int, NDArray[Any]]
    """Layer to the kept residues' own representations, shape (kept, D), in the dtype to save; empty unless
    wanted."""
    rows_fit: bool = True
    """False if one of their numbers is finite, and too large for the dtype to save."""


ProteinEmbedding = dict[tuple[Include, int], NDArray[Any]]
"""A protein's finished representations by kind and layer: mean and bos (D,), per_tok (L, D)."""


@dataclass(frozen=True)
class Failure:
    """A file that got no output, and why."""

    path: str
    error_type: str
    error_message: str
    rank: int

    @classmethod
    def of(cls, path: Path, error: Exception, rank: int, protein: str | None = None) -> Failure:
        """From what was raised, its message in one line, behind the id of the protein if it is one's."""
        message = one_line(error)
        return cls(
            str(path),
            type(error).__name__,
            f"{printable(protein)}: {message}" if protein else message,
            rank,
        )


TALLIED = (
    "residues",
    "nucleotides",
    "more_chains",
    "latin1",
    "duplicate_ids",
    "unnamed",
    "windows",
    "deduplicated",
)
"""Fields of a `Tally` that are one number."""


@dataclass
class Tally:
    """Counts of records and residues, for one unit or for many."""

    outcomes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason to records."""
    changed: dict[str, int] = field(default_factory=dict)
    """Kind of change to letters, and `records` to the records that had any."""
    replaced: dict[str, int] = field(default_factory=dict)
    """Letter to how often X was put in its place."""
    residues: int = 0
    """Residues that were embedded."""
    nucleotides: int = 0
    """Proteins with residues that look like DNA or RNA."""
    more_chains: int = 0
    """Proteins that are second or later chains of their record."""
    latin1: int = 0
    """Records whose header was read as Latin-1."""
    duplicate_ids: int = 0
    unnamed: int = 0
    windows: int = 0
    deduplicated: int = 0
    """Records that took the answer of an identical sequence."""

    def add(self, other: Tally) -> None:
        """Count what another tally counted."""
        for mine, theirs in (
            (self.outcomes, other.outcomes),
            (self.skipped, other.skipped),
            (self.changed, other.changed),
            (self.replaced, other.replaced),
        ):
            for key, number in theirs.items():
                mine[key] = mine.get(key, 0) + number
        for name in TALLIED:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def sequences(self) -> int:
        """Records, whatever became of them."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class WrittenFile:
    """An output that is in place, or a shard."""

    path: str
    """Relative to `output_dir`."""
    num_bytes: int
    sha256: str
    """Its checksum: see `dist_esm.checksum`."""


@dataclass(frozen=True)
class JoinedFile:
    """The one output of a file that was cut."""

    written: WrittenFile
    duplicate_ids: int
    """Over the whole file, which no unit of it can count alone."""


@dataclass(frozen=True)
class UnitResult:
    """A unit that is written: its outputs, or its shard, are in place under their names."""

    file: int
    ordinal: int
    files: tuple[WrittenFile, ...]
    """In order."""
    text_digest: str
    """sha256 of the text that was read."""
    tally: Tally
    rank: int
    seconds: float


@dataclass(frozen=True)
class UnitFailure:
    """A unit that is not written, and why."""

    file: int
    ordinal: int
    failure: Failure
    seconds: float


UnitOutcome = UnitResult | UnitFailure


class TakenUnit(NamedTuple):
    """A unit that a rank has claimed and is about to read."""

    unit: Unit
    is_alone: bool = False
    """It may kill its process: nothing else may be in hand meanwhile."""


@dataclass
class RankResult:
    """What one rank did."""

    outcomes: list[UnitOutcome] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens that went through the model."""
    seconds: float = 0.0
    first_pack_at: float | None = None
    """Unix time at which the first pack was submitted."""
    num_split_packs: int = 0
    """Packs that did not fit, or failed, and were tried again in halves."""
    num_recomputed: int = 0
    """Segments that were not finite, and were computed again in a wider dtype."""
    num_padding: int = 0
    """Rows of the device's matrix products that were no token of a protein."""
    compute_seconds: float = 0.0
    """Seconds in which a pack was given to the device or waited for."""
    write_seconds: float = 0.0
    """Seconds from the last pack until the last output was in place."""
    waits: dict[str, float] = field(
        default_factory=lambda: {"waited_for_input": 0.0, "waited_for_output": 0.0}
    )
    """Seconds in which nothing was submitted to the device: for the reader, and for outputs to be taken off
    its hands."""
    device_idle: float | None = None
    """Seconds between one pack's end on a GPU and the next one's beginning, by the device's own clock."""


@dataclass(frozen=True)
class RankSummary:
    """One rank's own account of its work."""

    rank: int
    host: str
    device: str
    status: str
    seconds: float
    tokens: int
    split_packs: int
    recomputed: int
    waits: dict[str, float]
    startup: dict[str, float]
    """Seconds of loading the weights and of readying the kernels, and the Unix time of the first pack."""
    outcomes: list[UnitOutcome]
    taken_over: int = 0
    """Units that the assignment had given to other ranks."""
    ended_at: float = 0.0
    """Unix time at which its work ended, or this account was given."""
    peak_memory_mib: float = 0.0
    """Host memory that its process had resident at most, what it maps of the checkpoint included."""
    padding: int = 0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Phase to the seconds that it took, until this account was given."""
