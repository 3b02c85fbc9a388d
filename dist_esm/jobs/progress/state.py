"""How far the run is, of what the ranks say: share done by cost, speed and time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_esm.planning.units import Plan
from dist_esm.progress import Phase, RankProgress

FORMAT_VERSION = 1
"""Of progress.json."""
WINDOW_SECONDS = 60.0
"""Speed is what was done in so many seconds."""
LEAST_SECONDS = 2.0
"""A speed over less time says nothing."""


@dataclass(frozen=True)
class Totals:
    """What there is to do, and what earlier launches did of it."""

    files: int
    proteins: int
    cost: int
    files_before: int
    proteins_before: int
    cost_before: int


def totals_of(plan: Plan, embed_dim: int) -> Totals:
    """Return what a plan comes to."""
    done = {(result.file, result.ordinal) for result in plan.done}
    before = [unit for unit in plan.units if (unit.file, unit.ordinal) in done]
    open_files = {unit.file for unit in plan.units if (unit.file, unit.ordinal) not in done}
    return Totals(
        files=len(plan.files),
        proteins=sum(unit.count.sequences for unit in plan.units),
        cost=sum(unit.count.flops(embed_dim) for unit in plan.units),
        files_before=len(plan.files) - len(open_files),
        proteins_before=sum(unit.count.sequences for unit in before),
        cost_before=sum(unit.count.flops(embed_dim) for unit in before),
    )


@dataclass(frozen=True)
class Overall:
    """The whole run at one moment."""

    phase: str
    share: float | None
    """Of the cost of all units, what is done; None before the plan is made."""
    files: int
    failed: int
    proteins: int
    tokens: int
    tokens_per_second: float | None
    """Over the last minute."""
    rank_tokens_per_second: dict[int, float]
    seconds: float
    """Since the run began."""
    seconds_left: float | None


class Tracker:
    """Makes of what the ranks say how fast they are and how long it will take."""

    def __init__(self) -> None:
        self.totals: Totals | None = None
        """None before the plan is made."""
        self._past: deque[tuple[float, float, dict[int, int]]] = deque()
        """Time, cost, and tokens by rank, the oldest first."""

    def look(self, ranks: Sequence[RankProgress], now: float) -> Overall:
        """Take what the ranks say at a time, in seconds since the run began."""
        cost = sum(rank.cost for rank in ranks)
        tokens = {rank.rank: rank.tokens for rank in ranks}
        if sum(tokens.values()):
            self._past.append((now, cost, tokens))
        while len(self._past) > 2 and now - self._past[1][0] >= WINDOW_SECONDS:
            self._past.popleft()
        began, cost_then, tokens_then = self._past[0] if self._past else (now, cost, tokens)
        seconds = now - began
        speeds: dict[int, float] = {}
        if seconds >= LEAST_SECONDS:
            speeds = {
                rank: max(0, number - tokens_then.get(rank, 0)) / seconds for rank, number in tokens.items()
            }
        totals = self.totals
        share = seconds_left = None
        if totals is not None:
            done = min(totals.cost, totals.cost_before + cost)
            share = done / totals.cost if totals.cost else 1.0
            if seconds >= LEAST_SECONDS and cost > cost_then:
                seconds_left = (totals.cost - done) * seconds / (cost - cost_then)
        return Overall(
            phase=phase_of(ranks),
            share=share,
            files=int((totals.files_before if totals else 0) + sum(rank.files for rank in ranks) + 1e-6),
            failed=sum(rank.failed for rank in ranks),
            proteins=(totals.proteins_before if totals else 0) + sum(rank.proteins for rank in ranks),
            tokens=sum(tokens.values()),
            tokens_per_second=sum(speeds.values()) if speeds else None,
            rank_tokens_per_second=speeds,
            seconds=now,
            seconds_left=seconds_left,
        )


def phase_of(ranks: Sequence[RankProgress]) -> str:
    """Return what the run is at: what the last of its ranks is at."""
    order = [phase.name for phase in Phase]
    return min((rank.phase for rank in ranks if rank.phase in order), key=order.index, default=order[0])


def as_json(
    overall: Overall, totals: Totals | None, ranks: Sequence[RankProgress], **about: Any
) -> dict[str, Any]:
    """Return what progress.json holds."""
    values = asdict(overall)
    speeds = values.pop("rank_tokens_per_second")
    for key in ("share", "seconds", "tokens_per_second", "seconds_left"):
        values[key] = None if values[key] is None else round(values[key], 4 if key == "share" else 1)
    return {
        "format_version": FORMAT_VERSION,
        **about,
        **values,
        "of_files": totals.files if totals else None,
        "of_proteins": totals.proteins if totals else None,
        "ranks": [
            {
                **asdict(rank),
                "files": round(rank.files, 3),
                "cost": round(rank.cost),
                "tokens_per_second": round(speeds[rank.rank], 1) if rank.rank in speeds else None,
            }
            for rank in ranks
        ],
    }
