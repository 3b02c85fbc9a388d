"""The one door to torch.distributed: who this rank is, what all ranks know of each other, and the process group.

A world of one needs neither a process group nor a store, and callers do not ask. Ranks talk through torchrun's store (small facts:
problems at the start, the digest of the plan, status, a request to stop) and through the process group (the results at the end:
NCCL on GPUs, gloo on CPUs). No rank waits inside a collective for another's work: they meet in the store first, where waiting has
no time limit and the ranks that are missing are named every minute.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import DistError, DistNetworkError, DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from dist_esm.stop import ended_by_signals
from dist_esm.types import WorkerStatus

log = logging.getLogger("dist_esm")
P = ParamSpec("P")
T = TypeVar("T")

CONNECT_SECONDS = 20.0
"""torchrun's store is there before its ranks are: one that does not answer for so long is gone."""
STORE_TIMEOUT = timedelta(minutes=30)
"""torch's own, for what waits in the store once a rank has joined."""
LEAST_POLL_SECONDS, POLL_SECONDS = 0.002, 0.1
NAME_MISSING_SECONDS = 60.0
HASTE_SECONDS = 3.0
LEAVE_SECONDS = 5.0
ENDED = (WorkerStatus.COMPLETED, WorkerStatus.FAILED)
LOST = "torchrun's store is gone: torchrun was killed"


class OnStop(Protocol):
    """What `World.watching` calls: the reason, and whether to drop what is in flight."""

    def __call__(self, reason: str, at_once: bool = False) -> None:
        """Be told."""


