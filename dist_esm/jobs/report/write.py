"""The report as files: report.json and failed_files.txt."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dist_esm.atomic import atomically
from dist_esm.config import Config, plain_values
from dist_esm.jobs.report.content import FORMAT_VERSION, Ending, Report
from dist_esm.jobs.report.make import make_report
from dist_esm.jobs.setup import Setup
from dist_esm.model.checkpoints.locate import locate
from dist_esm.names import escaped_field
from dist_esm.outputs.output_dir import OutputDir
from dist_esm.planning.inputs import Inputs
from dist_esm.planning.recorded import record_of
from dist_esm.planning.units import Plan
from dist_esm.version import code_version

UNDER_WAY = "under way, or rank 0 died"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "fair-esm", "biopython", "hydra-core", "numpy")
    ours = {"python": platform.python_version(), "dist_esm": code_version()}
    return ours | {name: version(name) for name in names}


def about_launch(plan: Plan, config: Config, setup: Setup, inputs: Inputs, started: float) -> dict[str, Any]:
    """Return what a launch is, for its record in the output directory, and from there for its reports."""
    weights = config.model.weights or str(locate(config.model))
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(started, 3),
        "config": plain_values(config),
        "model": {"name": config.model.name, "weights_from": weights, **setup.provenance},
        "kernels": str(setup.kernels),
        "versions": versions(),
        "passed_over": inputs.report(),
        "plan": record_of(plan),
    }


OF_LAUNCH = ("host", "pid", "started", "config", "model", "kernels", "versions", "passed_over")
"""What a report takes of a launch's record as it is."""


def describe_launch(report: Report, about: Mapping[str, Any], launch: int) -> None:
    """Add what the launch was: configuration, model, kernels and versions."""
    report.launch = launch
    for key in OF_LAUNCH:
        setattr(report, key, about[key])


def write_running_report(plan: Plan, about: Mapping[str, Any], out: OutputDir) -> None:
    """Put a report of status `running` in the place of an earlier one, until this launch has one of its own.

    It stays when rank 0 dies, so that nobody takes an earlier launch's report for this one's.
    """
    report = make_report(plan, [], plan.joined, Ending(UNDER_WAY, 0.0, 0.0, {}))
    report.status = "running"
    describe_launch(report, about, out.launch)
    (out.path / "failed_files.txt").unlink(missing_ok=True)
    with suppress(OSError):
        (out.path / "report.html").unlink()
    write_json(report, out.path, out.scratch)


def write_report(report: Report, output_dir: Path, scratch: Path | None = None) -> None:
    """Write report.json, and failed_files.txt with a line ``path|error_type|error_message`` for each failure,
    if there is one."""
    fields = ((failure.path, failure.error_type, failure.error_message) for failure in report.failed)
    lines = ["|".join(map(escaped_field, of_failure)) + "\n" for of_failure in fields]
    if lines:
        with atomically(output_dir / "failed_files.txt", scratch) as beside:
            beside.write_text("".join(lines), encoding="utf-8")
    else:
        (output_dir / "failed_files.txt").unlink(missing_ok=True)
    write_json(report, output_dir, scratch)


def write_json(report: Report, output_dir: Path, scratch: Path | None) -> None:
    """Write report.json."""
    content = {"format_version": FORMAT_VERSION, **asdict(report)}
    for entry in content["files"]:
        tally = entry.pop("tally")
        entry["records"] = tally["outcomes"]
        for key in (
            "skipped",
            "changed",
            "replaced",
            "duplicate_ids",
            "unnamed",
            "windows",
            "deduplicated",
        ):
            entry[key] = tally[key]
    with atomically(output_dir / "report.json", scratch) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
