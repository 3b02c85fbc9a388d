"""Processes that begin with torch and this package imported, which takes a cold one seconds.

A Python that has imported them, and has done nothing else, forks each. What runs is a process like any other:
it has a number, an environment, files, signals and an end of its own.

That Python (`serve`) is asked over a socket: for each process it gets a message with the command line and its
environment, and four files: stdin, stdout, stderr, and a socket on which it tells the number of the process
and its end.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

IMPORTED = (
    "torch.distributed.run",
    "torch._dynamo",  # torchrun imports it to log the end of a rank that it forked
    "dist_esm.commandline.command",
    "dist_esm.jobs.embed",
    "dist_esm.jobs.plan.job",
    "dist_esm.jobs.report.job",
    "dist_esm.jobs.selfcheck.job",
    "dist_esm.jobs.verify",
)
TESTS = Path(__file__).parents[1]
SERVE = """
import socket, sys
sys.path.insert(1, sys.argv[2])
from helpers.warm import serve
serve(socket.socket(fileno=int(sys.argv[1])))
"""
"""The Python that forks."""
LONGEST_REQUEST = 1 << 17
ROOM = 1 << 15
"""Bytes of a command line, and of an environment, that /proc can show."""
START_SECONDS = 60.0
PIPE_BYTES = 1 << 15
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x4000000, 0x20000000, 0x40000000


class WarmProcess:
    """As `subprocess.Popen`: ``python -m MODULE words``, ``python -c CODE words`` or ``python SCRIPT words``.

    What it prints is kept in files until its end, so that it waits for no reader. With the name space of a
    network it sees that, and has process numbers, mounts and a host name of its own; a shell script comes
    first there.
    """

    def __init__(
        self,
        line: Sequence[str],
        env: dict[str, str],
        stdin: int = subprocess.DEVNULL,
        start_new_session: bool = False,
        name_space: str | None = None,
        script: str = "",
    ) -> None:
        self.args = list(line)
        self.returncode: int | None = None
        self._printed = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - read at its end
        self._socket, theirs = socket.socketpair()
        about = {"line": list(line[1:]), "env": env, "cwd": os.getcwd(), "session": start_new_session}
        about |= {"name_space": name_space, "script": script}
        with theirs, open(os.devnull) as nothing:
            files = [nothing.fileno() if stdin == subprocess.DEVNULL else stdin]
            files += [*(file.fileno() for file in self._printed), theirs.fileno()]
            socket.send_fds(warm_python(), [json.dumps(about).encode()], files)
        self.pid = self._number()
        """Its number."""

    def poll(self) -> int | None:
        """Return its exit code, or None if it goes on."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""
        if self.returncode is None:
            if timeout is not None and not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._number()
        return self.returncode

    def _number(self) -> int:
        """Read a line of what is told of it, and no byte more, which `wait` would not see."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self._socket.recv(1)
            assert byte, "what waits for it is gone"
            line += byte
        return int(line)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it printed."""
        self.wait(timeout)
        printed = []
        for file in self._printed:
            file.seek(0)
            printed.append(file.read())
        return printed[0], printed[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def run_warm(
    line: Sequence[str], env: dict[str, str], timeout: float, stdin: int | str = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, as `subprocess.run` does, with a file for its stdin or a text for a pipe."""
    if isinstance(stdin, str):
        end, mouth = os.pipe()
        try:
            with open(mouth, "w") as pipe:
                assert len(stdin) <= PIPE_BYTES, "nobody reads yet"
                pipe.write(stdin)
            return run_warm(line, env, timeout, end)
        finally:
            os.close(end)
    process = WarmProcess(line, env, stdin)
    try:
        printed = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


@functools.cache
def warm_python() -> socket.socket:
    """Start the Python that forks; it ends with this process. One serves all tests of a worker."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # it is looked at when torch is imported
        env |= {"ROOM": " " * ROOM}
        line = [sys.executable, "-c", SERVE, str(theirs.fileno()), str(TESTS), " " * ROOM]
        # In the checkout of these tests, as a command that it runs is.
        subprocess.Popen(
            line, pass_fds=[theirs.fileno()], env=env, cwd=TESTS.parent, stdin=subprocess.DEVNULL
        )
    ours.settimeout(START_SECONDS)
    assert ours.recv(100) == b"ready"
    return ours


def serve(asked: socket.socket) -> None:
    """Fork a process for each message, until nobody is there to send one."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()
    asked.send(b"ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        message, files, _, _ = socket.recv_fds(asked, LONGEST_REQUEST, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wait_for_one(json.loads(message), files)
        for file in files:
            os.close(file)


def wait_for_one(about: dict, files: list[int]) -> None:
    """Fork the process that was asked for, tell its number, and at its end its exit code."""
    *standard, told = files
    if about["name_space"] is not None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWPID) == 0  # of what is forked from now on
    pid = os.fork()
    if pid == 0:
        os.close(told)
        for number, file in enumerate(standard):
            os.dup2(file, number)
            os.close(file)
        become(about)
    for file in standard:
        os.close(file)
    os.write(told, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(told, f"{code}\n".encode())
    os._exit(0)


def become(about: dict) -> None:
    """Be the process: what Python does when it starts and ends stands around what was asked for."""
    code = 1
    try:
        if about["session"]:
            os.setsid()
        if about["name_space"] is not None:
            enter(about["name_space"], about["script"])
        os.chdir(about["cwd"])
        os.environ.clear()
        os.environ.update(about["env"])
        show(about["line"])
        code = exit_code_of(about["line"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def enter(name_space: str, script: str) -> None:
    """Leave this process's network, mounts and host name for others, as it has left its process numbers."""
    libc = ctypes.CDLL(None)
    with open(f"/run/netns/{name_space}") as file:
        assert libc.setns(file.fileno(), CLONE_NEWNET) == 0
    assert libc.unshare(CLONE_NEWNS | CLONE_NEWUTS) == 0
    subprocess.run(["sh", "-ec", f"mount --make-rprivate /\nmount -t proc proc /proc\n{script}"], check=True)


def show(words: Sequence[str]) -> None:
    """Let /proc have this process's own command line and environment, as of one that began with them."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = [int(number) for number in stat[45:49]]
    line = [sys.executable, *words]
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    for start, end, texts in ((*places[:2], line), (*places[2:], variables)):
        if not start:  # this system does not say where they are
            continue
        text = b"".join(os.fsencode(text) + b"\0" for text in texts)
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, min(len(text), end - start - 1))


def exit_code_of(words: list[str]) -> int:
    """Run ``-m MODULE words``, ``-c CODE words`` or ``SCRIPT words``; returns the exit code."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            sys.modules.pop(words[1], None)  # it runs as __main__
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
