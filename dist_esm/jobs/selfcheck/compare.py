"""How far numbers are from fair-esm's, as `job=selfcheck` puts it: pure functions, and a table of results.

A mean over residues is held to the limits themselves. `bos` and `per_tok` are single tokens, and no
average evens their rounding out: they may be ten times as far off.
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
    """How far from fair-esm's a representation may be."""

    min_cosine: float
    max_relative_error: float | None
    """None: only the cosine counts."""

    @classmethod
    def of(cls, config: SelfcheckConfig, dtype: torch.dtype, include: Include) -> Limits:
        """Return the limits of a representation, from the configuration or by default for the dtype."""
        cosine = MIN_COSINE if config.min_cosine is None else config.min_cosine
        error = (
            MAX_RELATIVE_ERROR.get(dtype) if config.max_relative_error is None else config.max_relative_error
        )
        if include is Include.mean:
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
    """One representation of one layer over the sample's proteins; for `per_tok` over all their residues."""

    kind: str
    layer: int
    worst_cosine: float
    median_cosine: float
    largest_relative_error: float
    """Largest ||ours - theirs|| / ||theirs||."""
    largest_difference: float
    """Largest |ours - theirs| of a single number."""
    worst_protein: str
    """The protein with the largest relative error."""
    limits: Limits
    is_within: bool


@dataclass(frozen=True)
class RankCheck:
    """The findings of one rank."""

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
    """Segments in packs that were compared with the same segment alone."""
    other_bits: Mapping[str, float]
    """Proteins with other bits in a pack than alone, and the largest difference."""
    other_tokens: tuple[str, ...]
    """Proteins whose tokens are not fair-esm's."""
    bits: tuple[str, ...]
    """Digest of each protein's embedding, alone, in the order of the sample."""
    seconds: float


def compare(
    include: Include,
    layer: int,
    names: Sequence[str],
    ours: Sequence[NDArray[np.float32]],
    theirs: Sequence[NDArray[np.float32]],
    limits: Limits,
) -> Comparison:
    """Measure the distance between two models' embeddings of the same proteins.

    Parameters
    ----------
    include, layer
        The representation, for the result.
    names
        A name for each protein.
    ours, theirs : sequence of arrays, shape (D,) or (L, D)
        An array of each model for each protein; vectors are compared row by row, in float64.
    limits
        The distance that is too far. A vector that is not finite is too far from any, and one that is zero
        from any that is not.

    Raises
    ------
    ValueError
        If the two have different shapes.
    """
    cosines, errors, differences = [], [], []
    for name, our_array, their_array in zip(names, ours, theirs, strict=True):
        if our_array.shape != their_array.shape:
            shapes = f"has shape {our_array.shape}, fair-esm's has {their_array.shape}"
            raise ValueError(f"{include.name} of layer {layer} of {name} {shapes}")
        x_LD, y_LD = (np.atleast_2d(values).astype(np.float64) for values in (our_array, their_array))
        with np.errstate(all="ignore"):
            x_L, y_L, apart_L = (np.linalg.norm(values, axis=1) for values in (x_LD, y_LD, x_LD - y_LD))
            cosine_L, error_L, difference_L = (
                (x_LD * y_LD).sum(1) / (x_L * y_L),
                apart_L / y_L,
                np.abs(x_LD - y_LD).max(1),
            )
        # fair-esm's layer 0 has nothing but zeros for a mask, which have no direction.
        is_zero_in_both_L = (x_L == 0) & (y_L == 0)
        cosine_L[is_zero_in_both_L], error_L[is_zero_in_both_L] = 1.0, 0.0
        cosines.append(np.where(np.isnan(cosine_L), -1.0, np.minimum(cosine_L, 1.0)))
        errors.append(float(np.where(np.isnan(error_L), np.inf, error_L).max()))
        differences.append(float(np.where(np.isnan(difference_L), np.inf, difference_L).max()))
    worst, error = float(np.concatenate(cosines).min()), max(errors)
    is_within = worst >= limits.min_cosine and (
        limits.max_relative_error is None or error <= limits.max_relative_error
    )
    median = float(np.median(np.concatenate(cosines)))
    return Comparison(
        include.name,
        layer,
        worst,
        median,
        error,
        max(differences),
        names[errors.index(error)],
        limits,
        is_within,
    )


