"""The command, one function of which ends its thread or process: faulty.py PLACE ENDING RANK key=value

PLACE is MODULE:CLASS.METHOD or MODULE:FUNCTION, ENDING a key of `ENDINGS`, RANK the rank that it happens on.
With ``PLACE@N`` it happens at the Nth call. How the thread or process ends is real; what is arranged is the
moment.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
from functools import reduce
from pathlib import Path

from dist_esm.__main__ import leave, main


def raise_it(error: BaseException) -> None:
    raise error


def exit_after_a_signal_to_others() -> None:
    """End, and let the signal of torchrun that answers it come to the others before they can see it."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        parent, process = int(path.read_text().rpartition(")")[2].split()[1]), int(path.parent.name)
        if parent == os.getppid() and process != os.getpid():
            os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    os._exit(3)


ENDINGS = {
    "SystemExit": lambda: raise_it(SystemExit(0)),
    "MemoryError": lambda: raise_it(MemoryError("no room for a list")),
    "RuntimeError": lambda: raise_it(RuntimeError("a fault of ours")),
    "pthread_exit": lambda: ctypes.CDLL(None).pthread_exit(None),
    "exit_code_0": lambda: os._exit(0),
    "exit_code_3": lambda: os._exit(3),
    "exit_code_3_seen_late": exit_after_a_signal_to_others,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

place, ending, rank, *overrides = sys.argv[1:]
place, _, nth = place.partition("@")
module, path = place.split(":")
*owners, name = path.split(".")
owner = reduce(getattr, owners, importlib.import_module(module))
function = getattr(owner, name)
num_calls = 0


def call(*args, **options):
    global num_calls
    num_calls += 1
    if num_calls == int(nth or 1) and os.environ.get("RANK", "0") == rank:
        ENDINGS[ending]()
    return function(*args, **options)


setattr(owner, name, call)
leave(main(overrides))
