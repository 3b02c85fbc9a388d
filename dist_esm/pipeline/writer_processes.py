"""Processes that write outputs for the threads of a `WriterPool`.

Formats work in Python, and in libraries that hold its interpreter. Eight threads of one process get one
core's worth of it, and the thread that launches kernels waits for all of them. A process has an interpreter
of its own.

One is started as early as can be. It imports what writing takes, and forks into as many as are wanted, each
at the other end of a socket (`writing`). Rows stay where they are, in an `Arena`. Processes that are not
ready yet are not waited for: threads write meanwhile. They live as long as this end of their sockets, however
the rank ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dist_esm.config import Config, DeviceKind, Format, Writers
from dist_esm.outputs.arena import Arena
from dist_esm.types import WrittenFile

if TYPE_CHECKING:
    from dist_esm.outputs.work import Work

MIN_WRITERS, MAX_WRITERS = 3, 8
"""One writes and hashes about 0.5 GB/s; a rank gets one for every two of its cores, within these bounds."""
SERVE = "from dist_esm.pipeline.writing import serve; serve()"
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Where drivers of GPUs are seen before torch is imported: NVIDIA's, AMD's, and Windows' from within WSL."""


class GoneError(RuntimeError):
    """A process that writes is gone."""


class WriterProcess:
    """The line to one process; for one thread.

    Parameters
    ----------
    line
        Socket to it.
    arena
        Where rows are.
    """

    def __init__(self, line: socket.socket, arena: Arena) -> None:
        self._line = Connection(line.detach())
        self._arena = arena
        self._is_ready = False

    def is_ready(self, seconds: float = 0) -> bool:
        """Tell whether the process has said that it is ready, or says so within so many seconds.

        Raises
        ------
        EOFError, OSError
            If it is gone.
        """
        if not self._is_ready and self._line.poll(seconds):
            self._line.recv_bytes()
            self._is_ready = True
        return self._is_ready

    def write(
        self, works: Sequence[Work | Exception], output_dir: Path
    ) -> list[WrittenFile | Exception] | None:
        """Have outputs written and put in their places, as `stage_all` and `commit_together` do: of work that
        can be moved.

        Returns
        -------
        list, or None
            None: their rows cannot be sent, or the process is not ready yet; nothing was done.

        Raises
        ------
        GoneError
            If the process is gone. What it wrote of them is under temporary names, or in its place.
        """
        from dist_esm.pipeline.writing import HereError, pack_work, unpack_answer

        try:
            if not self.is_ready():
                return None
            self._line.send_bytes(pack_work(works, output_dir, self._arena))
            return unpack_answer(self._line.recv_bytes())
        except HereError:
            return None
        except (EOFError, OSError) as error:
            raise GoneError("a process that writes outputs is gone (out of memory?)") from error

    def close(self) -> None:
        """End the process."""
        self._line.close()


class WriterProcesses:
    """The processes of a rank, if it has any. As a context manager it ends them.

    Attributes
    ----------
    arena
        Where rows are to be that they write; None without processes.
    lines
        One for each.
    problem
        Why they could not be started, if that was tried in vain.
    """

    def __init__(self) -> None:
        self.arena: Arena | None = None
        self.lines: list[WriterProcess] = []
        self.problem: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, num_processes: int, output_format: Format) -> None:
        """Start them, and go on while they import what they need. If the system has none to give, `problem`
        says so, and threads write.

        Parameters
        ----------
        num_processes
            How many.
        output_format
            What they will write.
        """
        try:
            self.arena = Arena.make()
            with ExitStack() as theirs:
                ends = [self._new_line(self.arena, theirs) for _ in range(num_processes)]
                self._process = self._popen(output_format, [self.arena.descriptor, *ends])
        except OSError as error:
            self.end()
            self.problem = error

    def _popen(self, output_format: Format, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", SERVE, output_format.name, *map(str, inherited)],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is the rank's
        )

    def _new_line(self, arena: Arena, theirs: ExitStack) -> int:
        ours, other = socket.socketpair()
        self.lines.append(WriterProcess(ours, arena))
        theirs.enter_context(other)
        return other.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End them; what one is writing is left as it is. There are none from then on."""
        for line in self.lines:
            line.close()
        if self.arena is not None:
            self.arena.close()
        self.lines, self.arena = [], None
        if self._process is not None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def num_writers(num_cores: int) -> int:
    """Return how many outputs a rank with so many cores writes at once."""
    return max(MIN_WRITERS, min(MAX_WRITERS, num_cores // 2))


def are_wanted(config: Config) -> bool:
    """Tell whether processes write the outputs of a rank: by default where it may have a GPU.

    Parameters
    ----------
    config
        Checked configuration.
    """
    if config.writers is not Writers.auto:
        return config.writers is Writers.processes
    may_have_gpu = config.device is not DeviceKind.cpu and any(map(os.path.exists, GPU_FILES))
    return may_have_gpu and hasattr(os, "memfd_create")
