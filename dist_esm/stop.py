"""Why a rank stops before its bin is empty, and signals as such a reason."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

GO_ON = "what is done is kept, run the same command again to go on from there"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""
SHOW_CURSOR = b"\033[?25h\r\n"
"""For a terminal on which a live view ends half way."""
REPEAT_SECONDS = 2.0
"""Signals within so many seconds count once: a scheduler signals every process of a job, and torchrun passes
its own signal on to the ranks."""
DOUBLE_SECONDS = 0.3
"""The same for Ctrl-C in a process without a launcher: what comes sooner is no second key."""


class Stop:
    """Why a rank should stop, if it should. Set from any thread, and by signals; the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.at_once = False
        """Drop what is in flight, rather than finish what has been read."""
        self.is_by_signal = False
        """The reason is a signal, which may only be the echo of what happened to another rank."""
        self.crash: str | None = None
        """A thread of this rank ended early, with this reason."""
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.RLock()  # a signal may come while its own thread holds it
        self._is_patient = False

    def set(self, reason: str, at_once: bool = False) -> None:
        """Ask for a stop."""
        with self._lock:
            self.reason = self.reason or reason
            self.at_once = self.at_once or at_once
        if at_once:
            for call in self._calls:
                call()

    def set_crash(self, reason: str) -> None:
        """A thread of this rank ended early: nothing in flight can be finished."""
        self.crash = self.crash or reason
        self.set(reason, at_once=True)

    def when_at_once(self, call: Callable[[], None]) -> None:
        """Call this, too, when what is in flight is to be dropped; perhaps within a signal, so it must not
        wait."""
        self._calls.append(call)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """While the block runs, a signal sets the reason and leaves the main thread where it is.

        Outside such a block a signal also raises `KeyboardInterrupt` there, since what the main thread is at,
        such as loading a model, does not look at the reason.
        """
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def on_signal(self, reason: str) -> None:
        """Take a signal as the reason."""
        self.is_by_signal = self.reason is None
        self.set(reason, at_once=True)
        if not self._is_patient:
            raise KeyboardInterrupt(reason)


@contextmanager
def stopping() -> Iterator[Stop]:
    """A `Stop` that SIGINT and SIGTERM set while the block runs."""
    stop = Stop()
    with on_signals(stop.on_signal):
        yield stop


@contextmanager
def on_signals(act: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, the first SIGINT or SIGTERM calls ``act("interrupted by SIGTERM")`` in the main
    thread.

    From then on, in the block and after it, another signal that comes after `REPEAT_SECONDS` ends the
    process, and a second Ctrl-C at once. Python gives signals to its main thread, so in another one this does
    nothing.
    """
    if not is_main_thread():
        yield
        return
    first: list[float] = []

    def on_signal(number: int, _frame: object) -> None:
        is_ctrl_c = number == signal.SIGINT
        if not first:
            first.append(time.monotonic())
            _received.append(number)
            act(f"interrupted by {signal.Signals(number).name}")
        elif time.monotonic() - first[0] > (DOUBLE_SECONDS if is_ctrl_c and is_alone() else REPEAT_SECONDS):
            if is_ctrl_c:
                exit_now()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not first:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def signals_as_before() -> Iterator[None]:
    """After the block, signals do what they did before it, also if one came: the program goes on."""
    if not is_main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    num_received = len(_received)
    try:
        yield
    finally:
        del _received[num_received:]
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_main_thread() -> bool:
    """Tell whether this is the thread that Python gives signals to."""
    return threading.current_thread() is threading.main_thread()


_received: list[int] = []
"""Signals that were the first of an `on_signals`."""


def was_ctrl_c() -> bool:
    """Tell whether the first signal that this process took was that of Ctrl-C."""
    return _received[:1] == [signal.SIGINT]


def exit_now() -> NoReturn:
    """End the process as Ctrl-C does, without a word to anything in it."""
    if sys.stderr.isatty():
        os.write(2, SHOW_CURSOR)
    os._exit(INTERRUPTED)


def is_alone() -> bool:
    """Tell whether no launcher passes signals on to this process."""
    return "RANK" not in os.environ


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM end the process: its main thread is not in Python and cannot
    act."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
