"""The model on its device: a pack in, one embedding for each of its segments out.

The same protein gets the same bits by construction:

- On a CPU each segment is a forward of its own, on one thread; several run side by side. So nothing that a
  number depends on (shapes, threads, neighbours) changes with a protein's company. This is also the fastest
  way measured.
- On a GPU a pack always has `toks_per_batch` rows, so each matrix product runs with the same shape and kernel
  every time. Packs may have fewer rows only with kernels whose bits do not depend on the number of rows
  (`LinearOps.any_rows`). Attention and pooling see one protein at a time.

Packs are submitted before the results of earlier ones are read, so that the device always has its next pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch

from dist_esm.attempt import as_value
from dist_esm.config import Config, Include
from dist_esm.fasta.tokens import token_table, tokenize
from dist_esm.launcher import num_cores
from dist_esm.model.esm2 import ESM2
from dist_esm.model.kernels.attention import Seqlens, tiles
from dist_esm.model.kernels.choose import PLAIN, Kernels
from dist_esm.model.pool import GpuPool, kept_rows, pool
from dist_esm.model.weights import load_model
from dist_esm.types import Pack, Segment, SegmentEmbedding

WAVE = 25344
"""Rows of a pack that make a whole number of tiles, of 128 or 192 rows, for each multiprocessor of an H100.
So no matrix product ends in a wave of tiles that leaves most multiprocessors idle."""
FEWEST_ROWS = 384
PADDING = 128
"""Rows of a stretch of padding: so few that attention within it costs little."""
AHEAD = 2
"""Packs that are submitted before the first of their results is read."""
POLL_SECONDS = 0.2


def default_toks_per_batch(device_type: str, embed_dim: int) -> int:
    """Return the tokens of a pack for a device and a width of the model.

    On a GPU the products of a narrow model are short, so its packs are larger: the host must stay ahead of
    the device. Measured in LOG.md.
    """
    if device_type == "cpu":
        return 8192
    return WAVE * (1 if embed_dim > 1280 else 2 if embed_dim > 640 else 4)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that a pack did not fit into memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class Submitted(Protocol):
    """A pack on its way through the device."""

    def result(self) -> list[SegmentEmbedding]:
        """Wait for the embeddings of the pack's segments, and return them in their order."""


