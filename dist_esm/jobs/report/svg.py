"""Just enough SVG for the report's charts. Colours are classes, which the page's style sheet knows.

Whatever text comes in is escaped here, so no name of a file or a protein can become a tag.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from dist_esm.names import printable

MAX_NAME = 80
"""Letters of a name; of a longer one the ends are shown."""


def text_of(text: object) -> str:
    """Return text as HTML and SVG can hold it."""
    return html.escape(printable(str(text)), quote=True)


def short(name: str, most: int = MAX_NAME) -> str:
    """Return the two ends of a name that is too long."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def number(value: float) -> str:
    """Write a coordinate in as few characters as it needs."""
    return f"{value:.1f}".removesuffix(".0")


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """Return a drawing of this size, which fills the width it is given; `label` says what it shows."""
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{text_of(label)}">'
        f"{''.join(parts)}</svg>"
    )


def rect(
    x: float, y: float, width: float, height: float, kind: str, title: str = "", opacity: float = 1.0
) -> str:
    """Return a rectangle of class `kind`, with what is shown when the mouse is over it."""
    faint = f' opacity="{opacity:.2f}"' if opacity < 1 else ""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    inside = f"<title>{text_of(title)}</title>" if title else ""
    return f'<rect class="{kind}" {place}{faint}>{inside}</rect>'


def circle(x: float, y: float, radius: float, kind: str, title: str) -> str:
    """Return a dot of class `kind`, with its name."""
    place = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
    return f'<circle class="{kind}" {place}><title>{text_of(title)}</title></circle>'


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Return a line through points."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> str:
    """Return text at a place."""
    return (
        f'<text class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{text_of(text)}</text>'
    )


def ticks(highest: float, most: int = 5) -> list[float]:
    """Return round numbers from 0 up to a number.

    Examples
    --------
    >>> ticks(1022)
    [0.0, 250.0, 500.0, 750.0, 1000.0]
    """
    if not highest > 0:
        return [0.0]
    rough = highest / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [step * place for place in range(int(highest / step + 1e-9) + 1)]


def in_short(value: float) -> str:
    """Write a number as an axis has room for it: 950, 1.2k, 3M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"
