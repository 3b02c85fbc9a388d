"""The append-only record of what each rank began and ended, and when, for the report and its timeline.

The journal says what is done; this says the rest: which units were begun, what failed, how far a rank was,
and how it ended. It is for people: nothing that is computed depends on it, so lines are not synced, and a
disk that is full costs lines, never the run. Every rank of every launch has a file of its own, whose first
line has its format version. A line is an object with `at` (Unix time) and `event`:

- ``start``: `format`, `rank`, `host`, `pid`, `device`
- ``phase``: `phase`, a name of `Phase`
- ``begin``, ``end``: of a unit: `file` (the output, without suffix) and `unit`; at its end `sequences`
- ``fail``: the same of a unit that failed, and `failure`; without `unit`, of a file that could not be joined
- ``sample``: how far the rank is, every few seconds, seldomer as it goes on: `tokens`, `proteins`, seconds of
  waits, `memory`
- ``summary``: the rank's own account of its work
- ``conclude``: on rank 0 alone: `reason`, `seconds`, `embedding_seconds`, `phases`
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from dist_esm.outputs.format_version import FORMAT_VERSION, version_of
from dist_esm.outputs.lines import encode, whole_lines

log = logging.getLogger("dist_esm")


def folder(output_dir: Path) -> Path:
    """Return the folder of the files of events."""
    return output_dir / ".dist_esm" / "events"


class Events:
    """This rank's events, for appending from any thread.

    Parameters
    ----------
    output_dir
        Of the run.
    launch, rank
        Name the file.
    """

    def __init__(self, output_dir: Path, launch: int, rank: int) -> None:
        self.path = folder(output_dir) / f"{launch:020d}.{rank:05d}.jsonl"
        self._lock = threading.Lock()
        self._file: int | None = None
        self._is_torn = False
        self._has_failed = False

    def write(self, event: str, **details: Any) -> None:
        """Append a line. A disk that does not take it is said once, in a warning."""
        line = encode({"at": round(time.time(), 3), "event": event, **details})
        with self._lock:
            try:
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                block = b"\n" + line if self._is_torn else line
                self._is_torn = os.write(self._file, block) != len(block)
            except OSError as error:
                self._is_torn = True
                if not self._has_failed:
                    log.warning(
                        "%s: %s: the report will lack what it would have held", self.path, error.strerror
                    )
                self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def read(output_dir: Path, launch: int) -> dict[int, list[dict[str, Any]]]:
    """Read the events of a launch, by rank, in the order in which they were written.

    Raises
    ------
    ValueError
        If they are of a later version, in one line that names the file.
    """
    ranks: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder(output_dir).glob(f"{launch:020d}.*.jsonl")):
        events = [json.loads(line) for line in whole_lines(path)]
        for event in events:
            if event["event"] == "start":
                version_of(event, path)
        ranks[int(path.name.split(".")[1])] = events
    return ranks


def start_details() -> dict[str, Any]:
    """Return what every `start` says."""
    return {"format": FORMAT_VERSION, "pid": os.getpid()}
