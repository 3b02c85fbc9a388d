"""report.html: the report as one page that needs nothing beside itself.

It has no script, and its policy forbids the browser to load or run anything, so that no name of a file or a
protein can do harm. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_esm.jobs.progress.lines import duration
from dist_esm.jobs.report.again import command_again
from dist_esm.jobs.report.charts import (
    NUM_COLOURS,
    NUM_LENGTHS,
    counts_chart,
    legend,
    lengths_chart,
    map_chart,
    table,
    throughput_chart,
    timeline_chart,
)
from dist_esm.jobs.report.content import OUTCOMES, Report
from dist_esm.jobs.report.sample import Sample, principal_components
from dist_esm.jobs.report.summary import REMEDIES, lines_on_letters, lines_on_weights, reading
from dist_esm.jobs.report.svg import short, text_of
from dist_esm.jobs.report.timeline import MAX_RANKS, last_second, throughput, timelines

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
MAX_FAILURES = 50
RANK_HEAD = (
    *("rank", "host", "device", "status"),
    *("files", "proteins", "tokens", "tokens/s", "padding", "compute", "wait", "write", "load"),
)
SAID = ("model", "dist_esm")
"""What is said of the model and elsewhere, too."""
LEAST_POINTS = 3
"""Proteins for a map."""

Events = Mapping[int, Sequence[Mapping[str, Any]]]


def page(report: Report, output_dir: Path, events: Events, sample: Sample) -> str:
    """Return the page.

    Parameters
    ----------
    report
        What to show.
    output_dir
        Of the run.
    events
        Of its launch, by rank.
    sample
        Of its embeddings.
    """
    sections = [
        header(report, output_dir),
        tiles(report),
        timeline_section(report, events),
        '<div class="grid">',
        throughput_section(report, events),
        lengths_section(report, sample),
        outcomes_section(report),
        map_section(report, sample),
        "</div>",
        failures_section(report),
        ranks_section(report),
        next_section(report, output_dir),
        facts_section(report),
    ]
    title = text_of(f"{report.status}: {output_dir}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>"
        f"</head><body>{''.join(sections)}</body></html>\n"
    )


def section(title: str, *parts: str, name: str = "") -> str:
    """Return a part of the page with its heading."""
    mark = f' id="{name}"' if name else ""
    return f"<section{mark}><h2>{text_of(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, kind: str = "dim") -> str:
    """Return a paragraph."""
    return f'<p class="{kind}">{text_of(text)}</p>'


def header(report: Report, output_dir: Path) -> str:
    """Say what run this is and how it ended."""
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.started))
    model = report.model.get("name", "")
    parts = [
        f'<h1>{text_of(output_dir)} <span class="status {report.status}">{report.status}</span></h1>',
        paragraph(f"{model}, launch {report.launch}, started {started}, took {duration(report.seconds)}"),
    ]
    parts += [paragraph(line, "note") for line in lines_on_weights(report)]
    if report.reason:
        parts.append(paragraph(f"stopped: {report.reason}", "note"))
    return f"<header>{''.join(parts)}</header>"


def tiles(report: Report) -> str:
    """Return the few numbers that people look for first."""
    records = report.records
    embedded = sum(records[outcome] for outcome in ("ok", "truncated", "windowed"))
    tokens = sum(rank["tokens"] for rank in report.ranks)
    shown = [
        (f"{len(report.files):,} of {report.num_files:,}", "files embedded"),
        (f"{embedded:,} of {records['in']:,}", "proteins embedded"),
        (f"{records['residues']:,}", "residues embedded"),
        (f"{len(report.failed):,}", "files failed"),
        (f"{tokens / report.embedding_seconds:,.0f}", "tokens a second"),
    ]
    if in_parts := report.unfinished.get("sequences"):
        shown.insert(2, (f"{in_parts:,}", "proteins in parts of files that are not whole yet"))
    items = "".join(f"<li><b>{text_of(number)}</b>{text_of(name)}</li>" for number, name in shown)
    return f'<ul class="tiles">{items}</ul>'


def timeline_section(report: Report, events: Events) -> str:
    """Show what each rank did when."""
    ranks = timelines(events, report.started)
    if not ranks:
        return ""
    chart = timeline_chart(ranks, last_second(events, report.started))
    colours = legend(
        [
            ("bar0", "a unit, from its first record to its output"),
            ("failed", "a unit that failed"),
            ("counting", "counting"),
            ("loading", "loading"),
            ("compiling", "compiling"),
            ("waiting", "waiting for other ranks"),
            ("joining", "joining"),
            ("wait-input", "waiting for input"),
            ("wait-output", "waiting for outputs"),
        ]
    )
    more = paragraph(f"The first {MAX_RANKS} of {len(events)} ranks.") if len(events) > MAX_RANKS else ""
    return section("What each rank did when", f'<div class="wide">{chart}</div>', colours, more)


def throughput_section(report: Report, events: Events) -> str:
    """Show tokens a second over time."""
    curve = throughput(events, report.started)
    return section("Tokens a second", throughput_chart(*curve)) if curve is not None else ""


def lengths_section(report: Report, sample: Sample) -> str:
    """Show the lengths of proteins."""
    if not sample.lengths:
        return ""
    num_outputs = sum(len(entry.outputs) for entry in report.files)
    of_what = "of all proteins" if sample.num_outputs == num_outputs else f"of {sample.num_outputs:,} outputs"
    note = paragraph(f"Residues that embeddings were made of, {of_what}: {len(sample.lengths):,} proteins.")
    return section("Lengths", lengths_chart(np.array(sample.lengths)), note)


def outcomes_section(report: Report) -> str:
    """Show what became of the records."""
    records = report.records
    counts = [(name.replace("_", " "), records[name]) for name in OUTCOMES if records[name]]
    counts += [(f"skipped: {reason}", number) for reason, number in records["skipped_by_reason"].items()]
    notes = [paragraph(line) for line in lines_on_letters(report)]
    chart = counts_chart(counts, "outcome", "records by outcome")
    return section("What became of the records", chart, *notes) if counts else ""


def map_section(report: Report, sample: Sample) -> str:
    """Show a sample of the embeddings in two dimensions."""
    if len(sample.ids) < LEAST_POINTS:
        return ""
    points, shares = principal_components(np.stack(sample.vectors))
    common = [source for source, _ in Counter(sample.sources).most_common(NUM_COLOURS)]
    files = [common.index(source) if source in common else NUM_COLOURS for source in sample.sources]
    lengths = np.array(sample.point_lengths)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_LENGTHS + 1)[1:-1]).astype(int))
    classes = np.searchsorted(edges, lengths, side="left").tolist()
    names = [
        f"{short(name)}: {length} residues, {short(source)}"
        for name, length, source in zip(sample.ids, sample.point_lengths, sample.sources, strict=True)
    ]
    by_file = [(f"f{place}", short(source, 40)) for place, source in enumerate(common)]
    by_file += [(f"f{NUM_COLOURS}", "other files")] if NUM_COLOURS in files else []
    bounds = [*edges.tolist(), int(lengths.max())]
    by_length = [(f"l{place}", f"up to {bound} residues") for place, bound in enumerate(bounds)]
    is_random = bool(lines_on_weights(report))
    explained = f"{shares[0]:.0%} and {shares[1]:.0%} of the variance"
    return section(
        "Map of the embeddings",
        *([paragraph("The weights are random, so this map means nothing.", "note")] if is_random else []),
        '<p><label><input type="radio" name="colour" id="by-file" checked> by file</label> '
        '<label><input type="radio" name="colour" id="by-length"> by length</label></p>',
        map_chart(points, names, files, classes),
        legend(by_file, "legend by-file"),
        legend(by_length, "legend by-length"),
        paragraph(f"Means of {len(names):,} proteins, their first two principal components ({explained})."),
        name="map",
    )


def failures_section(report: Report) -> str:
    """Show what failed and why."""
    if not report.failed:
        return ""
    counts = Counter(failure.error_type for failure in report.failed).most_common()
    rows = [
        (short(failure.path, 120), failure.error_type, short(failure.error_message, 300))
        for failure in report.failed[:MAX_FAILURES]
    ]
    more = len(report.failed) - len(rows)
    return section(
        "Failures",
        counts_chart(counts, "reason", "failures by reason"),
        table(("file", "error", "message"), rows),
        paragraph(f"And {more:,} more, all in failed_files.txt.") if more else "",
        name="failures",
    )


def ranks_section(report: Report) -> str:
    """Show what each rank did."""
    if not report.ranks:
        return ""
    rows = [tuple(rank_cells(rank)) for rank in report.ranks]
    return section("Ranks", table(RANK_HEAD, rows, first_number=4), name="ranks")


def rank_cells(rank: Mapping[str, Any]) -> Iterator[object]:
    """Yield the cells of a rank's row."""
    yield from (rank["rank"], rank["host"], rank["device"], rank["status"])
    yield from (f"{rank[key]:,}" for key in ("files", "sequences", "tokens"))
    yield f"{rank['tokens_per_second']:,.0f}"
    rows = rank["padding"] + rank["tokens"]
    yield f"{rank['padding'] / rows:.1%}" if rows else ""
    waits = sum(rank.get(key, 0.0) for key in ("waited_for_input", "waited_for_output"))
    waits += rank["phases"].get("waiting", 0.0)
    load = sum(rank["phases"].get(phase, 0.0) for phase in ("loading", "compiling"))
    for seconds in (rank["compute_seconds"], waits, rank["write_seconds"], load):
        yield f"{seconds:,.1f} s"


def next_section(report: Report, output_dir: Path) -> str:
    """Say what to do next."""
    parts = []
    if report.reason or report.failed:
        kinds = dict.fromkeys(failure.error_type for failure in report.failed)
        parts += [paragraph(f"{kind}: {REMEDIES[kind]}.", "plain") for kind in kinds if kind in REMEDIES]
        parts.append(paragraph("Then the same command goes on from what is done:", "plain"))
        parts.append(f"<pre>{text_of(command_again(report.config, len(report.ranks)))}</pre>")
    if report.files:
        parts.append(paragraph("Read it back:", "plain"))
        code = "\n".join(text_of(line) for line in reading(output_dir))
        parts.append(f"<pre>{code}</pre>")
    return section("Next", *parts) if parts else ""


def facts_section(report: Report) -> str:
    """Say what the numbers depend on."""
    facts = {
        **{key.replace("_", " "): value for key, value in report.model.items() if key not in SAID},
        "kernels": report.kernels,
        **report.versions,
    }
    items = "".join(
        f"<dt>{text_of(key)}</dt><dd>{text_of(short(str(value), 300))}</dd>" for key, value in facts.items()
    )
    return section("What the numbers depend on", f"<dl>{items}</dl>")
