"""The command, with weights that come from another server: fetching.py URL key=value ..."""

import sys

import dist_esm.model.checkpoints.locate as locate
from dist_esm.__main__ import leave, main

locate.URL, *overrides = sys.argv[1:]
leave(main(overrides))
