"""The command, and a shell command that runs whenever a function of the package is called.

Run by `run_meanwhile` as `meanwhile.py MODULE:FUNCTION COMMAND key=value ...`. The shell command is real:
only its moment is arranged. The process of the command line is its ``$PPID``.
"""

import importlib
import subprocess
import sys

from dist_esm.__main__ import leave, main

place, command, *overrides = sys.argv[1:]
module, name = place.split(":")
owner = importlib.import_module(module)
function = getattr(owner, name)


def call(*args, **options):
    subprocess.run(command, shell=True, check=False)
    return function(*args, **options)


setattr(owner, name, call)
leave(main(overrides))
