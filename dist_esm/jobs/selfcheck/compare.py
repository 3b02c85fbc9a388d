"""How far numbers are from the numbers they should be, as `job=selfcheck` puts it: pure functions, and the table of their results.

A mean over residues is held to the limits themselves. `bos` and `per_tok` are single tokens, whose rounding no average evens out: they may be
ten times as far off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dist_esm.config import Include, SelfcheckConfig
from dist_esm.types import SegmentEmbedding

MIN_COSINE = 0.999
MAX_RELATIVE_ERROR = {torch.float32: 1e-5}
TOKEN_FACTOR = 10


@dataclass(frozen=True)
class Limits:
    """What is too far."""

    min_cosine: float
    max_relative_error: float | None
    """None: only the cosine counts."""

    @classmethod
    def of(cls, config: SelfcheckConfig, dtype: torch.dtype, kind: Include) -> Limits:
        """The limits of a kind of representation, from the configuration or by default for the dtype."""
        cosine = MIN_COSINE if config.min_cosine is None else config.min_cosine
        error = (
            MAX_RELATIVE_ERROR.get(dtype) if config.max_relative_error is None else config.max_relative_error
        )
        if kind is Include.mean:
            return cls(cosine, error)
        return cls(
            max(-1.0, round(1 - TOKEN_FACTOR * (1 - cosine), 12)),
            None if error is None else TOKEN_FACTOR * error,
        )

    def __str__(self) -> str:
        return f"cosine >= {self.min_cosine:g}" + (
            "" if self.max_relative_error is None else f", error <= {self.max_relative_error:g}"
        )


@dataclass(frozen=True)
class Comparison:
    """One kind of representation of one layer, over all proteins of the sample, and over all their residues for `per_tok`."""

    kind: str
    layer: int
    worst_cosine: float
    median_cosine: float
    largest_relative_error: float
    """Largest ||ours - theirs|| / ||theirs||."""
    largest_difference: float
    """Largest |ours - theirs| of a single number."""
    worst_protein: str
    """The one with the largest relative error."""
    limits: Limits
    is_within: bool


@dataclass(frozen=True)
class RankCheck:
    """What one rank found."""

    rank: int
    host: str
    device: str
    kind_of_device: str
    """Ranks of one kind must have the same bits."""
    dtype: str
    kernels: str
    toks_per_batch: int
    fair_esm_device: str
    comparisons: tuple[Comparison, ...]
    num_packs: int
    num_answers: int
    """Answers from packs that were compared with those of the same segment alone."""
    other_bits: Mapping[str, float]
    """Proteins with other bits in a pack than alone, and the largest difference."""
    other_tokens: tuple[str, ...]
    """Proteins whose tokens are not fair-esm's."""
    bits: tuple[str, ...]
    """Digest of each protein's answer, alone, in the order of the sample."""
    seconds: float


def compare(
    kind: Include,
    layer: int,
    names: Sequence[str],
    ours: Sequence[NDArray[np.float32]],
    theirs: Sequence[NDArray[np.float32]],
    limits: Limits,
) -> Comparison:
    """Measure the distance between two answers for the same proteins.

    Parameters
    ----------
    kind, layer
        What is compared.
    names
        What to call each protein.
    ours, theirs : sequence of arrays, shape (D,) or (L, D)
        One of each for each protein; vectors are compared row by row, in float64.
    limits
        What is too far. A vector that is zero or not finite is too far from any.

    Raises
    ------
    ValueError
        If the two have different shapes.
    """
    cosines, errors, differences = [], [], []
    for name, one, other in zip(names, ours, theirs, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"{kind.name} of layer {layer} of {name} has shape {one.shape}, fair-esm's has {other.shape}"
            )
        x_LD, y_LD = (np.atleast_2d(values).astype(np.float64) for values in (one, other))
        with np.errstate(all="ignore"):
            x_L, y_L, apart_L = (np.linalg.norm(values, axis=1) for values in (x_LD, y_LD, x_LD - y_LD))
            cosine_L, error_L, difference_L = (
                (x_LD * y_LD).sum(1) / (x_L * y_L),
                apart_L / y_L,
                np.abs(x_LD - y_LD).max(1),
            )
        cosines.append(np.where(np.isnan(cosine_L), -1.0, np.minimum(cosine_L, 1.0)))
        errors.append(float(np.where(np.isnan(error_L), np.inf, error_L).max()))
        differences.append(float(np.where(np.isnan(difference_L), np.inf, difference_L).max()))
    worst, error = float(np.concatenate(cosines).min()), max(errors)
    is_within = worst >= limits.min_cosine and (
        limits.max_relative_error is None or error <= limits.max_relative_error
    )
    median = float(np.median(np.concatenate(cosines)))
    return Comparison(
        kind.name,
        layer,
        worst,
        median,
        error,
        max(differences),
        names[errors.index(error)],
        limits,
        is_within,
    )


