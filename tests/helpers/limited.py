"""The command, with so many bytes of address space left to it once its model is loaded.

Run by jobs/test_embed.py as `limited.py BYTES key=value ...`.
"""

import resource
import sys
from pathlib import Path

from dist_esm.__main__ import main
from dist_esm.jobs import embed as run

embed_units = run.embed_units


def embed_within_limit(*args):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
    return embed_units(*args)


run.embed_units = embed_within_limit
sys.exit(main(sys.argv[2:]))
