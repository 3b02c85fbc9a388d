"""Threads whose life is visible: started by a ``with`` block, ended with it, and never waited for once they
are dead.

A thread that ends before its work does stops the run with a reason that names it. Whoever waits for a thread
asks in between whether it lives, so no ending of a thread, a `SystemExit` included, leaves another one
waiting for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from dist_esm.attempt import ending_of
from dist_esm.stop import Stop

log = logging.getLogger("dist_esm")

LOOK_SECONDS = 0.2
"""Time between two looks at whether the thread that is waited for lives."""

TASKS = Path("/proc/self/task")
"""The threads of this process as Linux lists them."""

T = TypeVar("T")


class DeadThreadError(RuntimeError):
    """The thread that was waited for is gone; the message names it."""


class Service:
    """One thread of a rank. A subclass says what it does (`work`) and how it is asked to end (`ask_to_end`).

    Parameters
    ----------
    name
        What messages call the thread.
    rank
        The rank that it works for.
    stop
        Set at once when the thread ends early.
    """

    def __init__(self, name: str, rank: int, stop: Stop) -> None:
        self.name = name
        self.rank = rank
        self.stop = stop
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._has_ended_well = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.ask_to_end()
        while self.is_alive:
            self._thread.join(timeout=LOOK_SECONDS)

    @property
    def is_alive(self) -> bool:
        """The thread runs: Python has not seen its end, and the system still knows it.

        A thread that was ended below Python, as by C code that calls ``pthread_exit``, is alive for Python
        for ever.
        """
        if not self._thread.is_alive():
            return False
        task = TASKS / str(self._thread.native_id)
        return not TASKS.is_dir() or task.exists()

    def work(self) -> None:
        """Do everything, in the thread."""
        raise NotImplementedError

    def ask_to_end(self) -> None:
        """Make `work` return soon. Called from another thread, and also when the thread is dead."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise if the thread is gone before its work was done.

        Raises
        ------
        DeadThreadError
            Naming the thread.
        """
        if not self.is_alive and not self._has_ended_well:
            reason = f"the {self.name} thread of rank {self.rank} is gone"
            self.stop.set_crash(reason)
            raise DeadThreadError(self.stop.reason or reason)

    def _live(self) -> None:
        ending = ending_of(self.work)
        if ending is None:
            self._has_ended_well = True
            return
        reason = describe_ending(f"the {self.name} thread", self.rank, ending)
        self.stop.set_crash(reason)
        log.error("%s", reason, exc_info=None if isinstance(ending, DeadThreadError) else ending)


def describe_ending(who: str, rank: int, ending: BaseException) -> str:
    """One line that names a thread, its rank, and what ended it."""
    if isinstance(ending, DeadThreadError):
        return str(ending)
    message = " ".join(str(ending).split())
    return f"{who} of rank {rank} ended with {type(ending).__name__}" + (f": {message}" if message else "")


def put(items: queue.Queue[T], item: T, check: Callable[[], None]) -> None:
    """Put an item into a bounded queue; `check` is called now and then, and raises if there is no use in
    waiting."""
    while True:
        try:
            return items.put(item, timeout=LOOK_SECONDS)
        except queue.Full:
            check()


def get(items: queue.Queue[T] | queue.SimpleQueue[T], check: Callable[[], None]) -> T:
    """Take an item from a queue; `check` is called now and then, and raises if there is no use in waiting.

    What was put before the thread died is still given out.
    """
    while True:
        try:
            return items.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            if items.empty():
                check()


def acquire(semaphore: threading.Semaphore, check: Callable[[], None]) -> None:
    """Take a semaphore; `check` as in `put`."""
    while not semaphore.acquire(timeout=LOOK_SECONDS):
        check()