class Engine:
    """A model on its device. As a context manager it is closed at the end.

    Parameters
    ----------
    model
        On its device, in its dtype, in eval mode.
    layers
        Layers to return.
    wants_rows
        True if per-residue representations are wanted.
    toks_per_batch
        Tokens of a pack; None: the default for the device.
    num_threads
        Cores of this rank: on a CPU so many segments run side by side; None: the cores of this process.
    load_wider
        Loads the same model in a wider dtype, for segments that are not finite in this one; called at most
        once.
    rows_dtype
        Dtype that per-residue representations are rounded to before they leave the device.
    """

    def __init__(
        self,
        model: ESM2,
        layers: Sequence[int],
        wants_rows: bool,
        toks_per_batch: int | None = None,
        num_threads: int | None = None,
        load_wider: Callable[[], ESM2] | None = None,
        rows_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.wants_rows = wants_rows
        self.rows_dtype = rows_dtype
        self.is_gpu = model.device.type == "cuda"
        self.toks_per_batch = toks_per_batch or default_toks_per_batch(
            model.device.type, model.arch.embed_dim
        )
        self.num_threads = num_threads or num_cores()
        self.idle_seconds = 0.0
        """GPU only: time between one pack's end on the device and the next one's beginning."""
        self.startup: dict[str, float] = {}
        """Seconds that loading took, by step."""
        self.is_abandoned = False
        """True once `abandon` was called."""
        self._load_wider = load_wider
        self._wider: Engine | None = None
        self._last: torch.cuda.Event | None = None
        self._threads: ThreadPoolExecutor | None = None
        if self.is_gpu:
            self._most_rows = 0
            self._copies = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        else:
            # No thread starts here: the executor starts its threads when the first segments are submitted.
            self._threads = ThreadPoolExecutor(
                self.num_threads, "forward", initializer=torch.set_num_threads, initargs=(1,)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def for_layers(self, layers: Sequence[int], wants_rows: bool, rows_dtype: str = "float32") -> Engine:
        """Return another engine of the same model, for other representations; it is closed by itself.

        Parameters
        ----------
        layers, wants_rows
            As for `Engine`.
        rows_dtype
            Name of the dtype of per-residue representations.
        """
        return Engine(
            self.model,
            layers,
            wants_rows,
            self.toks_per_batch,
            self.num_threads,
            self._load_wider,
            getattr(torch, rows_dtype),
        )

    def submit(self, pack: Pack, num_rows: int | None = None) -> Submitted:
        """Start to embed a pack; do not wait for it.

        Parameters
        ----------
        pack
            The segments to embed.
        num_rows
            GPU only: rows of the matrix products, for packs that did not fit; None: what `num_rows` says.

        Raises
        ------
        Exception
            Any error of the forward, here or in the result. `is_out_of_memory` tells whether a smaller pack
            may fit.
        """
        if self._threads is None:
            return self._on_gpu(pack.segments, self.num_rows(pack) if num_rows is None else num_rows)
        longest_first = sorted(range(len(pack.segments)), key=lambda i: -len(pack.segments[i].tokens))
        futures = {i: self._threads.submit(self._on_cpu, [pack.segments[i]], 0) for i in longest_first}
        return Computing(self, [futures[i] for i in range(len(pack.segments))])

    def num_rows(self, pack: Pack) -> int:
        """Return the rows of the matrix products of a pack; for a GPU only.

        The number is the same for all packs. With kernels whose bits do not depend on it, it is halved as
        long as the pack fits.
        """
        rows = self.toks_per_batch
        while self.model.kernels.linear.any_rows and rows >= 2 * FEWEST_ROWS and rows // 2 >= pack.num_tokens:
            rows //= 2
        return rows

    @property
    def toks_of_last(self) -> int:
        """Tokens of the very last packs, before there are no more.

        On a GPU packs become smaller towards the end where rows of residues are wanted: what comes with the
        last one is written while the device has nothing to do. Kernels that take any number of rows lose 3%
        with the smallest.
        """
        if not (self.is_gpu and self.wants_rows and self.model.kernels.linear.any_rows):
            return self.toks_per_batch
        return min(self.toks_per_batch, max(FEWEST_ROWS, self.toks_per_batch // 4))

    def run(self, pack: Pack, num_rows: int | None = None) -> list[SegmentEmbedding]:
        """Embed the segments of a pack and return their embeddings in order, as `submit` does."""
        return self.submit(pack, num_rows).result()

    def warm_up(self) -> None:
        """Compile the kernels, or load them, before the first pack.

        On a GPU `toks_per_batch` is halved until a pack fits in memory. On a CPU the libraries below torch
        choose their code at the first call, which comes here, before several threads would make it at once.

        Raises
        ------
        Exception
            Any error of the forward; that it is out of memory, if the smallest pack does not fit either.
        """
        pack = Pack((Segment(0, 0, tokenize(b"M"), (0, 1)),))
        if not self.is_gpu:
            self.run(pack)
            return
        while isinstance(answer := as_value(self.run, pack, self.toks_per_batch), Exception):
            if not is_out_of_memory(answer) or self.toks_per_batch < 2 * FEWEST_ROWS:
                raise answer
            self.toks_per_batch //= 2
            self.free_memory()
        self._last = None

    def recompute(self, segment: Segment) -> SegmentEmbedding:
        """Embed one segment in the next wider dtype.

        Raises
        ------
        CancelledError
            If the engine was abandoned.
        FloatingPointError
            If there is no wider dtype.
        """
        if self.is_abandoned:
            raise CancelledError
        if self._wider is None:
            if self._load_wider is None:
                raise FloatingPointError("the embedding is not finite, and no wider dtype is at hand")
            self._wider = Engine(
                self._load_wider(), self.layers, self.wants_rows, num_threads=1, rows_dtype=self.rows_dtype
            )
        self._wider.wants_rows = self.wants_rows
        (embedding,) = self._wider.run(Pack((segment,)), num_rows=0)
        return embedding

    def free_memory(self) -> None:
        """Return cached device memory to the driver, after a pack did not fit."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def abandon(self) -> None:
        """Begin no further segment on a CPU, and return none. A signal handler may call it."""
        self.is_abandoned = True
        if self._wider is not None:
            self._wider.abandon()

    def close(self) -> None:
        """Start nothing more, and wait for the segments that are running; may be called again.

        An engine that was abandoned is not waited for.
        """
        if self._threads is not None:
            self._threads.shutdown(wait=not self.is_abandoned, cancel_futures=True)
        if self._wider is not None:
            self._wider.close()

    @property
    def _rows_dtype(self) -> torch.dtype | None:
        return self.rows_dtype if self.wants_rows else None

    @torch.inference_mode()
    def _on_cpu(self, segments: Sequence[Segment], num_rows: int) -> list[SegmentEmbedding]:
        """Embed segments in one forward over at least `num_rows` rows; padding costs nothing but time."""
        if self.is_abandoned:
            raise CancelledError
        tokens, positions, bounds = lay_out(segments, num_rows)
        kept = token_dropout(segments, tokens)
        hidden = self.model(
            torch.from_numpy(tokens),
            torch.from_numpy(positions),
            Seqlens.of(bounds, self.model.device),
            self.layers,
            None if kept is None else torch.from_numpy(kept).to(self.model.device),
        )
        return pool(hidden, bounds, [segment.keep for segment in segments], self._rows_dtype)

    @torch.inference_mode()
    def _on_gpu(self, segments: Sequence[Segment], num_rows: int) -> Submitted:
        """Queue a pack on the GPU without waiting: a copy to it, the forward, and the copies back."""
        tokens, positions, bounds = lay_out(segments, num_rows)
        spans, tiles_C3 = kept_rows(bounds, [segment.keep for segment in segments]), tiles(bounds)
        starts, stops = zip(*spans, strict=True)
        parts = [
            np.asarray(part, dtype=np.int32)
            for part in (tiles_C3.ravel(), bounds[: len(spans)], starts, stops, tokens, positions)
        ]
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        on_device = (
            torch.from_numpy(np.concatenate(parts)).pin_memory().to(self.model.device, non_blocking=True)
        )
        tiles_C, bos_B, starts_B, stops_B, tokens_T, positions_T = torch.split(
            on_device, [len(part) for part in parts]
        )
        kept = token_dropout(segments, tokens)
        hidden = self.model(
            tokens_T,
            positions_T,
            Seqlens(bounds, tiles_C.view(tiles_C3.shape)),
            self.layers,
            None if kept is None else torch.from_numpy(kept).to(self.model.device),
        )
        self._most_rows = max(self._most_rows, spans[-1][1])
        pooled = GpuPool(
            hidden,
            bos_B,
            starts_B,
            stops_B,
            spans,
            self.model.kernels.linear.segment_sum,
            self._rows_dtype,
            self._copies,
            self._most_rows,
        )
        submitted = OnDevice(self, pooled, began, self._last)
        self._last = pooled.ended
        return submitted


def build_engine(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels,
    num_threads: int | None = None,
    fingerprint: str | None = None,
) -> Engine:
    """Load the model that a configuration names and return its engine.

    The wider dtype is fp32 for bf16 and fp16, and fp64 for fp32. `fingerprint` is that of the weights, as for
    `load_model`.

    Raises
    ------
    ValueError
        If the weights cannot be read, or are not those of the model that is named.
    """
    wider = torch.float64 if dtype is torch.float32 else torch.float32
    return Engine(
        load_model(config.model, device, dtype, kernels, fingerprint),
        config.resolved_layers(),
        Include.per_tok in config.include,
        config.toks_per_batch,
        num_threads,
        load_wider=lambda: load_model(config.model, device, wider, PLAIN),
        rows_dtype=getattr(torch, config.save_dtype.name),
    )


def lay_out(segments: Sequence[Segment], num_rows: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Lay segments end to end, and fill up to `num_rows` with stretches of padding.

    Returns
    -------
    tokens and positions, int64 of shape (T,); offsets of the segments, then of the stretches of padding
    """
    lengths = [len(segment.tokens) for segment in segments]
    num_tokens = sum(lengths)
    rest = max(0, num_rows - num_tokens)
    lengths += [min(PADDING, rest - first) for first in range(0, rest, PADDING)]
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.full(bounds[-1], token_table().pad, dtype=np.int64)
    tokens[:num_tokens] = np.concatenate([segment.tokens for segment in segments])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return tokens, positions, bounds.tolist()


def token_dropout(segments: Sequence[Segment], tokens: np.ndarray) -> np.ndarray | None:
    """Return by what fair-esm divides the embedding of each token where tokens of a sequence are masked.

    In a segment of L tokens, of which m are masked, this is 1 - m / L. A mask's own embedding is dropped:
    infinity. It depends on the segment alone, and is 1 for those without a mask, which changes no bit of
    them.

    Returns
    -------
    float32 array, shape (T,); None if no token is masked, which is nearly always so
    """
    is_mask = tokens == token_table().mask
    if not is_mask.any():
        return None
    kept = np.ones(len(tokens), dtype=np.float32)
    first = 0
    for segment in segments:
        after = first + len(segment.tokens)
        kept[first:after] -= np.float32(is_mask[first:after].sum()) / np.float32(after - first)
        first = after
    kept[is_mask] = np.inf
    return kept


@dataclass(frozen=True)
class Computing:
    """A pack on a CPU: one future for each segment."""

    engine: Engine
    futures: Sequence[Future[list[SegmentEmbedding]]]

    def result(self) -> list[SegmentEmbedding]:
        """Wait for the threads, and return the embeddings in the order of the segments.

        Raises
        ------
        CancelledError
            If the engine was abandoned: a large model takes minutes for a segment, and nobody waits for that.
        """
        while wait(self.futures, timeout=POLL_SECONDS).not_done:
            if self.engine.is_abandoned:
                raise CancelledError
        return [future.result()[0] for future in self.futures]


@dataclass(frozen=True)
class OnDevice:
    """A pack on a GPU."""

    engine: Engine
    pooled: GpuPool
    began: torch.cuda.Event
    before: torch.cuda.Event | None
    """The end of the pack before it."""

    def result(self) -> list[SegmentEmbedding]:
        """Wait for the copies to the host, and count the time for which the device was idle before it."""
        embeddings = self.pooled.segment_embeddings()
        if self.before is not None:
            self.engine.idle_seconds += max(0.0, self.before.elapsed_time(self.began) / 1000)
        return embeddings
