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

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
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

log = logging.getLogger("dist_esm")
MIN_WRITERS, MAX_WRITERS = 3, 8
"""One writes and hashes about 0.5 GB/s; a rank gets one for every two of its cores, within these bounds."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers and people send to all processes of a run: what they mean is the rank's to say."""
SERVE = f"""
import signal, sys
for number in {tuple(map(int, IGNORED))}:
    signal.signal(number, signal.SIG_IGN)
from dist_esm.pipeline.writing import serve
parent, name, *descriptors = sys.argv[1:]
serve(int(parent), name, *map(int, descriptors))
"""
"""The program of the first process; signals are ignored before imports take seconds."""
END_SECONDS = 10.0
"""How long those that were killed are waited for: one that hangs in a file system does not end before it."""
NAMES = 1 << 32
"""Temporary names that a process may use."""
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
    number
        Among the processes of its rank, from 0.
    """

    def __init__(self, line: socket.socket, arena: Arena, number: int = 0) -> None:
        self.number = number
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
            None: they cannot be sent, or the process is not ready yet; nothing was done.

        Raises
        ------
        GoneError
            If the process is gone. What it wrote of them is under temporary names, or in its place.
        """
        from dist_esm.pipeline.writing import HereError, pack_work, unpack_answer

        try:
            if not self.is_ready():
                return None
            asked = pack_work(works, output_dir, self._arena)
            self._line.send_bytes(asked)
            return unpack_answer(self._line.recv_bytes())
        except (HereError, MemoryError) as error:
            log.debug("a thread writes %d outputs: %s", len(works), error)
            return None
        except (EOFError, OSError) as error:
            how = "is gone (killed, or out of memory)" if self._is_ready else "did not start"
            raise GoneError(f"a process that writes outputs {how}") from error

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
        self._last_arena: Arena | None = None
        """Its memory goes with this object: to give 1.5 GB back takes 0.2 s, and the report comes first."""

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
                rows = beyond_standard_streams(self.arena.descriptor, theirs)
                ends = [self._new_line(number, self.arena, theirs) for number in range(num_processes)]
                self._process = popen(output_format, [rows, *ends])
        except OSError as error:
            self.end()
            self.problem = error

    def get_memory(self, num_bytes: int) -> None:
        """Get memory for so many bytes of rows beside all else, before they come.

        Nobody waits for it: what is not there yet comes when it is written.
        """
        if self.arena is not None:
            threading.Thread(target=self.arena.populate, args=(num_bytes,), name="rows", daemon=True).start()

    def _new_line(self, number: int, arena: Arena, theirs: ExitStack) -> int:
        ours, other = socket.socketpair()
        self.lines.append(WriterProcess(ours, arena, number))
        with other:
            return beyond_standard_streams(other.fileno(), theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self._process = None  # its number may be another's from now on

    def end(self) -> None:
        """End them, and do not wait until they are gone; what one is writing is left as it is. There are none
        from then on."""
        for line in self.lines:
            line.close()
        if self.arena is not None:
            self.arena.close()
            self._last_arena = self.arena
        self.lines, self.arena, self.problem = [], None, None
        if self._process is not None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)


def num_writers(num_cores: int) -> int:
    """Return how many outputs a rank with so many cores writes at once."""
    return max(MIN_WRITERS, min(MAX_WRITERS, num_cores // 2))


def beyond_standard_streams(descriptor: int, held: ExitStack) -> int:
    """Return a copy of a descriptor, closed with `held`, that does not stand for a standard stream: these may
    be closed, and then the next file that is opened takes their place."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    held.callback(os.close, copy)
    return copy


def popen(output_format: Format, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the first process, which imports from where this one does and from nowhere else."""
    path = [entry for entry in sys.path if isinstance(entry, str) and entry]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SERVE, str(os.getpid()), output_format.name, *map(str, inherited)],
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,  # Ctrl-C is the rank's
    )


def names_of(number: int) -> range:
    """Return the numbers that a process may use for temporary names; the rank's own are below."""
    return range((number + 1) * NAMES, (number + 2) * NAMES)


def are_wanted(config: Config) -> bool:
    """Tell whether processes write the outputs of a rank: by default where it may have a GPU.

    Parameters
    ----------
    config
        Checked configuration.
    """
    if config.writers is not Writers.auto:
        return config.writers is Writers.processes
    return config.device is not DeviceKind.cpu and any(map(os.path.exists, GPU_FILES))
