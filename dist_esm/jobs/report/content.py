"""What a report holds. The schema of report.json is made of these, see docs/report.schema.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_esm.types import Failure, Tally

FORMAT_VERSION = 2
"""Of report.json; reports without one are of version 1. Raise it when a key changes its meaning or goes."""
OUTCOMES = ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")


@dataclass(frozen=True)
class FileReport:
    """A file whose output is in place."""

    path: str
    output: str
    """Relative to `output_dir`; of a file in numbered parts, the first."""
    outputs: list[str]
    """All of them, in order."""
    sequences: int
    residues: int
    truncated: int
    rank: int
    seconds: float
    units: int
    resumed: bool
    """An earlier launch finished it."""
    tally: Tally
    remarks: list[str]
    """Things about its records that a person should look at."""


@dataclass
class Report:
    """The whole run, as rank 0 writes it."""

    status: str
    """`running`, `complete`, `partial` or `aborted`."""
    reason: str | None
    files: list[FileReport]
    failed: list[Failure]
    not_attempted: list[str]
    records: dict[str, Any]
    ranks: list[dict[str, Any]]
    seconds: float
    embedding_seconds: float
    """From when every rank had its model until every output was in place."""
    phases: dict[str, float] = field(default_factory=dict)
    """On rank 0, phase to the seconds that it took."""
    unfinished: dict[str, int] = field(default_factory=dict)
    """Of files that were not come to their end: how many have units that are embedded, and the sequences and
    residues of these units. The next launch goes on from them."""
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    kernels: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    launch: int = 0
    """Counts the launches into the output directory."""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    """Unix time."""
    passed_over: dict[str, Any] = field(default_factory=dict)
    """Files that a search for inputs saw and did not take: how many, by reason, and the first of them."""

    @property
    def exit_code(self) -> int:
        """0 complete, 2 partial, 1 aborted."""
        return {"complete": 0, "partial": 2, "aborted": 1}[self.status]

    @property
    def num_files(self) -> int:
        """Input files, whatever became of them."""
        return len(self.files) + len(self.failed) + len(self.not_attempted)


@dataclass(frozen=True)
class Ending:
    """How a launch ended, and when."""

    reason: str | None
    """Why it was stopped, if it was."""
    seconds: float
    """Wall time of the launch."""
    embedding_seconds: float
    """Of it, without finding files, loading and planning."""
    phases: dict[str, float]
    """On rank 0, phase to the seconds that it took."""