def arrays_of(embedding: SegmentEmbedding) -> list[NDArray[np.float32]]:
    """Return every array of a segment's embedding, in a fixed order."""
    by_layer = (embedding.sums, embedding.bos, embedding.rows)
    return [values[layer] for values in by_layer for layer in sorted(values)]


def bit_difference(alone: SegmentEmbedding, packed: SegmentEmbedding) -> float | None:
    """Return the largest difference between two embeddings, or None if they have the same bits.

    The difference may be 0 (of -0) or infinite (of NaN or of shapes).
    """
    pairs = list(zip(arrays_of(alone), arrays_of(packed), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    largest = [np.abs(a.astype(np.float64) - b).max() for a, b in pairs if a.tobytes() != b.tobytes()]
    return float(np.nan_to_num(max(largest), nan=np.inf)) if largest else None


def list_problems(ranks: Sequence[RankCheck], names: Sequence[str]) -> list[str]:
    """Say everything that is over a limit, a line for each."""
    lines = []
    for rank in ranks:
        for comparison in rank.comparisons:
            if not comparison.is_within:
                cosine, error = comparison.worst_cosine, comparison.largest_relative_error
                lines.append(
                    f"rank {rank.rank}: {comparison.kind} of layer {comparison.layer} is over the limit "
                    f"({comparison.limits}): cosine {cosine:.8f}, relative error {error:.1e}, "
                    f"worst {comparison.worst_protein}"
                )
        if rank.other_tokens:
            lines.append(
                f"rank {rank.rank}: tokens are not fair-esm's for {count_and_name(rank.other_tokens)}"
            )
        if rank.other_bits:
            largest = max(rank.other_bits.values())
            proteins = count_and_name(list(rank.other_bits))
            lines.append(
                f"rank {rank.rank}: other bits in a pack than alone, by up to {largest:.1e}, for {proteins}"
            )
    for device in dict.fromkeys(rank.kind_of_device for rank in ranks):
        first, *others = (rank for rank in ranks if rank.kind_of_device == device)
        for rank in others:
            bits = zip(names, first.bits, rank.bits, strict=True)
            differing = [name for name, first_bits, rank_bits in bits if first_bits != rank_bits]
            if differing:
                lines.append(
                    f"rank {rank.rank}: other bits than rank {first.rank} on the same kind of device "
                    f"({device}) for {count_and_name(differing)}"
                )
    return lines


def count_and_name(proteins: Sequence[str]) -> str:
    """Say how many proteins there are, and name the first three."""
    return f"{len(proteins)} proteins: " + ", ".join(proteins[:3]) + (", ..." if len(proteins) > 3 else "")


HEADINGS = (
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


def make_table(ranks: Sequence[RankCheck]) -> str:
    """Return a line for each representation of each rank, and a line for the bits of each rank."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for rank in ranks:
        rows += [
            (
                str(rank.rank),
                rank.device,
                f"{comparison.kind}, layer {comparison.layer}",
                f"{comparison.worst_cosine:.8f}",
                f"{comparison.median_cosine:.8f}",
                f"{comparison.largest_relative_error:.1e}",
                f"{comparison.largest_difference:.1e}",
                str(comparison.limits),
                "ok" if comparison.is_within else "OVER",
                comparison.worst_protein,
            )
            for comparison in rank.comparisons
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for rank in ranks:
        bits = "the bits of each protein alone"
        if rank.other_bits:
            bits = f"other bits for {len(rank.other_bits)} proteins"
        lines.append(
            f"rank {rank.rank} ({rank.dtype}, {rank.kernels}, packs of {rank.toks_per_batch} tokens; "
            f"fair-esm on {rank.fair_esm_device}): "
            f"{rank.num_answers} answers of {rank.num_packs} full packs in two orders: {bits}"
        )
    devices = {rank.kind_of_device for rank in ranks}
    if len(ranks) > 1:
        agree = all(
            len({rank.bits for rank in ranks if rank.kind_of_device == device}) == 1 for device in devices
        )
        among = "" if len(devices) == 1 else f" within each of {len(devices)} kinds of device"
        lines.append(f"all {len(ranks)} ranks: {'the same bits' if agree else 'OTHER BITS'}{among}")
    return "\n".join(lines)
