"""The launches of one output directory: their numbers, and for each its inputs, its plan and its settings.

A launch's number is one more than the highest on disk, so that launches are in order whatever the clocks of
their hosts say. Version 1 named them by time, in as many digits: these sort first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_esm.atomic import atomically
from dist_esm.outputs.format_version import FORMAT_VERSION, REMEDY, read_json, version_of
from dist_esm.outputs.trust import leads_out
from dist_esm.types import FastaFile
from dist_esm.version import code_version

MOST_LAUNCHES = 10**20 - 1
_NUMBER = re.compile(r"(\d+)\.", re.ASCII)


class LaunchInput(NamedTuple):
    """An input file of a launch."""

    path: str
    """As the launch found it."""
    source: str
    """Relative to the common root of the launch's inputs."""
    output: str
    """Its output relative to `output_dir`, without suffix."""


def folder(output_dir: Path) -> Path:
    """Return the folder that has a file for each launch."""
    return output_dir / ".dist_esm" / "launches"


def next_launch(output_dir: Path) -> int:
    """Return the number of a new launch, from 1. Only whoever holds the directory may ask.

    Raises
    ------
    ValueError
        If there is no number left: names of launches have 20 digits.
    """
    inside = output_dir / ".dist_esm"
    folders = (inside / name for name in ("events", "journal", "launches", "logs", "scratch"))
    paths = [path for folder in folders for path in folder.glob("*.*")]
    numbers = {path: int(match[1]) for path in paths if (match := _NUMBER.match(path.name))}
    launch = max(numbers.values(), default=0) + 1
    if launch > MOST_LAUNCHES:
        last = max(numbers, key=numbers.__getitem__)
        raise ValueError(f"{last} is named for a launch that no run made: {REMEDY}")
    return launch


def record_launch(
    output_dir: Path, launch: int, files: Sequence[FastaFile], scratch: Path, about: Mapping[str, Any]
) -> None:
    """Write down the inputs of a launch, in input order, and what a report says of it beside them.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    inputs = [LaunchInput(str(file.path), file.source, str(file.output))._asdict() for file in files]
    content = {
        "format": FORMAT_VERSION,
        "launch": launch,
        "dist_esm": code_version(),
        "inputs": inputs,
        **about,
    }
    with atomically(folder(output_dir) / f"{launch:020d}.json", scratch) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def read_launch(path: Path) -> dict[str, Any]:
    """Read all that a launch's file holds.

    Raises
    ------
    ValueError
        If the file cannot be understood.
    """
    content: dict[str, Any] = read_json(path)
    version_of(content, path)
    return content


def read_inputs(path: Path) -> list[LaunchInput]:
    """Read the inputs of a launch from its file, in input order.

    Raises
    ------
    ValueError
        If the file cannot be understood.
    """
    content = read_launch(path)
    try:
        inputs = [LaunchInput(**item) for item in content["inputs"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be understood ({error}): {REMEDY}") from None
    if not all(isinstance(text, str) for item in inputs for text in item):
        raise ValueError(f"{path} cannot be understood (a path is no text): {REMEDY}")
    outside = [item.output for item in inputs if leads_out(item.output)]
    if outside:
        raise ValueError(f"{path} cannot be understood ({outside[0]!r} leads out of output_dir): {REMEDY}")
    return inputs


def launch_files(output_dir: Path) -> list[Path]:
    """Return the files of all launches that were planned, the oldest first."""
    return sorted(folder(output_dir).glob("*.json"))
