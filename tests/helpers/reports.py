"""report.json held to its documented schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


def checked_report(output_dir: Path) -> dict:
    """The report.json of a run, which is as the schema says and whose records add up."""
    report = json.loads((output_dir / "report.json").read_text())
    jsonschema.validate(report, SCHEMA, jsonschema.Draft202012Validator)
    records = report["records"]
    outcomes = ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")
    assert records["in"] == sum(records[outcome] for outcome in outcomes)
    return report
