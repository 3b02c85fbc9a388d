"""Threads that end before their work does: whoever waits for them is told, and the run stops."""

from __future__ import annotations

import ctypes
import queue
import subprocess
import sys
import threading

import pytest

from dist_esm.pipeline.threads import DeadThreadError, Service, get, put
from dist_esm.stop import Stop


class Working(Service):
    """A thread that does what it is given."""

    def __init__(self, stop: Stop, what) -> None:
        super().__init__("working", 7, stop)
        self.work = what

    def ask_to_end(self) -> None:
        pass


def raise_it(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), MemoryError("no room"), SystemExit(0), KeyboardInterrupt()]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_a_thread_early_is_the_reason_of_the_stop(error):
    stop = Stop()
    items: queue.Queue[int] = queue.Queue()
    with Working(stop, lambda: raise_it(error)) as service, pytest.raises(DeadThreadError):
        get(items, service.check)
    assert stop.at_once
    assert stop.reason.startswith(f"the working thread of rank 7 ended with {type(error).__name__}")


def test_what_was_put_before_the_end_is_still_given_out():
    items: queue.Queue[int] = queue.Queue()
    with Working(Stop(), lambda: items.put(1)) as service:
        pass
    assert get(items, service.check) == 1


def test_nobody_waits_for_room_that_a_dead_thread_will_not_make():
    stop = Stop()
    full: queue.Queue[int] = queue.Queue(maxsize=1)
    full.put(1)
    with Working(stop, lambda: raise_it(SystemExit(0))) as service, pytest.raises(DeadThreadError):
        put(full, 2, service.check)


def test_no_thread_starts_in_a_constructor():
    before = threading.active_count()
    Working(Stop(), lambda: None)
    assert threading.active_count() == before


ENDED_BELOW_PYTHON = """
import ctypes, os, queue
from dist_esm.pipeline.threads import DeadThreadError, Service, get
from dist_esm.stop import Stop

class Gone(Service):
    def work(self):
        ctypes.CDLL(None).pthread_exit(None)

    def ask_to_end(self):
        pass

stop = Stop()
try:
    with Gone("gone", 7, stop) as service:
        get(queue.Queue(), service.check)
except DeadThreadError:
    print(stop.reason, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's list of threads is Linux's")
def test_a_thread_that_ended_below_python_is_found_dead():
    assert hasattr(ctypes.CDLL(None), "pthread_exit")
    done = subprocess.run(
        [sys.executable, "-c", ENDED_BELOW_PYTHON], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "the gone thread of rank 7 is gone\n", done.stderr
