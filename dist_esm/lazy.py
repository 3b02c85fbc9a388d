"""The public names of the package, imported when they are first asked for: torch takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

MODULES = {
    "Embedder": "dist_esm.embedder",
    "EmbeddingSet": "dist_esm.outputs.load",
    "FastaError": "dist_esm.fasta.blocks",
    "WorkerStatus": "dist_esm.types",
    "assign_files_by_size": "dist_esm.planning.assign",
    "count_sequences": "dist_esm.planning.assign",
    "load": "dist_esm.outputs.load",
}


def __getattr__(name: str) -> Any:
    """Import the module that has a public name, and return what it names."""
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module 'dist_esm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return ["__version__", *MODULES]
