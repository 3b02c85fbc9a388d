"""What every benchmark does alike: options, machine and versions, timing, a table, JSON on the last line.

A benchmark prints what it runs on and its own command first. While it measures, each row of its table goes to
stderr, so that a run that is cut short has not measured for nothing. At the end it prints the table, and one
JSON object on the last line, which `--json PATH` also writes to a file.

    options = parse_options(make_parser(__doc__, repeats=3))
    results = begin()
    table = Table("sorting", ("numbers", "seconds"))
    timing = timed(lambda: sorted(numbers), options.repeats)
    table.add(f"{len(numbers):,}", f"{timing.median_s:.3f}")
    end({**results, "sorting": timing.runs_s}, [table], options)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

PACKAGES = (
    "dist_esm",
    "torch",
    "triton",
    "numpy",
    "fair-esm",
    "biopython",
    "transformers",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "esm-efficient",
)
"""Packages whose versions a number may depend on; those that are not installed are left out."""
Child = Callable[..., dict[str, Any]]
"""A measurement that can run in a process of its own: it takes and returns what JSON can hold."""


def make_parser(doc: str | None, repeats: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have.

    Parameters
    ----------
    doc
        The script's docstring, shown as it stands by `--help`.
    repeats
        Default of `--repeats`; None: there is no such option, because nothing is timed.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=int, default=repeats, help="timed runs of each measurement (%(default)s)"
        )
    parser.add_argument("--json", type=Path, help="write the JSON of the last line to this file, too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def parse_options(parser: argparse.ArgumentParser, children: Sequence[Child] = ()) -> argparse.Namespace:
    """Return the options; in a process that `in_child` started, run its measurement and leave.

    Raises
    ------
    SystemExit
        If an option is wrong, or when the measurement of a child is done.
    """
    options = parser.parse_args()
    if options.child is not None:
        name, arguments = options.child
        (measure,) = (child for child in children if child.__name__ == name)
        print(json.dumps(measure(**json.loads(arguments))))
        raise SystemExit
    if getattr(options, "repeats", 1) < 1:
        parser.error(f"--repeats={options.repeats} is too few: use 1 or more")
    return options


def in_child(measure: Child, one_thread: bool = False, **arguments: Any) -> dict[str, Any]:
    """Measure in a fresh process, whose memory and threads are its own.

    Parameters
    ----------
    measure
        Stands among the `children` of `parse_options`.
    one_thread
        Keep the libraries below numpy and torch to one thread.
    arguments
        Passed on as JSON.

    Returns
    -------
    dict
        What `measure` returned.

    Raises
    ------
    SystemExit
        If the measurement failed; its own error stands on stderr.
    """
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if one_thread else ()
    done = subprocess.run(
        [sys.executable, sys.argv[0], "--child", measure.__name__, json.dumps(arguments)],
        env={**os.environ, **dict.fromkeys(threads, "1")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{measure.__name__} {arguments} failed, see above\n{done.stdout}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Timing:
    """Seconds of the timed runs of one measurement."""

    runs_s: list[float]
    answer: Any
    """What the run before the timed ones returned."""

    @property
    def median_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs_s)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {"median_s": self.median_s, "runs_s": self.runs_s, "answer": self.answer}


def timed(
    work: Callable[[], Any],
    repeats: int,
    warm_up: Callable[[], Any] | None = None,
    sync: Callable[[], None] = lambda: None,
) -> Timing:
    """Run once untimed, then `repeats` times by the clock.

    Parameters
    ----------
    work
        What is timed.
    repeats
        Timed runs.
    warm_up
        Run untimed in place of `work`, if a whole run of it takes too long.
    sync
        Waits for the device; called before the clock starts and before it stops.
    """
    answer = (warm_up or work)()
    runs_s = []
    for _ in range(repeats):
        sync()
        began = time.perf_counter()
        work()
        sync()
        runs_s.append(time.perf_counter() - began)
    return Timing(runs_s, answer)


def disk_rates(folder: Path, num_bytes: int, repeats: int) -> list[float]:
    """Return the bytes a second that a folder's disk took of each of several large files, written in blocks
    and synced."""
    block = random.Random(0).randbytes(8 << 20)
    path, num_blocks = folder / "rate", max(1, num_bytes // len(block))

    def write() -> None:
        with open(path, "wb") as file:
            for _ in range(num_blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    runs_s = timed(write, repeats).runs_s
    path.unlink()
    return [num_blocks * len(block) / seconds for seconds in runs_s]


def peak_mib() -> float:
    """Return the peak resident set of this process so far.

    Where there is /proc it is not `ru_maxrss`, which starts at the peak of the parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        unit = 1 << 20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def written_bytes(process: int | str = "self") -> int:
    """Return the bytes that a process gave to the system to write so far; 0 where nobody counts them."""
    try:
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])
    except (OSError, KeyError):
        return 0


