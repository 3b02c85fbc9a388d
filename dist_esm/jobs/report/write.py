"""The report as files: report.json and failed_files.txt."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from dist_esm.atomic import atomically
from dist_esm.config import Config, plain_values
from dist_esm.jobs.report.content import FORMAT_VERSION, Report
from dist_esm.jobs.report.make import make_report
from dist_esm.jobs.setup import Setup
from dist_esm.model.checkpoints.locate import locate
from dist_esm.outputs.output_dir import OutputDir
from dist_esm.planning.units import Plan
from dist_esm.version import code_version


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "fair-esm", "biopython", "hydra-core", "numpy")
    ours = {"python": platform.python_version(), "dist_esm": code_version()}
    return ours | {name: version(name) for name in names}


def describe_run(report: Report, config: Config, setup: Setup, out: OutputDir) -> None:
    """Add what the run was: configuration, model, kernels and versions."""
    report.launch = out.launch
    report.config = plain_values(config)
    weights = config.model.weights or str(locate(config.model))
    report.model = {"name": config.model.name, "weights_from": weights, **setup.provenance}
    report.kernels = str(setup.kernels)
    report.versions = versions()


def write_running_report(plan: Plan, out: OutputDir, setup: Setup, config: Config) -> None:
    """Put a report of status `running` in the place of an earlier one, until this launch has one of its own.

    It stays when rank 0 dies, so that nobody takes an earlier launch's report for this one's.
    """
    report = make_report(plan, [], plan.joined, "under way, or rank 0 died", 0.0, 0.0)
    report.status = "running"
    report.host, report.pid, report.started = socket.gethostname(), os.getpid(), round(time.time(), 3)
    describe_run(report, config, setup, out)
    (out.path / "failed_files.txt").unlink(missing_ok=True)
    write_json(report, out.path, out.scratch)


def write_report(report: Report, output_dir: Path, scratch: Path | None = None) -> None:
    """Write report.json, and failed_files.txt with a line ``path|error_type|error_message`` for each
    failure."""
    lines = [f"{failure.path}|{failure.error_type}|{failure.error_message}\n" for failure in report.failed]
    with atomically(output_dir / "failed_files.txt", scratch) as beside:
        # A path may be any bytes.
        beside.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
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
