"""What the ranks did when, of their events: units, phases, waits, and tokens a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_RANKS = 64
MAX_BARS = 1600
"""Bars of all ranks together: units that lie close are drawn as one."""
NUM_LANES = 3
"""Units of a rank overlap, since the next is read while one is embedded; so many have room."""
NUM_INTERVALS = 160
LEAST_WAIT = 0.05
"""Shares of waiting below this are not drawn."""
DRAWN = ("counting", "loading", "compiling", "waiting", "joining")


@dataclass
class Bar:
    """A unit, or several that lie close; seconds since the launch began."""

    start: float
    stop: float
    title: str
    lane: int
    shade: int
    has_failed: bool = False
    num_units: int = 1


@dataclass
class RankTimeline:
    """What one rank did when, in seconds since the launch began."""

    rank: int
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    waits: list[tuple[float, float, float, str]] = field(default_factory=list)
    """From, to, share of this time, and what for: `input` or `output`."""


def timelines(by_rank: Mapping[int, Sequence[Mapping[str, Any]]], started: float) -> list[RankTimeline]:
    """Make the timelines of the ranks.

    Parameters
    ----------
    by_rank
        Events of each rank, in order.
    started
        Unix time of the launch.
    """
    ranks = list(by_rank.items())[:MAX_RANKS]
    end = last_second(by_rank, started)
    least = end * NUM_LANES / max(40, MAX_BARS // max(1, len(ranks)))
    return [timeline_of(rank, events, started, end, least) for rank, events in ranks]


def last_second(by_rank: Mapping[int, Sequence[Mapping[str, Any]]], started: float) -> float:
    """Return the seconds from the launch's beginning to the last event."""
    return max((events[-1]["at"] - started for events in by_rank.values() if events), default=0.0)


def timeline_of(
    rank: int, events: Sequence[Mapping[str, Any]], started: float, end: float, least: float
) -> RankTimeline:
    """Make the timeline of a rank; bars that begin within `least` seconds in one lane become one."""
    timeline = RankTimeline(rank)
    timeline.phases = list(phases_of(events, started, end))
    timeline.bars = merged(bars_of(events, started, end), least)
    samples = [event for event in events if event["event"] == "sample"]
    for earlier, later in pairwise(samples):
        start, stop = earlier["at"] - started, later["at"] - started
        for what in ("input", "output"):
            key = f"waited_for_{what}"
            share = (later[key] - earlier[key]) / max(stop - start, 1e-3)
            if share >= LEAST_WAIT:
                timeline.waits.append((start, stop, min(share, 1.0), what))
    return timeline


def phases_of(
    events: Sequence[Mapping[str, Any]], started: float, end: float
) -> Iterator[tuple[str, float, float]]:
    """Yield the phases of a rank that are drawn: name, from, to."""
    changes = [(event["phase"], event["at"] - started) for event in events if event["event"] == "phase"]
    last = events[-1]["at"] - started if events else end
    for (phase, start), (_, stop) in pairwise([*changes, ("", last)]):
        if phase in DRAWN and stop > start:
            yield phase, start, stop


def bars_of(events: Sequence[Mapping[str, Any]], started: float, end: float) -> Iterator[Bar]:
    """Yield a bar for each unit that a rank began, in the order of their beginnings."""
    endings = {
        (event["file"], event["unit"]): event
        for event in events
        if event["event"] in ("end", "fail") and "unit" in event
    }
    free_from = [0.0] * NUM_LANES
    begun = [event for event in events if event["event"] == "begin"]
    for place, event in enumerate(begun):
        ending = endings.get((event["file"], event["unit"]))
        start = event["at"] - started
        stop = end if ending is None else max(start, ending["at"] - started)
        lane = min(range(NUM_LANES), key=free_from.__getitem__)
        free_from[lane] = max(free_from[lane], stop)
        number = f", unit {event['unit']}" if event["unit"] else ""
        without_end = " (no end)" if ending is None else ""
        has_failed = ending is not None and ending["event"] == "fail"
        yield Bar(start, stop, f"{event['file']}{number}{without_end}", lane, place % 2, has_failed)


def merged(bars: Iterator[Bar], least: float) -> list[Bar]:
    """Join bars of one lane that begin close to each other."""
    kept: list[Bar] = []
    last: dict[int, Bar] = {}
    titles: dict[int, str] = {}
    for bar in bars:
        open_bar = last.get(bar.lane)
        if open_bar is not None and bar.start < open_bar.start + least and bar.stop - bar.start < least:
            open_bar.stop = max(open_bar.stop, bar.stop)
            open_bar.num_units += 1
            open_bar.has_failed |= bar.has_failed
            open_bar.title = f"{titles[id(open_bar)]} and {open_bar.num_units - 1} more units"
        else:
            kept.append(bar)
            last[bar.lane], titles[id(bar)] = bar, bar.title
    return kept


def throughput(
    by_rank: Mapping[int, Sequence[Mapping[str, Any]]], started: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return tokens a second of all ranks over time, of their samples.

    Returns
    -------
    times, shape (N + 1,), and tokens a second between them, shape (N,); None without two samples
    """
    curves = []
    for events in by_rank.values():
        samples = [(event["at"] - started, event["tokens"]) for event in events if event["event"] == "sample"]
        if len(samples) > 1:
            curves.append(np.array(samples, dtype=np.float64).T)
    if not curves:
        return None
    end = max(float(times[-1]) for times, _ in curves)
    num_intervals = max(1, min(NUM_INTERVALS, max(len(times) for times, _ in curves) - 1))
    edges = np.linspace(0.0, end, num_intervals + 1)
    total = np.sum([np.interp(edges, times, tokens, left=0.0) for times, tokens in curves], axis=0)
    return edges, np.diff(total) / np.maximum(np.diff(edges), 1e-9)
