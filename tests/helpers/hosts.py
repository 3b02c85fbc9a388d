"""Two hosts on this one: name spaces with a network, a host name and mounts of their own.

They are joined by a cable of their own (a veth pair), and share every file system, as the nodes of a cluster
do. Where name spaces are not allowed both are this host, on its loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers.command import FORKS, environment
from helpers.warm import WarmProcess

NAMES = ("west", "east")
CONF = "join_timeout=60"
CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def are_name_spaces_allowed() -> bool:
    """Tell whether this process may make hosts of its own."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "-num", "true"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    name_space: str | None = None
    """Of its network; None: this host's own."""
    hosts_file: Path | None = None

    def start(self, line: Sequence[str], mounts: dict[Path, Path] | None = None, **extra: str) -> WarmProcess:
        """Start a command line on this host, where each of `mounts` is another directory or file."""
        if self.name_space is None:
            assert not mounts
            return WarmProcess(line, environment(**extra), start_new_session=True)
        binds = {Path("/etc/hosts"): self.hosts_file, **(mounts or {})}
        steps = [f"mount --bind '{source}' '{target}'" for target, source in binds.items()]
        return WarmProcess(
            line,
            environment(**extra),
            start_new_session=True,
            name_space=self.name_space,
            script="\n".join([*steps, f"hostname {self.name}"]),
        )


@dataclass
class Hosts:
    """Both hosts, and what runs on them."""

    hosts: tuple[Host, Host]
    port: int
    are_apart: bool
    """They have names and networks of their own."""
    running: list[WarmProcess] = field(default_factory=list)

    def options(self, number: int, num_ranks: int, conf: str) -> list[str]:
        """What torchrun is told on one of the hosts."""
        return [
            "--nnodes=2",
            f"--nproc-per-node={num_ranks}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.hosts[0].address}:{self.port}",
            f"--rdzv-conf=is_host={int(number == 0)},{conf}",
            f"--local-addr={self.hosts[number].address}",
        ]

    def start(
        self,
        number: int,
        *overrides: object,
        num_ranks: int = 1,
        conf: str = CONF,
        module: Sequence[str] = ("-m", "dist_esm"),
        mounts: dict[Path, Path] | None = None,
        forks: bool = True,
        **extra: str,
    ) -> WarmProcess:
        """Start torchrun for two nodes on one of the hosts, with so many ranks, which it forks if need be."""
        line = [sys.executable, "-m", "torch.distributed.run", *self.options(number, num_ranks, conf)]
        line += FORKS if forks else []
        process = self.hosts[number].start([*line, *module, *map(str, overrides)], mounts, **extra)
        self.running.append(process)
        return process

    def serve(self, number: int, handler: Callable[..., BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        """A web server on the loopback of one of the hosts."""
        servers = []

        def listen() -> None:
            if self.hosts[number].name_space is not None:
                with Path(f"/run/netns/{self.hosts[number].name_space}").open() as name_space:
                    assert ctypes.CDLL(None).setns(name_space.fileno(), CLONE_NEWNET) == 0
            servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))

        # A thread can enter another network alone; the sockets that it opens stay there.
        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()
        return servers[0]

    def kill_all(self) -> None:
        """Kill what still runs."""
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
            process.communicate()
        self.running.clear()


@contextlib.contextmanager
def two_hosts(folder: Path, port: int) -> Iterator[Hosts]:
    """Two hosts while the block runs."""
    if not are_name_spaces_allowed():
        one = Host(NAMES[0], "127.0.0.1")
        yield Hosts((one, one), port, are_apart=False)
        return
    hosts_file = folder / "hosts"
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    unique = uuid.uuid4().hex[:6]
    spaces = [f"{name}-{unique}" for name in NAMES]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", "cable", "netns", spaces[0], "type", "veth", "peer", "cable", "netns", spaces[1])
        for space, address in zip(spaces, ADDRESSES, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
            ip("-n", space, "link", "set", "lo", "up")
        west, east = (
            Host(name, address, space, hosts_file)
            for name, address, space in zip(NAMES, ADDRESSES, spaces, strict=True)
        )
        yield Hosts((west, east), port, are_apart=True)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def ip(*words: str) -> None:
    """Run `ip`, which must succeed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
