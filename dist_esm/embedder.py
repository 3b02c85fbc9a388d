"""ESM-2 in a notebook: sequences in, arrays out, on one device, with the numbers of the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.config import (
    Attention,
    Config,
    DeviceKind,
    Dtype,
    Include,
    LinearKind,
    Long,
    check,
    check_layers,
    choice,
    model_config,
)
from dist_esm.fasta.letters import make_proteins
from dist_esm.fasta.segments import apply_length_policy, make_segments, num_embedded
from dist_esm.model.checkpoints.locate import fetch
from dist_esm.model.engine import build_engine
from dist_esm.model.kernels.choose import choose_device, choose_dtype, choose_kernels
from dist_esm.model.pool import combine
from dist_esm.model.weights import architecture, check_weights, complete
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.retry import embed_pack
from dist_esm.types import Pack, SegmentEmbedding


class Embedder:
    """An ESM-2 on one device.

    Parameters
    ----------
    model
        One of fair-esm's names, `esm2_t6_8M_UR50D` to `esm2_t48_15B_UR50D`, or `auto`: what the weights are.
    weights
        As `model.weights` on the command line: a path, an id in Hugging Face's cache, `random`, or None for
        torch hub's cache.
    adapter
        As `model.adapter` on the command line: the directory of a LoRA adapter; None: none.
    layer
        The layer to return, fair-esm's numbering, negatives from the end.
    device, dtype, attention, linear
        As on the command line.
    truncation_seq_length, long, window_overlap
        As on the command line; what `long=skip` and `long=fail` would leave out is a ValueError here.
    toks_per_batch
        Tokens in a pack; None: the default for the device.

    Raises
    ------
    ValueError
        If a value is wrong, the weights cannot be had, or the device is not there.

    Examples
    --------
    >>> embedder = Embedder("esm2_t6_8M_UR50D", weights="random", device="cpu")
    >>> embedder.embed(["MKTAYIAKQR", "GAVLIPFMW"]).shape
    (2, 320)
    >>> [rows.shape for rows in embedder.embed(["MKTAYIAKQR", "GAVLIPFMW"], include="per_tok")]
    [(10, 320), (9, 320)]
    """

    def __init__(
        self,
        model: str = "esm2_t33_650M_UR50D",
        *,
        weights: str | os.PathLike[str] | None = None,
        adapter: str | os.PathLike[str] | None = None,
        layer: int = -1,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        linear: str = "auto",
        truncation_seq_length: int | None = 1022,
        long: str = "truncate",
        window_overlap: int = 256,
        toks_per_batch: int | None = None,
    ) -> None:
        config = Config(
            input="sequences",
            model=model_config(model),
            repr_layers=[layer],
            device=choice(DeviceKind, "device", device),
            dtype=choice(Dtype, "dtype", dtype),
            attention=choice(Attention, "attention", attention),
            linear=choice(LinearKind, "linear", linear),
            truncation_seq_length=truncation_seq_length,
            long=choice(Long, "long", long),
            window_overlap=window_overlap,
            toks_per_batch=toks_per_batch,
        )
        config.model.weights = None if weights is None else os.fspath(weights)
        config.model.adapter = None if adapter is None else os.fspath(adapter)
        check(config)
        fetch(config.model)
        complete(config.model)
        check_layers(config)
        self.weights = check_weights(config.model).words
        self.config = config
        (self.layer,) = config.resolved_layers()
        place = choose_device(config.device, 0, 1, "this machine")
        precision = choose_dtype(config.dtype, place)
        kernels = choose_kernels(
            config.attention, config.linear, place, precision, architecture(config.model).head_dim
        )
        self.engine = build_engine(config, place, precision, kernels)

    def embed(self, sequences: Iterable[str], include: str = "mean") -> Any:
        """Embed sequences, in their order.

        Parameters
        ----------
        sequences
            Letters; put right as the command line does by default: upper-cased, no blanks, gaps and trailing
            stops, X for each unknown letter. Special tokens such as `<mask>` and several chains in one are
            refused.
        include
            `mean` over residues, `bos`, or `per_tok`.

        Returns
        -------
        float32 array, shape (N, D), for `mean` and `bos`; list of N arrays, shape (L, D), for `per_tok`

        Raises
        ------
        ValueError
            If a sequence is empty or left out by the policies for letters and lengths; the message has its
            place.
        """
        if isinstance(sequences, str):
            raise ValueError("sequences is one string: pass a list of sequences")
        wanted = choice(Include, "include", include)
        self.engine.wants_rows = wanted is Include.per_tok
        packer = Packer(self.engine.toks_per_batch)
        segments: dict[int, list[SegmentEmbedding | None]] = {}
        lengths: list[int] = []
        for place, letters in enumerate(sequences):
            (protein,) = make_proteins(f"sequence_{place}", letters, place + 1, self.config)
            protein, _, spans = apply_length_policy(protein, self.config)
            if protein.skipped is not None:
                raise ValueError(f"sequence {place} is left out: {protein.skipped}")
            lengths.append(num_embedded(spans))
            segments[place] = [None] * len(spans)
            for segment in make_segments(place, protein.residues, spans):
                for pack in packer.add(segment):
                    self._run(pack, segments)
        for pack in packer.flush():
            self._run(pack, segments)
        vectors: list[NDArray[np.float32]] = []
        for place, length in enumerate(lengths):
            parts = [part for part in segments[place] if part is not None]
            vectors.append(combine(parts, length, [(wanted, self.layer)])[wanted, self.layer])
        if wanted is Include.per_tok:
            return vectors
        return np.stack(vectors) if vectors else np.empty((0, self.config.model.embed_dim), dtype=np.float32)

    def _run(self, pack: Pack, segments: dict[int, list[SegmentEmbedding | None]]) -> None:
        """Embed a pack, and put each segment's embedding in its place."""
        for segment, embedding in zip(pack.segments, embed_pack(self.engine, pack), strict=True):
            if isinstance(embedding, Exception):
                raise embedding
            segments[segment.protein][segment.part] = embedding
