"""Data-parallel ESM-2 protein embeddings with torch.distributed.

The command is ``dist-esm`` or ``python -m dist_esm``, which take all GPUs of the host; see README.md. In a
notebook:

>>> from dist_esm import Embedder, load
>>> Embedder("esm2_t33_650M_UR50D").embed(["MKTAYIAKQR"]).shape  # doctest: +SKIP
(1, 1280)
>>> load("embeddings/").vectors.shape  # doctest: +SKIP
(10000, 2560)
"""
# Any Python can read this file, so that one that is too old gets a line instead of a traceback.

import sys

if sys.version_info < (3, 11):
    _problem = "dist_esm: error: Python %d.%d is too old (%s): use Python 3.11 or newer" % (
        sys.version_info[0],
        sys.version_info[1],
        sys.executable,
    )
    if sys.argv[:1] in (["-m"], ["-c"]):  # python -m dist_esm; Python 2 calls it -c
        sys.exit(_problem)
    raise ImportError(_problem)

from typing import TYPE_CHECKING

from dist_esm.version import __version__

if TYPE_CHECKING:
    from dist_esm.embedder import Embedder
    from dist_esm.fasta.blocks import FastaError
    from dist_esm.outputs.load import EmbeddingSet, load
    from dist_esm.planning.assign import assign_files_by_size, count_sequences
    from dist_esm.types import WorkerStatus
else:
    from dist_esm.lazy import __dir__, __getattr__

__all__ = [
    "Embedder",
    "EmbeddingSet",
    "FastaError",
    "WorkerStatus",
    "__version__",
    "assign_files_by_size",
    "count_sequences",
    "load",
]
