"""ESM-2 in a notebook: sequences in, arrays out, on one device, with the numbers of the command line.

from dist_esm import Embedder

embedder = Embedder("esm2_t33_650M_UR50D")
vectors = embedder.embed(["MKTAYIAKQR", "GAVLIPFMW"])               # (2, 1280)
rows = embedder.embed(["MKTAYIAKQR"], include="per_tok")[0]          # (10, 1280)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.config import Attention, DeviceKind, Dtype, Include, LinearKind, Long, check
from dist_esm.fasta.letters import make_proteins
from dist_esm.fasta.segments import apply_length_policy, make_segments, num_embedded
from dist_esm.model.engine import make_engine
from dist_esm.model.kernels.choose import choose_device, choose_dtype, choose_kernels
from dist_esm.model.pool import combine
from dist_esm.model.weights import architecture, fetch
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.retry import embed_pack
from dist_esm.types import Pack, SegmentEmbedding


class Embedder:
    """An ESM-2 on one device.

    Parameters
    ----------
    model
        One of fair-esm's names, `esm2_t6_8M_UR50D` to `esm2_t48_15B_UR50D`.
    weights
        As `model.weights` on the command line: None for torch hub's cache (downloaded once), a path, or `random`.
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
    """

    def __init__(
        self,
        model: str = "esm2_t33_650M_UR50D",
        *,
        weights: str | os.PathLike[str] | None = None,
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
        from dist_esm.cli import compose_config

        config = compose_config(["input=sequences", f"model={model}"])
        config.model.weights = None if weights is None else os.fspath(weights)
        config.repr_layers = [layer]
        config.device, config.dtype, config.attention = (
            named(DeviceKind, device),
            named(Dtype, dtype),
            named(Attention, attention),
        )
        config.linear = named(LinearKind, linear)
        config.truncation_seq_length, config.window_overlap, config.long = (
            truncation_seq_length,
            window_overlap,
            named(Long, long),
        )
        config.toks_per_batch = toks_per_batch
        check(config)
        self.config = config
        (self.layer,) = config.resolved_layers()
        place = choose_device(config.device, 0, 1, "this machine")
        precision = choose_dtype(config.dtype, place)
        kernels = choose_kernels(
            config.attention, config.linear, place, precision, architecture(config.model).head_dim
        )
        fetch(config.model)
        self.engine = make_engine(config, place, precision, kernels)

    def embed(self, sequences: Iterable[str], include: str = "mean") -> Any:
        """Embed sequences, in their order.

        Parameters
        ----------
        sequences
            Letters; put right as the command line does by default (upper-cased, blanks, gaps and trailing stops
            removed, unknown letters X). Special tokens such as `<mask>` and several chains in one are refused.
        include
            `mean` over residues, `bos`, or `per_tok`.

        Returns
        -------
        float32 array, shape (N, D), for `mean` and `bos`; a list of N float32 arrays, shape (L, D), for `per_tok`

        Raises
        ------
        ValueError
            If a sequence is empty or left out by the policies for letters and lengths; the message has its place.
        """
        if isinstance(sequences, str):
            raise ValueError("sequences is one string: pass a list of sequences")
        kind = named(Include, include)
        self.engine.wants_rows = kind is Include.per_tok
        packer = Packer(self.engine.toks_per_batch)
        answers: dict[int, list[SegmentEmbedding | None]] = {}
        lengths: list[int] = []
        for place, letters in enumerate(sequences):
            (protein,) = make_proteins(f"sequence_{place}", letters, place + 1, self.config)
            protein, _, spans = apply_length_policy(protein, self.config)
            if protein.skipped is not None:
                raise ValueError(f"sequence {place} is left out: {protein.skipped}")
            lengths.append(num_embedded(spans))
            answers[place] = [None] * len(spans)
            for segment in make_segments(place, protein.residues, spans):
                for pack in packer.add(segment):
                    self._run(pack, answers)
        for pack in packer.flush():
            self._run(pack, answers)
        vectors: list[NDArray[np.float32]] = [
            combine([one for one in answers[place] if one is not None], length, [(kind, self.layer)])[
                kind, self.layer
            ]
            for place, length in enumerate(lengths)
        ]
        if kind is Include.per_tok:
            return vectors
        return np.stack(vectors) if vectors else np.empty((0, self.config.model.embed_dim), dtype=np.float32)

    def _run(self, pack: Pack, answers: dict[int, list[SegmentEmbedding | None]]) -> None:
        found = embed_pack(self.engine, pack)
        for segment, answer in zip(pack.segments, found, strict=True):
            if isinstance(answer, Exception):
                raise answer
            answers[segment.protein][segment.part] = answer


def named(kind: type[Any], name: str) -> Any:
    """A member of an enum by its name.

    Raises
    ------
    ValueError
        If there is none; the message lists them.
    """
    if name not in kind.__members__:
        raise ValueError(f"{name!r} is no {kind.__name__}: use one of {', '.join(kind.__members__)}")
    return kind[name]
