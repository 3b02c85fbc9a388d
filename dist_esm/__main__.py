"""The process of the command: what it needs is looked for first, and every ending has its exit code."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from dist_esm.launcher import exit_code_for_launcher, follow_launcher, is_main_rank, is_started_by_us
from dist_esm.requirements import unmet_requirements
from dist_esm.stop import GO_ON, INTERRUPTED, on_signals, was_ctrl_c


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    with on_signals(end_now):
        follow_launcher()
        problem = unmet_requirements()
        if problem is not None:
            say(f"error: {problem}")
            return 1
        from dist_esm.commandline.command import run_command  # it needs what was looked for

        try:
            code = run_command(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt as interrupt:
            say_interrupted(str(interrupt))
            code = 1
    return INTERRUPTED if was_ctrl_c() else code


def end_now(reason: str) -> None:
    """End the process, in which nothing has begun: an exception from within an import could come out as
    another one."""
    say_interrupted(reason)
    os._exit(INTERRUPTED if was_ctrl_c() else 1)


def say_interrupted(reason: str) -> None:
    """Say it, unless the process that started this rank says it."""
    if not is_started_by_us():
        say(f"{reason}: {GO_ON}")


def say(line: str) -> None:
    """Print a line to stderr, once for all ranks."""
    if is_main_rank():
        print(f"dist_esm: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process.

    A segment that was abandoned on a CPU may take a minute more, and Python would wait for its thread.
    """
    code = exit_code_for_launcher(code)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_and_leave() -> NoReturn:
    """Run the command as a process of its own: the console script ``dist-esm``."""
    leave(main())


if __name__ == "__main__":
    run_and_leave()