class RefusedError(Exception):
    """The run cannot start; `problems` are the distinct reasons, each one line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class World:
    """This rank among all ranks."""

    def __init__(
        self, store: Store | None, rank: int, world_size: int, local_rank: int, local_world_size: int
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self.host = socket.gethostname()
        self._store = store
        self._meetings = 0
        self._is_in_haste = False
        self._status = WorkerStatus.IDLE

    @classmethod
    @contextmanager
    def connect(cls) -> Iterator[World]:
        """Join the ranks that torchrun started, or be a world of one. CUDA is not touched.

        Raises
        ------
        SystemExit
            With one line, if torchrun's store does not answer within `CONNECT_SECONDS`, or is lost later on.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            yield cls(None, 0, 1, 0, 1)
            return
        is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        timeout = (
            timedelta(seconds=CONNECT_SECONDS) if is_there else STORE_TIMEOUT
        )  # without torchrun, rank 0 opens it when it comes
        try:
            store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        except DistError:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SystemExit(
                f"dist_esm: error: torchrun's store at {where} does not answer: was torchrun killed? Start it again"
            ) from None
        store.set_timeout(STORE_TIMEOUT)
        store = own_part(store, rank, world_size)
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        world = cls(store, rank, world_size, local_rank, local_world_size)
        world.set_status(WorkerStatus.IDLE)
        try:
            yield world
        except (DistNetworkError, DistStoreError):
            raise SystemExit(
                f"dist_esm: error: {LOST}; start it again, it goes on from what is done"
            ) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            world._leave()

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    def start_process_group(self, device: torch.device, timeout: timedelta | None = None) -> None:
        """Start the process group: NCCL on a GPU, gloo on a CPU; `timeout` is that of its collectives, by default the backend's."""
        if self._store is not None:
            with ended_by_signals():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=PrefixStore("process_group", self._store),
                    rank=self.rank,
                    world_size=self.world_size,
                    device_id=device if device.type == "cuda" else None,
                    timeout=timeout,
                )

    def exchange(self, value: str) -> list[str]:
        """Give every rank the values of all ranks, in order of rank, through the store. All ranks call it, the same number of times."""
        if self._store is None:
            return [value]
        store = self._store
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        self._store.set(f"{name}/{self.rank}", value)
        if self.is_main:
            keys = [f"{name}/{rank}" for rank in range(self.world_size)]
            wait_for(
                lambda: store.check(keys),
                lambda: [rank for rank, key in enumerate(keys) if not store.check([key])],
            )
            self._store.set(name, json.dumps([self._store.get(key).decode() for key in keys]))
        wait_for(lambda: store.check([name]), lambda: [0])
        return list(json.loads(self._store.get(name)))

    def agree(self, problem: str | None) -> None:
        """Go on only if no rank has a problem.

        Raises
        ------
        RefusedError
            On every rank, with the distinct problems of all of them.
        """
        problems = [json.loads(text) for text in self.exchange(json.dumps(problem))]
        distinct = list(dict.fromkeys(text for text in problems if text is not None))
        if distinct:
            raise RefusedError(distinct)

    def all_or_none(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do a step of the preparation on every rank: all ranks succeed, or all refuse.

        Raises
        ------
        RefusedError
            On every rank, with the distinct reasons, if the step raises `ValueError`, `OSError` or out of memory on any rank.
        """
        value: T | None = None
        problem = None
        try:
            value = work(*args, **options)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            problem = " ".join(str(error).split())
        self.agree(problem)
        return cast(T, value)

    def all_gather(self, value: Any) -> list[Any]:
        """Give every rank the values of all ranks through the process group; ranks meet in the store before they enter it."""
        self.exchange("")
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with ended_by_signals():
            dist.all_gather_object(values, value)
        return values

    def set_status(self, status: WorkerStatus) -> None:
        """Publish what this rank is doing."""
        was_ended, self._status = self._status in ENDED, status
        if self._store is not None:
            self._store.set(f"status/{self.rank}", status.name)
            if status in ENDED and not was_ended:
                self._store.add("ended", 1)

    def get_worker_status(self) -> dict[int, WorkerStatus]:
        """What every rank is doing, by rank."""
        if self._store is None:
            return {0: self._status}
        found = {}
        for rank in range(self.world_size):
            key = f"status/{rank}"
            found[rank] = (
                WorkerStatus[self._store.get(key).decode()] if self._store.check([key]) else WorkerStatus.IDLE
            )
        return found

    def is_complete(self) -> bool:
        """Whether every rank has come to its end, in success or failure. One question to the store, whatever the number of ranks."""
        if self._store is None:
            return self._status in ENDED
        return bool(self._store.add("ended", 0) == self.world_size)

    def wait_until_complete(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait for the ranks that still work, or until `unless` is true."""
        if self._store is not None:
            wait_for(lambda: unless() or self.is_complete(), self._working)

    def _working(self) -> list[int]:
        return [
            rank for rank, status in self.get_worker_status().items() if status is WorkerStatus.PROCESSING
        ]

    def request_stop(self, reason: str) -> None:
        """Ask every rank to take no further unit."""
        if self._store is not None:
            self._store.set("stop", reason)

    def stop_reason(self) -> str | None:
        """The reason of a stop that some rank requested, if any."""
        return (
            self._store.get("stop").decode()
            if self._store is not None and self._store.check(["stop"])
            else None
        )

    def collect_in_haste(self, value: Any) -> list[Any]:
        """On rank 0, what the ranks that can still answer within `HASTE_SECONDS` have to say; for runs that are being ended."""
        self._is_in_haste = True
        if self._store is None:
            return [value]
        try:
            self._store.set(f"haste/{self.rank}", pickle.dumps(value).hex())
            if not self.is_main:
                return [value]
            keys = [f"haste/{rank}" for rank in range(self.world_size)]
            deadline = time.monotonic() + HASTE_SECONDS
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return [
                pickle.loads(bytes.fromhex(self._store.get(key).decode()))
                for key in keys
                if self._store.check([key])
            ]
        except DistError:
            log.warning(LOST)
            return [value]

    @contextmanager
    def watching(self, on_stop: OnStop) -> Iterator[None]:
        """While the block runs, call ``on_stop(reason)`` once if some rank requests a stop or torchrun is gone."""
        if self._store is None:
            yield
            return
        done = threading.Event()
        store = self._store

        def watch() -> None:
            while not done.wait(0.5):
                try:
                    if store.check(["stop"]):
                        on_stop(store.get("stop").decode())
                        return
                except DistError:
                    on_stop(LOST, at_once=True)
                    return

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _leave(self) -> None:
        """Rank 0 goes last, so that its exit code ends no other rank half way."""
        assert self._store is not None
        with suppress(DistError):
            self._store.set(f"left/{self.rank}", "")
            keys = [f"left/{rank}" for rank in range(self.world_size)]
            deadline = time.monotonic() + LEAVE_SECONDS
            while (
                self.is_main
                and not self._is_in_haste
                and not self._store.check(keys)
                and time.monotonic() < deadline
            ):
                time.sleep(LEAST_POLL_SECONDS)


def own_part(store: Store, rank: int, world_size: int) -> Store:
    """The part of torchrun's store that belongs to these ranks alone: it outlives ranks that torchrun restarts, with all that they left in it.

    Rank 0 names the part and the others answer with names of their own, so that none takes what it finds for an answer to itself.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        keys = [f"dist_esm/{own}/{other}" for other in range(1, world_size)]
        store.set("dist_esm/part", own)
        wait_for(
            lambda: store.check(keys),
            lambda: [number for number, key in enumerate(keys, start=1) if not store.check([key])],
        )
        store.set(f"dist_esm/{own}/all", json.dumps([store.get(key).decode() for key in keys]))
        return PrefixStore(f"dist_esm/{own}", store)
    part = ""

    def is_current() -> bool:
        nonlocal part
        if not store.check(["dist_esm/part"]):
            return False
        found = store.get("dist_esm/part").decode()
        if found != part:
            part = found
            store.set(f"dist_esm/{part}/{rank}", own)
        return bool(
            store.check([f"dist_esm/{part}/all"])
            and json.loads(store.get(f"dist_esm/{part}/all"))[rank - 1] == own
        )

    wait_for(is_current, lambda: [0])
    return PrefixStore(f"dist_esm/{part}", store)


def wait_for(is_there: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
    """Wait without a time limit; the ranks that are missing are named every minute.

    Pauses are a twentieth of what was waited already: short waits end at once, and many ranks that wait for hours ask seldom.
    """
    began = since = time.monotonic()
    while not is_there():
        now = time.monotonic()
        time.sleep(min(POLL_SECONDS, max(LEAST_POLL_SECONDS, (now - began) / 20)))
        if now - since > NAME_MISSING_SECONDS:
            since = now
            log.info("waiting for ranks %s", missing())


def setup_logging(rank: int) -> None:
    """INFO and above to stderr, each line with its rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
