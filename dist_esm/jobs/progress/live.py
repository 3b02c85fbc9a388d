"""The live view on a terminal: a line for each rank and a bar for the whole, drawn with rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_esm.jobs.progress.lines import duration, gigabytes, percent
from dist_esm.jobs.progress.state import Overall, Totals
from dist_esm.names import printable
from dist_esm.progress import Phase, RankProgress

MAX_RANKS = 16
"""Ranks that have a line; of more, the slowest are shown."""


class LiveView:
    """Redraws the view in place; what others write to the terminal scrolls by above it."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self._live = Live(
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Take the last lines of the terminal."""
        self._live.start()
        self.console.show_cursor(True)  # a process that is killed cannot show it again

    def show(self, overall: Overall, totals: Totals | None, ranks: Sequence[RankProgress]) -> None:
        """Draw the run as it is."""
        self._live.update(view_of(overall, totals, ranks), refresh=True)

    def stop(self) -> None:
        """Clear the view away."""
        self._live.stop()


def view_of(overall: Overall, totals: Totals | None, ranks: Sequence[RankProgress]) -> Group:
    """Lay the view out: the ranks, the bar, and the run in words."""
    table = Table(box=None, pad_edge=False, expand=True)
    for name, justify, ratio in (
        ("rank", "right", None),
        ("device", "left", 2),
        ("status", "left", 2),
        ("file in hand", "left", 3),
        ("files", "right", None),
        ("proteins", "right", None),
        ("tokens/s", "right", None),
        ("memory", "right", None),
        ("", "right", None),
    ):
        looks: dict[str, Any] = {"justify": justify, "ratio": ratio, "no_wrap": True, "overflow": "ellipsis"}
        table.add_column(name, **looks)
    shown, hidden = ranks_to_show(overall, ranks)
    for rank in shown:
        table.add_row(*map(Text, cells(rank, overall)))
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    share = overall.share or 0.0
    bar.add_row(ProgressBar(total=1.0, completed=share), Text(in_words(overall, totals)))
    more = [Text(f"and {hidden} faster ranks", style="dim")] if hidden else []
    return Group(table, *more, bar)


def ranks_to_show(overall: Overall, ranks: Sequence[RankProgress]) -> tuple[list[RankProgress], int]:
    """Return the ranks that have a line, in order, and how many have none: the fastest of too many."""
    if len(ranks) <= MAX_RANKS:
        return list(ranks), 0
    speeds = overall.rank_tokens_per_second
    slowest = sorted(ranks, key=lambda rank: speeds.get(rank.rank, 0.0))[:MAX_RANKS]
    return sorted(slowest, key=lambda rank: rank.rank), len(ranks) - MAX_RANKS


def cells(rank: RankProgress, overall: Overall) -> list[str]:
    """Return the words of a rank's line."""
    speed = overall.rank_tokens_per_second.get(rank.rank)
    heat = [f"{rank.temperature:.0f} °C"] if rank.temperature is not None else []
    heat += [f"{rank.watts:.0f} W"] if rank.watts is not None else []
    known = rank.phase in Phase.__members__
    return [
        str(rank.rank),
        printable(rank.device),
        Phase[rank.phase].value if known else "",
        printable(PurePath(rank.file).name) if rank.phase == Phase.embedding.name else "",
        f"{int(rank.files + 1e-6):,}" + (f" (-{rank.failed})" if rank.failed else ""),
        f"{rank.proteins:,}",
        "" if speed is None else f"{speed:,.0f}",
        gigabytes(rank.memory, rank.memory_total),
        " ".join(heat),
    ]


def in_words(overall: Overall, totals: Totals | None) -> str:
    """Say beside the bar how far the run is."""
    parts = [Phase[overall.phase].value]
    if totals is not None and overall.share is not None:
        parts = [percent(overall.share), f"{overall.proteins:,}/{totals.proteins:,} proteins"]
    if overall.tokens_per_second is not None:
        parts.append(f"{overall.tokens_per_second:,.0f} tokens/s")
    parts.append(duration(overall.seconds))
    if overall.seconds_left is not None and overall.phase == Phase.embedding.name:
        parts.append(f"{duration(overall.seconds_left)} left")
    return "  ".join(parts)
