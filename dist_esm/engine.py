"""One pack in, one answer for each of its segments out: the model on its device, pooled.

Same protein, same bits, by construction:

- on a CPU each segment is a forward of its own, on one thread; several run side by side. Nothing that a number depends on
  (shapes, threads, neighbours) differs between one protein's company and another's. It is also the fastest way measured.
- on a GPU a pack always has `toks_per_batch` rows, so each matrix product runs with the same shape and kernel every time, and
  attention and pooling see one protein at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dist_esm.esm2 import ESM2
from dist_esm.kernels import Seqlens
from dist_esm.pool import pool
from dist_esm.records import Answer, Pack, Segment

DEFAULT_TOKS_PER_BATCH = {"cpu": 8192, "cuda": 16384}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a pack did not fit."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class Engine:
    """A model on its device.

    Parameters
    ----------
    model
        On its device, in its dtype, in eval mode.
    layers
        Layers to answer.
    wants_rows
        Whether per-residue representations are wanted.
    toks_per_batch
        Tokens of a pack; None: the default for the device.
    num_threads
        CPU only: segments that run side by side; None: the cores of this process.
    """

    def __init__(self, model: ESM2, layers: Sequence[int], wants_rows: bool, toks_per_batch: int | None = None, num_threads: int | None = None) -> None:
        self.model = model
        self.layers = list(layers)
        self.wants_rows = wants_rows
        self.toks_per_batch = toks_per_batch or DEFAULT_TOKS_PER_BATCH[model.device.type]
        self.num_threads = num_threads or num_cores()
        self._threads: ThreadPoolExecutor | None = None
        if model.device.type == "cpu":
            self._threads = ThreadPoolExecutor(self.num_threads, "forward", initializer=torch.set_num_threads, initargs=(1,))

    def run(self, pack: Pack) -> list[Answer]:
        """Answer the segments of a pack, in their order.

        Raises
        ------
        Exception
            Whatever the forward raises; `is_out_of_memory` tells whether a smaller pack may do.
        """
        if self._threads is None:
            return self._forward(pack.segments, self.toks_per_batch)
        longest_first = sorted(range(len(pack.segments)), key=lambda i: -len(pack.segments[i].tokens))
        futures = {i: self._threads.submit(self._forward, [pack.segments[i]], 0) for i in longest_first}
        return [futures[i].result()[0] for i in range(len(pack.segments))]

    def free_memory(self) -> None:
        """Give cached device memory back, after a pack did not fit."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Start nothing more; what is running ends with its segment."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], num_rows: int) -> list[Answer]:
        """Embed segments in one forward over at least `num_rows` rows; rows without a protein cost matrix products and nothing else."""
        lengths = np.array([len(segment.tokens) for segment in segments])
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        num_tokens = int(bounds[-1])
        tokens = np.zeros(max(num_rows, num_tokens), dtype=np.int64)
        positions = np.zeros_like(tokens)
        tokens[:num_tokens] = np.concatenate([segment.tokens for segment in segments])
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(bounds[:-1], lengths)
        device = self.model.device
        seqlens = Seqlens.of(bounds.tolist(), device)
        hidden = self.model(self._to_device(tokens), self._to_device(positions), seqlens, self.layers)
        return pool(hidden, seqlens.bounds, [segment.keep for segment in segments], self.wants_rows)

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)
