"""Writes report.html; a page that cannot be drawn costs a warning, never the run."""

from __future__ import annotations

import logging
from pathlib import Path

from dist_esm.atomic import atomically
from dist_esm.attempt import as_value
from dist_esm.jobs.report.content import Report
from dist_esm.jobs.report.page import page
from dist_esm.jobs.report.sample import read_sample
from dist_esm.outputs import events

log = logging.getLogger("dist_esm")


def draw_page(report: Report, output_dir: Path) -> None:
    """Write report.html of a report and of what the output directory holds, or warn that it cannot be."""
    error = as_value(write_page, report, output_dir)
    if isinstance(error, Exception):
        reason = f"{type(error).__name__}: {error}"
        log.warning("report.html cannot be written (%s): report.json has all that it would say", reason)


def write_page(report: Report, output_dir: Path) -> None:
    """Write report.html.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    outputs = [output_dir / output for entry in report.files for output in entry.outputs]
    text = page(report, output_dir, events.read(output_dir, report.launch), read_sample(outputs))
    with atomically(output_dir / "report.html") as beside:
        beside.write_text(text, encoding="utf-8")
