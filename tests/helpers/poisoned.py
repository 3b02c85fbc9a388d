"""The command, with one protein that ends its process: poisoned.py WHERE ENDING RESIDUES key=value ...

WHERE is ``forward`` (when a pack that holds the protein is submitted) or ``reader`` (when its record is
read), ENDING a key of `ENDINGS`. How the process ends is real; what is arranged is which protein does it.
"""

import os
import signal
import sys
import threading

from dist_esm.__main__ import leave, main
from dist_esm.fasta import parser
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.engine import Engine


def fail() -> None:
    raise RuntimeError("a fault of the device")


ENDINGS = {
    "RuntimeError": fail,
    "exit_code_0": lambda: os._exit(0),
    "exit_code_3": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}

where, ending, residues, *overrides = sys.argv[1:]
submit, make_proteins = Engine.submit, parser.make_proteins


def poisoned_submit(self, pack, *args, **options):
    tokens = tokenize(residues.encode()).tobytes()
    if any(segment.tokens.tobytes() == tokens for segment in pack.segments):
        ENDINGS[ending]()
    return submit(self, pack, *args, **options)


def poisoned_make_proteins(header, letters, *args, **options):
    is_read_to_be_embedded = threading.current_thread() is not threading.main_thread()
    if letters == residues and is_read_to_be_embedded:
        ENDINGS[ending]()
    return make_proteins(header, letters, *args, **options)


if where == "forward":
    Engine.submit = poisoned_submit
else:
    parser.make_proteins = poisoned_make_proteins
leave(main(overrides))
