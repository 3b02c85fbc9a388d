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
    """SegmentEmbedding a pack at once; see `finish`."""
    return finish(engine, pack, as_value(engine.submit, pack), result or RankResult())


def finish(
    engine: Engine, pack: Pack, submitted: Submitted | Exception, result: RankResult
) -> list[SegmentEmbedding | Exception]:
    """The answers of a pack that was submitted, in the order of its segments.

    A pack that fails is split and tried again with half the rows, down to single segments, whose error takes the answer's place.
    An answer that is not finite is computed again in a wider dtype.
    """
    answers = submitted if isinstance(submitted, Exception) else as_value(submitted.result)
    if isinstance(answers, CancelledError):
        return [answers] * len(pack.segments)
    if isinstance(answers, Exception):
        return in_halves(engine, pack, answers, engine.num_rows(pack), result)
    if are_finite(answers):
        return list(answers)
    return [
        widen(engine, segment, answer, result) for segment, answer in zip(pack.segments, answers, strict=True)
    ]


def in_halves(
    engine: Engine, pack: Pack, error: Exception, num_rows: int, result: RankResult
) -> list[SegmentEmbedding | Exception]:
    """What `finish` does with a pack that failed in so many rows."""
    if is_out_of_memory(error):
        engine.free_memory()
    can_shrink = engine.is_gpu and is_out_of_memory(error) and num_rows > pack.num_tokens
    if len(pack.segments) == 1 and not can_shrink:
        return [error]
    result.num_split_packs += 1
    rows = num_rows // 2
    found: list[SegmentEmbedding | Exception] = []
    for part in pack.halves() if len(pack.segments) > 1 else (pack,):
        answers = as_value(engine.run, part, rows)
        if isinstance(answers, Exception):
            found += in_halves(engine, part, answers, rows, result)
        else:
            found += [
                widen(engine, segment, answer, result)
                for segment, answer in zip(part.segments, answers, strict=True)
            ]
    return found


def widen(
    engine: Engine, segment: Segment, answer: SegmentEmbedding, result: RankResult
) -> SegmentEmbedding | Exception:
    """An answer, or what a wider dtype gives if it is not finite: a number that is not spoils the sum of its column."""
    if are_finite([answer]):
        return answer
    result.num_recomputed += 1
    wider = as_value(engine.recompute, segment)
    if isinstance(wider, Exception) or are_finite([wider]):
        return wider
    return FloatingPointError(
        "its embedding is not finite, in a wider dtype neither: the weights may be damaged"
    )


def are_finite(answers: Sequence[SegmentEmbedding]) -> bool:
    """Whether all sums and representations of BOS are finite numbers."""
    return bool(
        np.isfinite(
            np.concatenate(
                [x for answer in answers for part in (answer.sums, answer.bos) for x in part.values()]
            )
        ).all()
    )
