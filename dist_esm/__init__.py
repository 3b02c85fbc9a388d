"""Data-parallel ESM-2 protein embeddings with torch.distributed.

The command is ``python -m dist_esm``, under torchrun for more than one device; see README.md. In a notebook:

>>> from dist_esm import Embedder, load
>>> Embedder("esm2_t33_650M_UR50D").embed(["MKTAYIAKQR"]).shape  # doctest: +SKIP
(1, 1280)
>>> load("embeddings/").vectors.shape  # doctest: +SKIP
(10000, 2560)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_esm.fasta.blocks import FastaError
from dist_esm.planning.assign import assign_files_by_size, count_sequences
from dist_esm.types import WorkerStatus
from dist_esm.version import __version__

if TYPE_CHECKING:
    from dist_esm.embedder import Embedder
    from dist_esm.outputs.load import EmbeddingSet, load

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


_LATER = {
    "Embedder": "dist_esm.embedder",
    "EmbeddingSet": "dist_esm.outputs.load",
    "load": "dist_esm.outputs.load",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch, which takes seconds, when it is first asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
