"""The charts of report.html, each of plain values; `svg` draws them, the style sheet colours them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_esm.jobs.progress.lines import duration
from dist_esm.jobs.report.svg import circle, in_short, label, line, rect, short, svg, text_of, ticks
from dist_esm.jobs.report.timeline import RankTimeline

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460.0, 230.0, 52.0, 30.0, 12.0
"""Of a chart, and of the room for its axes, in units that the browser scales."""
RIGHT = 20.0
"""Room behind the last number of an axis."""
WIDE = 960.0
ROW, ROW_LEFT = 40.0, 62.0
"""Of the timeline: height of a rank, room for its name."""
NUM_BINS = 32
MAX_REASONS = 8
NUM_COLOURS = 8
"""Files that have a colour of their own on the map."""
NUM_LENGTHS = 6
"""Colours for lengths."""


def timeline_chart(ranks: Sequence[RankTimeline], seconds: float) -> str:
    """Draw what each rank did when: phases, units, and under them its waits."""
    scale = (WIDE - ROW_LEFT - RIGHT) / max(seconds, 1e-3)
    bottom = TOP + len(ranks) * ROW
    rows = range(len(ranks))
    parts = [rect(ROW_LEFT, TOP + place * ROW, seconds * scale, ROW - 6, "row") for place in rows]
    for tick in ticks(seconds, 8):
        x = ROW_LEFT + tick * scale
        words = f"{tick:.2g} s" if 0 < tick < 10 else duration(tick)
        parts += [line([(x, TOP), (x, bottom)], "scale"), label(x, bottom + 14, words, "middle")]
    for place, rank in enumerate(ranks):
        top = TOP + place * ROW
        parts.append(label(ROW_LEFT - 8, top + 20, f"rank {rank.rank}", "end"))
        for phase, start, stop in rank.phases:
            title = f"rank {rank.rank}: {phase}, {duration(stop - start)}"
            width = max((stop - start) * scale, 0.5)
            parts.append(rect(ROW_LEFT + start * scale, top, width, ROW - 6, f"phase {phase}", title))
        for bar in rank.bars:
            kind = "bar failed" if bar.has_failed else f"bar bar{bar.shade}"
            title = f"{short(bar.title)}, {duration(bar.stop - bar.start)}"
            width = max((bar.stop - bar.start) * scale, 1.2)
            x, y = ROW_LEFT + bar.start * scale, top + 3 + bar.lane * 8
            parts.append(rect(x, y, width, 7, kind, title))
        for start, stop, share, what in rank.waits:
            title = f"rank {rank.rank}: {share:.0%} of this time waiting for {what}"
            x, width = ROW_LEFT + start * scale, (stop - start) * scale
            parts.append(rect(x, top + ROW - 11, width, 5, f"wait-{what}", title, max(0.15, share)))
    return svg(WIDE, bottom + 22, "what each rank did when", parts)


def axes(highest_x: float, highest_y: float, x_label: str, first_x: float = 0.0) -> list[str]:
    """Draw the axes of a chart of `WIDTH` by `HEIGHT`."""
    parts = []
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in ticks(highest_y, 4):
        y = bottom - tick / max(highest_y, 1e-9) * (bottom - TOP)
        parts += [line([(LEFT, y), (right, y)], "scale"), label(LEFT - 6, y + 4, in_short(tick), "end")]
    span = max(highest_x - first_x, 1e-9)
    for tick in ticks(highest_x, 5):
        if tick >= first_x:
            x = LEFT + (tick - first_x) / span * (right - LEFT)
            parts.append(label(x, bottom + 15, in_short(tick), "middle"))
    return [*parts, label(right, HEIGHT - 2, x_label, "end", "label dim")]


def throughput_chart(times: NDArray[np.float64], speeds: NDArray[np.float64]) -> str:
    """Draw tokens a second over time.

    Parameters
    ----------
    times
        Edges of the intervals, in seconds, shape (N + 1,).
    speeds
        Tokens a second in each, shape (N,).
    """
    highest = float(speeds.max(initial=0.0)) * 1.05 or 1.0
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    span = max(float(times[-1]), 1e-9)
    points: list[tuple[float, float]] = []
    for start, stop, speed in zip(times[:-1], times[1:], speeds, strict=True):
        y = bottom - float(speed) / highest * (bottom - TOP)
        points += [(LEFT + float(x) / span * (right - LEFT), y) for x in (start, stop)]
    parts = [*axes(span, highest, "seconds"), line(points, "curve")]
    return svg(WIDTH, HEIGHT, "tokens a second over time", parts)


def lengths_chart(lengths: NDArray[np.int64]) -> str:
    """Draw how many proteins have how many residues."""
    highest_x = float(lengths.max(initial=1))
    counts, edges = np.histogram(lengths, NUM_BINS, (0.0, highest_x + 1))
    highest = float(counts.max(initial=0)) * 1.05 or 1.0
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    scale = (right - LEFT) / float(edges[-1])
    parts = axes(float(edges[-1]), highest, "residues")
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        height = float(count) / highest * (bottom - TOP)
        title = f"{int(count):,} proteins of {int(np.ceil(start))} to {int(np.ceil(stop)) - 1} residues"
        x, width = LEFT + float(start) * scale, max((stop - start) * scale - 1, 0.5)
        if count:
            parts.append(rect(x, bottom - height, float(width), height, "column", title))
    return svg(WIDTH, HEIGHT, "proteins by length", parts)


def counts_chart(counts: Sequence[tuple[str, int]], kind: str, what: str) -> str:
    """Draw a bar for each of a few numbers, with its name over it."""
    shown = list(counts[:MAX_REASONS])
    rest = sum(count for _, count in counts[MAX_REASONS:])
    shown += [("others", rest)] if rest else []
    highest = max((count for _, count in shown), default=1)
    parts = []
    for place, (name, count) in enumerate(shown):
        y = TOP + place * 34
        width = count / highest * (WIDTH - 90)
        parts.append(label(4, y + 8, short(name, 60)))
        parts.append(rect(4, y + 13, max(width, 1.5), 11, kind, f"{name}: {count:,}"))
        parts.append(label(10 + max(width, 1.5), y + 23, f"{count:,}"))
    return svg(WIDTH, TOP + len(shown) * 34, what, parts)


def map_chart(
    points: NDArray[np.float64], names: Sequence[str], files: Sequence[int], lengths: Sequence[int]
) -> str:
    """Draw a dot for each protein.

    Parameters
    ----------
    points
        Shape (N, 2).
    names
        What is shown when the mouse is over each.
    files, lengths
        Number of the colour of each, when they are coloured by file and by length.
    """
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / np.maximum(high - low, 1e-12)
    size, edge = WIDTH, 12.0
    parts = [rect(0, 0, size, size * 0.8, "row")]
    for (x, y), name, file, length in zip(scaled, names, files, lengths, strict=True):
        place = edge + float(x) * (size - 2 * edge), edge + (1 - float(y)) * (size * 0.8 - 2 * edge)
        parts.append(circle(*place, 3, f"f{file} l{length}", name))
    return svg(size, size * 0.8, "map of the embeddings", parts)


def legend(entries: Sequence[tuple[str, str]], kind: str = "legend") -> str:
    """Return a list of colours with what they mean: pairs of class and text."""
    items = "".join(
        f'<li><span class="swatch {colour}"></span>{text_of(text)}</li>' for colour, text in entries
    )
    return f'<ul class="{kind}">{items}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], first_number: int | None = None) -> str:
    """Return a table; columns from `first_number` on are set to the right."""

    def is_number(place: int) -> bool:
        return first_number is not None and place >= first_number

    def row(cells: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if is_number(place) else ''}>{text_of(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    top = f"<thead><tr>{row(head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'
