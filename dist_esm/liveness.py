"""Signs of life: every rank says that it lives and what it has in hand, and notices when another one no
longer does.

Two ways, since each sees what the other misses. A *heartbeat* is a value in the store that changes every few
seconds; a rank that is stopped, hangs in the kernel or is on a host that is gone no longer changes it. A
*process handle* (pidfd, Linux) of each rank of the same host is ready as soon as that process has ended, and
tells how, so a rank that was killed is named before torchrun's own SIGTERM reaches the others. Rank 0 watches
all ranks, the others watch rank 0 and the ranks of their host.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # noqa: TID251 - World gives it

BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.5
"""Time between two looks, when no process handle tells of an end before."""


class SignsOfLife:
    """This rank's heartbeat, and its view of those of others.

    Parameters
    ----------
    store
        Shared by the ranks.
    rank, world_size, host
        Who this is.
    timeout
        Seconds without a sign of life after which a rank counts as lost.
    has_left
        Tells whether a rank said that it is done before it ended.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        host: str,
        timeout: float,
        has_left: Callable[[int], bool],
    ) -> None:
        self.device = ""
        self.in_hand = ""
        """The file that this rank works on."""
        self.progress: Callable[[], str] = lambda: ""
        """Says how far this rank is, in a message that goes out with each sign of life."""
        self._store = store
        self._rank = rank
        self._host = host
        self._timeout = timeout
        self._has_left = has_left
        self._count = 0
        self._next_beat = 0.0
        self._watched = [other for other in range(world_size) if other != rank and 0 in (rank, other)]
        self._world_size = world_size
        self._last: dict[int, tuple[str, float]] = {}
        """Rank to its last sign, and when it was first seen here."""
        self._handles: dict[int, tuple[int, int]] = {}
        """Handle to rank and process."""
        self._poll = select.poll()
        self._is_searched: set[int] = set()

    def beat(self) -> None:
        """Say that this rank lives, if it is time to."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + BEAT_SECONDS
        self._count += 1
        about = {
            "beat": self._count,
            "host": self._host,
            "processes": process_space(),
            "pid": os.getpid(),
            "device": self.device,
            "in_hand": self.in_hand,
            "progress": self.progress(),
        }
        self._store.set(f"alive/{self._rank}", json.dumps(about))

    def wait_for_an_end(self) -> tuple[int, str] | None:
        """Wait a moment, less if a process of this host ends; return what happened to a rank that is lost, if
        any is."""
        for handle, _ in self._poll.poll(LOOK_SECONDS * 1000):
            rank, pid = self._handles[handle]
            ending = how_it_ended(pid)
            self._poll.unregister(handle)
            os.close(handle)
            del self._handles[handle]
            if not self._has_left(rank):
                return rank, f"{self._describe(rank)} {ending}"
        return None

    def silent_rank(self) -> tuple[int, str] | None:
        """Return what is known of a rank that has given no sign of life for too long, or that ended before
        there was a handle of it, if there is one."""
        now = time.monotonic()
        for rank in self._watched:
            key = f"alive/{rank}"
            sign = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in self._last or self._last[rank][0] != sign:
                self._last[rank] = sign, now
            elif now - self._last[rank][1] > self._timeout and not self._has_left(rank):
                silence = now - self._last[rank][1]
                return rank, f"{self._describe(rank)} gave no sign of life for {silence:.0f} s"
        return self._find_neighbours()

    def is_last_of_host(self) -> bool:
        """Tell whether the processes of all other ranks of this host have ended."""
        abouts = [self._about(rank) for rank in range(self._world_size) if rank != self._rank]
        return all(
            about is not None and (about["processes"] != process_space() or has_ended(int(about["pid"])))
            for about in abouts
        )

    def progress_of(self, rank: int) -> str:
        """Return what another rank said last of how far it is; "" if nothing came yet."""
        sign, _ = self._last.get(rank, ("", 0.0))
        with suppress(ValueError, AttributeError):
            return str(json.loads(sign).get("progress", ""))
        return ""

    def close(self) -> None:
        """Give the process handles back."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()

    def _find_neighbours(self) -> tuple[int, str] | None:
        """Take a handle of each process of this host, once it has said which it is; return what happened to
        one that has ended already, if any has."""
        for rank in range(self._world_size):
            if rank == self._rank or rank in self._is_searched:
                continue
            about = self._about(rank)
            if about is None:
                continue
            self._is_searched.add(rank)
            if about["processes"] != process_space() or not hasattr(os, "pidfd_open"):
                continue
            pid = int(about["pid"])
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                if not self._has_left(rank):
                    return rank, f"{self._describe(rank)} {how_it_ended(pid)}"
            except OSError:
                pass  # no handle is to be had here, but its heartbeat tells
            else:
                self._handles[handle] = rank, pid
                self._poll.register(handle, select.POLLIN)
        return None

    def _about(self, rank: int) -> dict[str, Any] | None:
        key = f"alive/{rank}"
        if not self._store.check([key]):
            return None
        about: dict[str, Any] = json.loads(self._store.get(key))
        return about

    def _describe(self, rank: int) -> str:
        about = self._about(rank) or {}
        where = ", ".join(str(about[key]) for key in ("host", "device") if about.get(key))
        in_hand = f" with {about['in_hand']} in hand" if about.get("in_hand") else ""
        return f"rank {rank}" + (f" ({where})" if where else "") + in_hand


def process_space() -> str:
    """A name of what process numbers refer to: two containers of one host, or of one host name, have their
    own."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} without /proc"


def has_ended(pid: int) -> bool:
    """Tell whether a process of this host has ended, though perhaps its parent has not asked for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def how_it_ended(pid: int) -> str:
    """How a process of this host ended, in words, as long as its parent has not asked for it yet."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            status = int(fields[49])
            if os.WIFSIGNALED(status):
                return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
            return f"ended with exit code {os.WEXITSTATUS(status)} before its work was done"
    return "ended before its work was done"
