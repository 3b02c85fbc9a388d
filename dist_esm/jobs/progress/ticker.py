"""The thread of each rank that looks at how far it is, once a second.

Every rank notes samples for the report's timeline. Rank 0 also shows the run, in a live view on a terminal
and else in a line now and then, and replaces `progress.json`. The thread only reads numbers that others keep,
so nobody waits for it, and a fault in it ends the view, never the run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from dist_esm.attempt import ending_of
from dist_esm.config import Config, Verbosity
from dist_esm.distributed import World
from dist_esm.jobs.progress.lines import line_of
from dist_esm.jobs.progress.state import Overall, Totals, Tracker, as_json, totals_of
from dist_esm.model.device_state import device_state
from dist_esm.outputs.output_dir import OutputDir, inside
from dist_esm.planning.units import Plan
from dist_esm.progress import RankProgress

log = logging.getLogger("dist_esm")

LOOK_SECONDS = 1.0
"""Time between two looks."""
FILE_SECONDS = 3.0
"""Time between two versions of progress.json."""
DEVICE_SECONDS = 2.0
JOIN_SECONDS = 5.0
SAMPLES = 200
"""A sample is taken when the run has grown by a part of so many, so their number grows with its logarithm."""


class View(Protocol):
    """What shows the run on a terminal."""

    def start(self) -> None:
        """Begin."""

    def show(self, overall: Overall, totals: Totals | None, ranks: Sequence[RankProgress]) -> None:
        """Show the run as it is."""

    def stop(self) -> None:
        """End."""


class Ticker:
    """Looks at how far this rank is, and on rank 0 at how far all are, while its block runs.

    Parameters
    ----------
    config
        `verbosity` and `progress_seconds`.
    world
        The ranks.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        self._tracker = Tracker()
        self._began = time.monotonic()
        self._out: OutputDir | None = None
        self._view: View | None = None
        self._last: list[RankProgress] = []
        self._next: dict[str, float] = {"line": config.progress_seconds}
        """When something is due, in seconds since the run began."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._world.is_main and self._config.verbosity is not Verbosity.quiet and is_terminal():
            from dist_esm.jobs.progress.live import LiveView

            view = LiveView()
            view.start()
            self._view = view
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end("aborted")

    def note_output_dir(self, out: OutputDir) -> None:
        """Samples and progress.json go there from now on."""
        self._out = out
        self._sample()

    def note_plan(self, plan: Plan) -> None:
        """Say what there is to do."""
        self._tracker.totals = totals_of(plan, self._config.model.embed_dim)

    def note_last(self, ranks: Sequence[RankProgress]) -> None:
        """Go by what all ranks said when they were done, not by their last signs of life."""
        self._last = list(ranks)

    def end(self, status: str) -> None:
        """Look once more, and clear the view away; later calls do nothing.

        Parameters
        ----------
        status
            How the run ended, for progress.json.
        """
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._thread.join(JOIN_SECONDS)  # a terminal that is held takes nothing
        if self._view is not None:
            self._view.stop()
        if self._out is not None:
            self._sample()
            if self._world.is_main:
                with suppress(OSError):
                    self._write_file(status)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _live(self) -> None:
        ending = ending_of(self._look_until_the_end)
        if ending is not None:
            log.warning("the progress view ended with %s: %s", type(ending).__name__, ending)

    def _look_until_the_end(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        now = self._seconds
        if self._is_due("device", DEVICE_SECONDS):
            state = device_state(self._world.device)
            mine = self._world.progress.now
            mine.memory, mine.memory_total, mine.temperature, mine.watts = state
        if self._out is not None and self._is_due("sample", max(LOOK_SECONDS, now / SAMPLES)):
            self._sample()
        if not self._world.is_main:
            return
        overall, ranks = self._overall()
        if self._view is not None:
            self._view.show(overall, self._tracker.totals, ranks)
        elif self._is_due("line", self._config.progress_seconds):
            log.info("%s", line_of(overall, self._tracker.totals))
        if self._out is not None and self._is_due("file", FILE_SECONDS):
            with suppress(OSError):  # of a disk that is full the outputs tell
                self._write_file("running")

    def _is_due(self, what: str, pause: float) -> bool:
        if self._seconds < self._next.get(what, 0.0):
            return False
        self._next[what] = self._seconds + pause
        return True

    def _overall(self) -> tuple[Overall, list[RankProgress]]:
        ranks = self._last or [told for told in self._world.get_progress() if told is not None]
        return self._tracker.look(ranks, self._seconds), ranks

    def _sample(self) -> None:
        """Note how far this rank is."""
        assert self._out is not None
        mine = self._world.progress.now
        self._out.events.write(
            "sample",
            tokens=mine.tokens,
            proteins=mine.proteins,
            waited_for_input=round(mine.waited_for_input, 3),
            waited_for_output=round(mine.waited_for_output, 3),
            memory=mine.memory,
        )

    def _write_file(self, status: str) -> None:
        """Replace progress.json; it is not synced, since nothing depends on it."""
        assert self._out is not None
        overall, ranks = self._overall()
        about = {"status": status, "launch": self._out.launch, "at": round(time.time(), 3)}
        content = as_json(overall, self._tracker.totals, ranks, **about)
        path = inside(self._out.path) / "progress.json"
        beside: Path = path.with_name(f"progress.{self._out.launch}.tmp")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)


def is_terminal() -> bool:
    """Tell whether a live view can be shown."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
