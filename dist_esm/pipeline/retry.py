"""A pack that fails is tried again: in halves, in fewer rows, or in a wider dtype."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError

import numpy as np

from dist_esm.attempt import as_value
from dist_esm.model.engine import Engine, Submitted, is_out_of_memory
from dist_esm.types import Pack, RankResult, Segment, SegmentEmbedding


def embed_pack(
    engine: Engine, pack: Pack, result: RankResult | None = None
) -> list[SegmentEmbedding | Exception]:
    """Submit a pack and wait for its embeddings; see `finish` for what comes back."""
    return finish(engine, pack, as_value(engine.submit, pack), result or RankResult())


def finish(
    engine: Engine, pack: Pack, submitted: Submitted | Exception, result: RankResult
) -> list[SegmentEmbedding | Exception]:
    """Wait for the embeddings of a pack that was submitted.

    A pack that fails is split and tried again with half the rows, down to single segments, whose error takes
    the embedding's place. An embedding that is not finite is computed again in a wider dtype.

    Returns
    -------
    list
        One for each segment, in order.
    """
    embeddings = submitted if isinstance(submitted, Exception) else as_value(submitted.result)
    if isinstance(embeddings, CancelledError):
        return [embeddings] * len(pack.segments)
    if isinstance(embeddings, Exception):
        return in_halves(engine, pack, embeddings, engine.num_rows(pack), result)
    if have_finite_sums(embeddings):
        return list(embeddings)
    return widen_all(engine, pack, embeddings, result)


def in_halves(
    engine: Engine, pack: Pack, error: Exception, num_rows: int, result: RankResult
) -> list[SegmentEmbedding | Exception]:
    """Try the halves of a pack that failed in so many rows, or the same pack in half the rows."""
    if is_out_of_memory(error):
        engine.free_memory()
    can_shrink = engine.is_gpu and is_out_of_memory(error) and num_rows > pack.num_tokens
    if len(pack.segments) == 1 and not can_shrink:
        return [error]
    result.num_split_packs += 1
    half_rows = num_rows // 2
    all_embeddings: list[SegmentEmbedding | Exception] = []
    for part in pack.halves() if len(pack.segments) > 1 else (pack,):
        embeddings = as_value(engine.run, part, half_rows)
        if isinstance(embeddings, Exception):
            all_embeddings += in_halves(engine, part, embeddings, half_rows, result)
        else:
            all_embeddings += widen_all(engine, part, embeddings, result)
    return all_embeddings


def widen_all(
    engine: Engine, pack: Pack, embeddings: Sequence[SegmentEmbedding], result: RankResult
) -> list[SegmentEmbedding | Exception]:
    """The embeddings of a pack, those that are not finite computed again."""
    pairs = zip(pack.segments, embeddings, strict=True)
    return [widen(engine, segment, embedding, result) for segment, embedding in pairs]


def widen(
    engine: Engine, segment: Segment, embedding: SegmentEmbedding, result: RankResult
) -> SegmentEmbedding | Exception:
    """An embedding; if it is not finite, the one that a wider dtype gives, or an error."""
    if have_finite_sums([embedding]):
        return embedding
    result.num_recomputed += 1
    wider = as_value(engine.recompute, segment)
    if isinstance(wider, Exception) or have_finite_sums([wider]):
        return wider
    return FloatingPointError(
        "its embedding is not finite, in a wider dtype neither: the weights may be damaged"
    )


def have_finite_sums(embeddings: Sequence[SegmentEmbedding]) -> bool:
    """Tell whether all sums and representations of BOS are finite.

    A residue's number that is not finite spoils the sum of its column, so residues need no look of their own.
    """
    vectors = [
        vector
        for embedding in embeddings
        for part in (embedding.sums, embedding.bos)
        for vector in part.values()
    ]
    return bool(np.isfinite(np.concatenate(vectors)).all())
