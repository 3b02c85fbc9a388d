"""Where log lines go: to the terminal, from rank 0 and as warnings from all, and to a file for each rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dist_esm.config import Verbosity
from dist_esm.names import printable

log = logging.getLogger("dist_esm")


class Terminal(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment: a live view takes its place while it is shown."""

    def __init__(self, level: int) -> None:
        logging.Handler.__init__(self, level)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Return `sys.stderr`."""
        return sys.stderr


def setup_logging(rank: int, verbosity: Verbosity = Verbosity.normal) -> None:
    """Log to the terminal: INFO from rank 0, warnings from all; under `quiet` warnings, under `debug` all."""
    normal = logging.INFO if rank == 0 else logging.WARNING
    levels = {Verbosity.quiet: logging.WARNING, Verbosity.normal: normal, Verbosity.debug: logging.DEBUG}
    handler = Terminal(levels[verbosity])
    handler.setFormatter(formatter(rank, "%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def formatter(rank: int, date_format: str) -> logging.Formatter:
    """Return what every line has: time, rank and level."""
    return PrintableFormatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", date_format)


@contextmanager
def logging_to_terminal(rank: int, verbosity: Verbosity) -> Iterator[None]:
    """While the block runs, log as `setup_logging` has it; after it as before."""
    before = list(log.handlers), log.level, log.propagate
    setup_logging(rank, verbosity)
    try:
        yield
    finally:
        log.handlers, log.level, log.propagate = before


class PrintableFormatter(logging.Formatter):
    """Keeps every message on its line: a name in it may hold any character."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        """Return the line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextmanager
def logging_to(path: Path, rank: int) -> Iterator[None]:
    """While the block runs, write every line to a file, too. One that cannot be opened is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s: %s: this rank has no log file", path, error.strerror)
        handler = logging.NullHandler()
    handler.setFormatter(formatter(rank, "%Y-%m-%d %H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):  # a disk that is full; a report has to come all the same
            handler.close()


class LogFile(logging.FileHandler):
    """A log file. A disk that does not take a line costs that line, without a word for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Let the line go."""
