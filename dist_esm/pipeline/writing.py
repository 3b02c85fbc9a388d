"""The other end of a `WriterProcess`: a process that writes outputs, and what is said to it and by it."""

from __future__ import annotations

import gc
import io
import os
import pickle
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_esm.atomic import commit_together, number_names_from
from dist_esm.attempt import as_value
from dist_esm.launcher import end_with_parent
from dist_esm.outputs.arena import Arena
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.work import Work, stage_all
from dist_esm.pipeline.writer_processes import names_of
from dist_esm.types import WrittenFile

CARRIED_BYTES = 1 << 20
"""Rows that are not in the arena and are sent all the same."""


class HereError(Exception):
    """Something cannot be sent, or not be read where it is sent: the rank has to do it itself."""


class Sender(pickle.Pickler):
    """Pickles work; rows in the arena go as their place in it."""

    def __init__(self, file: io.BytesIO, arena: Arena) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._arena = arena

    def persistent_id(self, obj: Any) -> Any:
        """Name rows by their place.

        Raises
        ------
        HereError
            If they are too large to be sent.
        """
        if not isinstance(obj, torch.Tensor):
            return None
        rows = obj.numpy()
        offset = self._arena.offset_of(rows)
        if offset is None and rows.nbytes > CARRIED_BYTES:
            raise HereError("rows that found no room in shared memory")
        return offset, rows.tobytes() if offset is None else None, rows.shape, rows.dtype.str


class Receiver(pickle.Unpickler):
    """The inverse of `Sender`, in the other process."""

    def __init__(self, file: io.BytesIO, arena: Arena) -> None:
        super().__init__(file)
        self._arena = arena

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return the rows of a place."""
        offset, numbers, shape, dtype = pid
        if offset is not None:
            return torch.from_numpy(self._arena.array(offset, shape, np.dtype(dtype)))
        return torch.from_numpy(np.frombuffer(bytearray(numbers), dtype).reshape(shape))


def pack_work(works: Sequence[Work | Exception], output_dir: Path, arena: Arena) -> bytes:
    """Put into bytes what is asked of a process: work that can be moved.

    Raises
    ------
    HereError
        If rows are too large to be sent.
    """
    file = io.BytesIO()
    Sender(file, arena).dump((works, output_dir))
    return file.getvalue()


def unpack_answer(answer: bytes) -> list[WrittenFile | Exception]:
    """Read what a process answers: what became of each output.

    Raises
    ------
    HereError
        If it could make nothing of what was asked, as for want of memory.
    """
    written = pickle.loads(answer)
    if isinstance(written, Exception):
        raise HereError(f"{type(written).__name__}: {written}")
    return list(written)


def serve(parent: int, output_format: str, descriptor: int, *lines: int) -> None:
    """Be the processes that write, as long as their sockets have another end and the rank lives.

    Parameters
    ----------
    parent
        The rank.
    output_format
        What is to be written.
    descriptor
        Of the arena.
    lines
        Of a socket for each process.
    """
    end_with_parent(parent, signal.SIGKILL)
    FORMATS[output_format].codec.prepare()
    torch.set_num_threads(1)
    gc.freeze()
    first = os.getpid()
    for number, line in enumerate(lines):
        if os.fork() == 0:
            end_with_parent(first, signal.SIGKILL)
            for other in lines:
                if other != line:
                    os.close(other)
            number_names_from(names_of(number).start)
            with suppress(EOFError, OSError):  # the other end is gone
                answer_all(Connection(line), Arena(descriptor))
            os._exit(0)
    for line in lines:
        os.close(line)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def answer_all(line: Connection, arena: Arena) -> None:
    """Say that this process is ready, and do what comes over a line.

    Raises
    ------
    EOFError, OSError
        If the other end is gone.
    """
    line.send_bytes(b"ready")
    while True:
        asked = line.recv_bytes()
        answer = as_value(answer_one, asked, line, arena)
        line.send_bytes(pickle.dumps(sendable(answer)))


def sendable(answer: Any) -> Any:
    """Return what can be pickled and read again: an exception that cannot becomes one of its type and
    message."""
    if isinstance(answer, list):
        return [sendable(one) for one in answer]
    if isinstance(answer, Exception) and isinstance(as_value(copied, answer), Exception):
        return RuntimeError(f"{type(answer).__name__}: {answer}")
    return answer


def copied(error: Exception) -> list[Any]:
    """Return an exception as the other end would read it."""
    return [pickle.loads(pickle.dumps(error))]


def answer_one(asked: bytes, line: Connection, arena: Arena) -> list[WrittenFile | Exception]:
    """Write outputs, and put them in their places.

    Raises
    ------
    EOFError
        If the other end is gone: then others may be at work in the same places.
    """
    works, output_dir = Receiver(io.BytesIO(asked), arena).load()
    staged = stage_all(works)
    if line.poll():
        raise EOFError
    return commit_together(staged, output_dir)
