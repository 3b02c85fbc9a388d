"""The run in one line, for logs and pipes, and the words that the live view takes from here."""

from __future__ import annotations

from dist_esm.jobs.progress.state import Overall, Totals
from dist_esm.progress import Phase


def line_of(overall: Overall, totals: Totals | None) -> str:
    """Say in one line how far the run is."""
    parts = [Phase[overall.phase].value]
    if totals is not None and overall.share is not None:
        parts[0] += f" {percent(overall.share)}"
        parts.append(f"{overall.files:,} of {totals.files:,} files")
        parts.append(f"{overall.proteins:,} of {totals.proteins:,} proteins")
    if overall.failed:
        parts.append(f"{overall.failed:,} failed")
    if overall.tokens_per_second is not None:
        parts.append(f"{overall.tokens_per_second:,.0f} tokens/s")
    parts.append(f"{duration(overall.seconds)} so far")
    if overall.seconds_left is not None and overall.phase == Phase.embedding.name:
        parts.append(f"about {duration(overall.seconds_left)} left")
    return ", ".join(parts)


def percent(share: float) -> str:
    """Write a share; 100% is said only of all of it."""
    return f"{min(share, 0.999 if share < 1 else 1) * 100:.1f}%".replace("100.0%", "100%")


def duration(seconds: float) -> str:
    """Write a time as people say it: 12 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def gigabytes(num_bytes: int | None, total: int | None) -> str:
    """Write memory in use, and of how much if that is known; "" if it is not known."""
    if num_bytes is None:
        return ""
    used = f"{num_bytes / 2**30:.1f}"
    return f"{used}/{total / 2**30:.0f} GiB" if total else f"{used} GiB"
