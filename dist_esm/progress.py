"""How far one rank is: numbers that its threads keep, and a copy of them that ranks give each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """What a rank is at, in words."""

    starting = "starting"
    counting = "counting proteins"
    loading = "loading the model"
    compiling = "compiling kernels"
    embedding = "embedding"
    waiting = "waiting for other ranks"
    joining = "joining cut files"
    reporting = "writing the report"


@dataclass
class RankProgress:
    """How far a rank is, at one moment."""

    rank: int = 0
    host: str = ""
    device: str = ""
    phase: str = Phase.starting.name
    file: str = ""
    """The file in hand."""
    files: float = 0.0
    """Files that are done; of a file that was cut, the share of its units that are."""
    failed: int = 0
    """Units that failed."""
    proteins: int = 0
    """Proteins that have their embedding, or are skipped."""
    tokens: int = 0
    cost: float = 0.0
    """Floating-point operations of one layer for what is done, as the plan counts them. Within a unit they
    are counted by proteins."""
    waited_for_input: float = 0.0
    waited_for_output: float = 0.0
    memory: int | None = None
    """Bytes: of a GPU's memory, or of the process."""
    memory_total: int | None = None
    temperature: float | None = None
    """Of the GPU, in degrees Celsius."""
    watts: float | None = None


@dataclass
class Progress:
    """This rank's numbers. Each is written by one thread only; any thread may take a copy."""

    now: RankProgress = field(default_factory=RankProgress)
    on_phase: Callable[[Phase], None] = lambda phase: None
    """Called when a phase begins."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase to the seconds that it took."""
    _began: float = field(default_factory=time.monotonic)

    def enter(self, phase: Phase) -> None:
        """Begin a phase, which ends the one before it."""
        now = time.monotonic()
        before = self.now.phase
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._began
        self._began = now
        self.now.phase = phase.name
        self.on_phase(phase)

    @property
    def seconds_in_phase(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._began
