"""Data-parallel ESM-2 protein embeddings with torch.distributed.

The command is ``python -m dist_esm``, under torchrun for more than one device; see README.md.
"""

from dist_esm.plan import assign_files_by_size, count_sequences
from dist_esm.records import WorkerStatus
from dist_esm.scan import FastaError

__all__ = ["FastaError", "WorkerStatus", "assign_files_by_size", "count_sequences"]
