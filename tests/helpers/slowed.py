"""The command, one rank of which takes longer for each pack: slowed.py RANK SECONDS key=value ..."""

import os
import sys
import time

from dist_esm.__main__ import leave, main
from dist_esm.model.engine import Engine

rank, seconds, *overrides = sys.argv[1:]
submit = Engine.submit


def slow_submit(self, *args, **options):
    if os.environ.get("RANK", "0") == rank:
        time.sleep(float(seconds))
    return submit(self, *args, **options)


Engine.submit = slow_submit
leave(main(overrides))
