"""torchrun's store: values of any size, waits without a time limit, and the part that is these ranks' own.

One value of the store holds at most 8 MiB, so larger ones go in chunks.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable

from torch.distributed import (  # type: ignore[attr-defined]  # noqa: TID251 - World's own part
    PrefixStore,
    Store,
)

log = logging.getLogger("dist_esm")

CHUNK_BYTES = 1 << 20
"""Bytes of one value in the store, which takes at most 8 MiB."""
LEAST_POLL_SECONDS, POLL_SECONDS = 0.002, 0.1
NAME_MISSING_SECONDS = 60.0


def put_bytes(store: Store, key: str, value: bytes) -> None:
    """Put a value of any size into the store, in chunks; it is there once its key is."""
    chunks = [value[start : start + CHUNK_BYTES] for start in range(0, len(value), CHUNK_BYTES)]
    for index, chunk in enumerate(chunks):
        store.set(f"{key}/chunk/{index}", chunk)  # type: ignore[arg-type]  # bytes are what it keeps
    store.set(key, str(len(chunks)))


def get_bytes(store: Store, key: str) -> bytes:
    """Get a value that `put_bytes` put there."""
    return b"".join(store.get(f"{key}/chunk/{index}") for index in range(int(store.get(key))))


def own_part(store: Store, rank: int, world_size: int) -> Store:
    """The part of torchrun's store that belongs to these ranks alone: it outlives ranks that torchrun
    restarts, with all that they left in it.

    Rank 0 names the part and the others answer with names of their own, so that none takes what it finds for
    an answer to itself.
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


def wait_at_most(seconds: float, is_there: Callable[[], bool]) -> None:
    """Wait until something holds, but no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_there() and time.monotonic() < deadline:
        time.sleep(LEAST_POLL_SECONDS)


def wait_for(is_there: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
    """Wait without a time limit; the ranks that are missing are named every minute.

    Pauses are a twentieth of what was waited already: short waits end at once, and many ranks that wait for
    hours ask seldom.
    """
    began = since = time.monotonic()
    while not is_there():
        now = time.monotonic()
        time.sleep(min(POLL_SECONDS, max(LEAST_POLL_SECONDS, (now - began) / 20)))
        if now - since > NAME_MISSING_SECONDS:
            since = now
            log.info("waiting for ranks %s", missing())