def processes_below(process: int) -> list[int]:
    """Return the processes that a process has started, and those that they have; none where there is no
    /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = children.get(process, [])
    for child in found:  # grows on the way
        found += children.get(child, [])
    return found


class Watched:
    """The most threads and open files that this process has while the block runs, its own not counted, and
    the processes below it.

    They are looked at ten times a second; where there is no /proc, all stay 0.
    """

    def __init__(self) -> None:
        self.threads = 0
        self.files = 0
        self.files_below = 0
        """Of all processes below it together."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.1):
            with suppress(OSError):
                self.threads = max(self.threads, len(os.listdir("/proc/self/task")) - 1)
                self.files = max(self.files, len(os.listdir("/proc/self/fd")) - 1)
            below = 0
            for process in processes_below(os.getpid()):
                with suppress(OSError):
                    below += len(os.listdir(f"/proc/{process}/fd"))
            self.files_below = max(self.files_below, below)


def cpu_seconds(process: int | None = None) -> float:
    """Return the seconds that all threads of a process took so far, in the kernel and outside; of this one by
    default, and of another 0 where there is no /proc."""
    if process is None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def environment() -> dict[str, Any]:
    """Return what the numbers are taken on and with; what this machine does not say is left out."""
    import torch  # children measure memory, and must not hold torch because of this function

    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    facts["commit"] = commit()
    return {fact: value for fact, value in facts.items() if value}


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the kernel does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if files differ from it; None outside of one."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or None


class Table:
    """Rows for people, in columns as wide as they must be.

    A column is set to the right if every cell of it that is not empty begins with a digit or a sign.
    """

    def __init__(self, title: str, headings: Sequence[str]) -> None:
        self.title = title
        self.headings = tuple(headings)
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row, and show it on stderr at once."""
        assert len(cells) == len(self.headings), cells
        self.rows.append(cells)
        shown = (
            f"{heading} {cell}".strip() for heading, cell in zip(self.headings, cells, strict=True) if cell
        )
        print(", ".join(shown), file=sys.stderr, flush=True)

    def __str__(self) -> str:
        columns = list(zip(self.headings, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        to_right = [all(re.match(r"[-+\d]", cell) for cell in column[1:] if cell) for column in columns]
        lines = [self.title] if self.title else []
        for row in (self.headings, *self.rows):
            cells = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, to_right, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def begin() -> dict[str, Any]:
    """Print the machine, the versions and the command, and return them as the first of the results."""
    facts, command = environment(), shlex.join(sys.argv)
    print(", ".join(f"{fact} {value}" for fact, value in facts.items()))
    print(command, flush=True)
    return {"command": command, "environment": facts}


def end(results: dict[str, Any], tables: Sequence[Table], options: argparse.Namespace) -> None:
    """Print the tables and the results as one line of JSON, which goes to the file of `--json`, too."""
    for table in tables:
        print(f"\n{table}")
    text = json.dumps(results)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(f"\n{text}", flush=True)
