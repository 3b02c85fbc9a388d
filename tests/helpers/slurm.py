"""A real Slurm of two nodes on this host: munge, slurmctld, and two slurmd whose hosts have own names."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
STOP_SECONDS = 20

HOSTS = "127.0.0.1 localhost {here}\n127.0.0.2 n1\n127.0.0.3 n2\n"
CONF = """
ClusterName=here
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/slurmd.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
FirstJobId={first_job}
GresTypes=gpu
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000 Gres=gpu:1 State=UNKNOWN
PartitionName=p Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why Slurm cannot be started here; None if it can."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} are not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start a Slurm of its own"
    allowed = subprocess.run(["unshare", "-mu", "true"], capture_output=True, check=False)
    return "unshare -mu is not allowed here" if allowed.returncode else None


def wait_until(holds: Callable[[], object], seconds: float, what: str, poll: float = 0.1) -> None:
    """Wait until something holds; fails with what was waited for."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(poll)


def free_ports(number: int) -> list[int]:
    """So many TCP ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


class Slurm:
    """The cluster; its files are in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are there."""
        for name in ("ctld", *(f"slurmd.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "hosts").write_text(HOSTS.format(here=socket.gethostname()))
        # The port of a run's rendezvous is made of the number of its job: two clusters must not count alike.
        conf = CONF.format(folder=self.folder, ports=free_ports(3), first_job=random.randrange(1, 10**6))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self.run("munged", "--force", *(f"--{name}={self.folder / file}" for name, file in files.items()))
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.node_states() == ["idle", "idle"], 30, "two idle nodes")

    def start_node(self, node: str) -> None:
        """Start a node's daemon, which sees the name of its host as a host of its own would."""
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2"'
        self.run("unshare", "-mu", "sh", "-c", script, "sh", str(self.folder / "hosts"), node)

    def stop(self) -> None:
        """End all jobs, the daemons by their pid files, and what is left on the nodes."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--state=RUNNING", "--user=root")
        for node in NODES:
            self.kill_node(node)
        pids = [self.pid("slurmctld"), self.pid("munged")]
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(is_alive(pid) for pid in pids if pid), STOP_SECONDS, "the daemons' end")

    def kill_node(self, node: str) -> None:
        """Kill all processes of a node at once, as if its power failed."""
        pid = self.pid(f"slurmd.{node}")
        if pid is None or not is_alive(pid):
            return
        name_space = Path(f"/proc/{pid}/ns/uts").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/uts").readlink() == name_space:
                    os.kill(int(process.name), signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), STOP_SECONDS, f"the end of {node}")

    def pid(self, daemon: str) -> int | None:
        """A daemon's process, as its pid file says."""
        path = self.folder / f"{daemon}.pid"
        return int(path.read_text()) if path.exists() else None

    def run(self, *words: str, timeout: float = 30) -> str:
        """Run a command against this cluster, and give what it prints."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, env=self.environment, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def node_states(self) -> list[str]:
        """State of each node."""
        return self.run("sinfo", "-h", "-N", "-o", "%t").split()

    def job(self, number: str) -> dict[str, str]:
        """All that Slurm says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """A job's state."""
        return self.job(number)["JobState"]

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that failed."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-30:])
            for path in sorted(self.folder.glob("*.log"))
        )


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and has not ended."""
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster while the block runs."""
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