def arrays(answer: SegmentEmbedding) -> list[NDArray[np.float32]]:
    """Every array of an answer, in a fixed order."""
    return [values[layer] for values in (answer.sums, answer.bos, answer.rows) for layer in sorted(values)]


def bit_difference(one: SegmentEmbedding, other: SegmentEmbedding) -> float | None:
    """None if two answers have the same bits, else their largest difference, which may be 0 (of -0) or infinite (of NaN or of shapes)."""
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    found = [np.abs(a.astype(np.float64) - b).max() for a, b in pairs if a.tobytes() != b.tobytes()]
    return float(np.nan_to_num(max(found), nan=np.inf)) if found else None


def problems(ranks: Sequence[RankCheck], names: Sequence[str]) -> list[str]:
    """Everything that is over a limit, a line for each."""
    found = []
    for rank in ranks:
        for one in rank.comparisons:
            if not one.is_within:
                figures = f"cosine {one.worst_cosine:.8f}, relative error {one.largest_relative_error:.1e}"
                found.append(
                    f"rank {rank.rank}: {one.kind} of layer {one.layer} is over the limit ({one.limits}): {figures}, worst {one.worst_protein}"
                )
        if rank.other_tokens:
            found.append(f"rank {rank.rank}: tokens are not fair-esm's for {few(rank.other_tokens)}")
        if rank.other_bits:
            largest = max(rank.other_bits.values())
            found.append(
                f"rank {rank.rank}: other bits in a pack than alone, by up to {largest:.1e}, for {few(list(rank.other_bits))}"
            )
    for kind in dict.fromkeys(rank.kind_of_device for rank in ranks):
        first, *others = (rank for rank in ranks if rank.kind_of_device == kind)
        for rank in others:
            differing = [
                name for name, one, other in zip(names, first.bits, rank.bits, strict=True) if one != other
            ]
            if differing:
                found.append(
                    f"rank {rank.rank}: other bits than rank {first.rank} on the same kind of device ({kind}) for {few(differing)}"
                )
    return found


def few(names: Sequence[str]) -> str:
    """Some names, and how many there are."""
    return f"{len(names)} proteins: " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def table(ranks: Sequence[RankCheck]) -> str:
    """A line for each representation of each rank, and one for its bits."""
    rows = [
        (
            "rank",
            "device",
            "representation",
            "worst cosine",
            "median",
            "error",
            "difference",
            "limit",
            "",
            "worst protein",
        )
    ]
    for rank in ranks:
        for one in rank.comparisons:
            cosines = f"{one.worst_cosine:.8f}", f"{one.median_cosine:.8f}"
            figures = *cosines, f"{one.largest_relative_error:.1e}", f"{one.largest_difference:.1e}"
            verdict = str(one.limits), "ok" if one.is_within else "OVER"
            rows.append(
                (
                    str(rank.rank),
                    rank.device,
                    f"{one.kind}, layer {one.layer}",
                    *figures,
                    *verdict,
                    one.worst_protein,
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for rank in ranks:
        bits = (
            f"other bits for {len(rank.other_bits)} proteins"
            if rank.other_bits
            else "the bits of each protein alone"
        )
        where = f"{rank.dtype}, {rank.kernels}, packs of {rank.toks_per_batch} tokens; fair-esm on {rank.fair_esm_device}"
        lines.append(
            f"rank {rank.rank} ({where}): {rank.num_answers} answers of {rank.num_packs} full packs in two orders: {bits}"
        )
    kinds = {rank.kind_of_device for rank in ranks}
    if len(ranks) > 1:
        agree = all(len({rank.bits for rank in ranks if rank.kind_of_device == kind}) == 1 for kind in kinds)
        among = "" if len(kinds) == 1 else f" within each of {len(kinds)} kinds of device"
        lines.append(f"all {len(ranks)} ranks: {'the same bits' if agree else 'OTHER BITS'}{among}")
    return "\n".join(lines)
