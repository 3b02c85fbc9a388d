#!/usr/bin/env python3
"""What the live view costs: processor time of a look, of which rank 0 takes one a second.

    scripts/bench_view.py --ranks 8

The view is drawn on a terminal of its own that takes all it is sent.
"""

from __future__ import annotations

import os
import pty
import sys
import threading
import time
from contextlib import suppress

from benchmarks.harness import Table, begin, end, make_parser, parse_options
from dist_esm.jobs.progress.live import LiveView
from dist_esm.jobs.progress.state import Totals, Tracker
from dist_esm.jobs.progress.ticker import LOOK_SECONDS
from dist_esm.progress import Phase, RankProgress


def main() -> int:
    """Show a run of many ranks for a while, and print what a look took."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--looks", type=int, default=300)
    options = parse_options(parser)
    results = begin()
    seconds = seconds_of_a_look(options.ranks, options.looks)
    table = Table("live view", ("ranks", "ms of a core per look", "% of one core"))
    table.add(str(options.ranks), f"{1000 * seconds:.2f}", f"{100 * seconds / LOOK_SECONDS:.2f}")
    end({**results, "ranks": options.ranks, "seconds_per_look": seconds}, [table], options)
    return 0


def seconds_of_a_look(num_ranks: int, num_looks: int) -> float:
    """Return the processor seconds of one look at so many ranks."""
    ranks = [
        RankProgress(rank, "host", f"cuda:{rank} NVIDIA H100", Phase.embedding.name, f"proteins/{rank}.fasta")
        for rank in range(num_ranks)
    ]
    tracker = Tracker()
    tracker.totals = Totals(1000, 10**6, 10**15, 0, 0, 0)
    os.environ["TERM"] = "xterm-256color"  # on another, nothing is drawn
    master, terminal = pty.openpty()
    threading.Thread(target=swallow, args=(master,), daemon=True).start()
    before, sys.stderr = sys.stderr, os.fdopen(terminal, "w")
    view = LiveView()  # it draws on the stderr that there is now
    view.start()
    began = time.thread_time()
    for number in range(num_looks):
        for rank in ranks:
            rank.tokens, rank.cost, rank.proteins = 50_000 * number, 1e9 * number, 150 * number
        view.show(tracker.look(ranks, LOOK_SECONDS * number), tracker.totals, ranks)
    seconds = time.thread_time() - began
    view.stop()
    sys.stderr = before
    return seconds / num_looks


def swallow(terminal: int) -> None:
    """Read what a terminal is sent, until its other end is closed."""
    with suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


if __name__ == "__main__":
    raise SystemExit(main())
