"""How far numbers are from fair-esm's, as `job=selfcheck` puts it: limits, findings, and a table of results.

The limits are for means over residues. `bos` and `per_tok` are single tokens, no average evens their rounding
out, and residues crowd: see `Limits.of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dist_esm.config import Fp8, Include, SaveDtype, SelfcheckConfig
from dist_esm.jobs.selfcheck.yardstick import FEWEST_WITH_NEIGHBOURS, measure
from dist_esm.names import few
from dist_esm.types import SegmentEmbedding

MAX_RELATIVE_ERROR = {torch.float32: 1e-5}
LOST_WHEN_SAVED = {SaveDtype.float32: 0.0, SaveDtype.float16: 2.0**-11}
"""By so much of its length a vector may change when it is saved."""
MAX_SPREAD_ERROR, MAX_SPREAD_ERROR_FP8 = 0.03, 0.1
MIN_NEIGHBOURS_KEPT, MIN_NEIGHBOURS_KEPT_FP8 = 0.99, 0.98
BOS_FACTOR = 3
"""By so much more of the spread a single BOS may be off than a mean."""
TOKEN_FACTOR = 10
"""By so much more of the spread a single residue may be off than those of a protein together, and by so much
more of its length any single token than a mean."""
TOKEN_NEIGHBOURS_FACTOR = 5
"""So many times the neighbours that means may lose, single tokens may lose."""


@dataclass(frozen=True)
class Limits:
    """How far from fair-esm's a representation may be."""

    max_relative_error: float | None
    """Of the worst protein, as a share of its vector's length; None: no limit."""
    max_spread_error: float
    """Of the worst protein, as a share of the spread of the sample; of residues the root mean square over the
    protein. Where the sample has no spread, as a share of the vector's length."""
    max_vector_error: float
    """The same of the worst single vector."""
    min_neighbours_kept: float
    """Over the sample."""

    @classmethod
    def of(
        cls,
        config: SelfcheckConfig,
        dtype: torch.dtype,
        include: Include,
        save_dtype: SaveDtype = SaveDtype.float32,
    ) -> Limits:
        """Return the limits of a representation, from the configuration or by default for the dtypes.

        By default a relative error may be larger by what numbers lose that are saved in half precision.
        """
        error, lost = config.max_relative_error, 0.0
        if error is None and dtype in MAX_RELATIVE_ERROR:
            error, lost = MAX_RELATIVE_ERROR[dtype], LOST_WHEN_SAVED[save_dtype]
        is_fp8 = dtype is torch.float8_e4m3fn
        most, kept = config.max_spread_error, config.min_neighbours_kept
        if most is None:
            most = MAX_SPREAD_ERROR_FP8 if is_fp8 else MAX_SPREAD_ERROR
        if kept is None:
            kept = MIN_NEIGHBOURS_KEPT_FP8 if is_fp8 else MIN_NEIGHBOURS_KEPT
        if include is Include.mean:
            return cls(None if error is None else error + lost, most, most, kept)
        error = None if error is None else TOKEN_FACTOR * error + lost
        kept = max(0.0, round(1 - TOKEN_NEIGHBOURS_FACTOR * (1 - kept), 12))
        if include is Include.bos:
            return cls(error, BOS_FACTOR * most, BOS_FACTOR * most, kept)
        return cls(error, most, TOKEN_FACTOR * most, kept)

    def __str__(self) -> str:
        relative = "" if self.max_relative_error is None else f", relative <= {self.max_relative_error:g}"
        single = (
            "" if self.max_vector_error == self.max_spread_error else f" (residue {self.max_vector_error:g})"
        )
        return f"error <= {self.max_spread_error:g}{single}, kept >= {self.min_neighbours_kept:g}{relative}"


@dataclass(frozen=True)
class Comparison:
    """One representation of one layer over the sample's proteins; for `per_tok` over all their residues."""

    kind: str
    layer: int
    spread: float
    """Root mean square of the distance of fair-esm's vectors from their mean; 0: errors are relative to the
    length of a vector."""
    worst_error: float
    """Largest of a protein's |ours - theirs| / spread; of residues the root mean square over the protein."""
    worst_vector: float
    """Largest |ours - theirs| / spread of a single vector."""
    median_error: float
    shift: float
    """|mean of (ours - theirs)| / spread: the part of the error that all vectors share."""
    worst_cosine: float | None
    """Least cosine after fair-esm's mean over the sample was subtracted from both; None: nothing is left."""
    median_cosine: float | None
    neighbours_kept: float | None
    """Share of each vector's 10 nearest that stay its 10 nearest; None: the sample is too small."""
    nearest_kept: float | None
    """Share of vectors whose nearest stays the same."""
    largest_relative_error: float
    """Largest |ours - theirs| / |theirs|."""
    largest_difference: float
    """Largest |ours - theirs| of a single number."""
    worst_protein: str
    """The protein with the largest error."""
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
    recomputed: tuple[str, ...] = ()
    """Proteins that were not finite and were computed again in a wider dtype."""


def compare(
    include: Include,
    layer: int,
    names: Sequence[str],
    ours: Sequence[NDArray[np.float32]],
    theirs: Sequence[NDArray[np.float32]],
    limits: Limits,
) -> Comparison:
    """Measure the distance between two models' embeddings of the same proteins, and hold it to the limits.

    Parameters
    ----------
    include, layer
        The representation, for the result.
    names
        A name for each protein.
    ours, theirs : sequence of arrays, shape (D,) or (L, D)
        An array of each model for each protein; vectors are compared row by row, in float64.
    limits
        The distance that is too far. A vector that is not finite is too far from any.

    Raises
    ------
    ValueError
        If the two have different shapes.
    """
    for name, our_array, their_array in zip(names, ours, theirs, strict=True):
        if our_array.shape != their_array.shape:
            shapes = f"has shape {our_array.shape}, fair-esm's has {their_array.shape}"
            raise ValueError(f"{include.name} of layer {layer} of {name} {shapes}")
    distance = measure(ours, theirs)
    errors = distance.errors if distance.spread else distance.relative_errors
    worst, relative = max(errors), max(distance.relative_errors)
    worst_vector = distance.worst_vector if distance.spread else relative
    kept = distance.neighbours_kept if distance.spread else None  # of vectors all alike, any may be nearest
    is_within = (
        worst <= limits.max_spread_error
        and worst_vector <= limits.max_vector_error
        and (kept is None or kept >= limits.min_neighbours_kept)
        and (limits.max_relative_error is None or relative <= limits.max_relative_error)
    )
    return Comparison(
        kind=include.name,
        layer=layer,
        spread=distance.spread,
        worst_error=worst,
        worst_vector=worst_vector,
        median_error=distance.median_error if distance.spread else float(np.median(errors)),
        shift=distance.shift if distance.spread else worst,
        worst_cosine=distance.worst_cosine if distance.spread else None,
        median_cosine=distance.median_cosine if distance.spread else None,
        neighbours_kept=kept,
        nearest_kept=None if kept is None else distance.nearest_kept,
        largest_relative_error=relative,
        largest_difference=distance.largest_difference,
        worst_protein=names[errors.index(worst)],
        limits=limits,
        is_within=is_within,
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
        lines += [
            f"rank {rank.rank}: {comparison.kind} of layer {comparison.layer} is over the limit "
            f"({comparison.limits}): error {in_words(comparison)}, "
            f"kept {share_kept(comparison.neighbours_kept)}, "
            f"relative {comparison.largest_relative_error:.1e}, worst {comparison.worst_protein}"
            for comparison in rank.comparisons
            if not comparison.is_within
        ]
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


def more_exact(dtype: torch.dtype, fp8: Fp8) -> str:
    """Say which keys bring numbers closer to fair-esm's; "" if there are none."""
    if dtype is torch.float8_e4m3fn:
        return "dtype=bf16" if fp8 is Fp8.ffn else "fp8=ffn, or dtype=bf16"
    return "dtype=fp32" if dtype in (torch.bfloat16, torch.float16) else ""


def count_and_name(proteins: Sequence[str]) -> str:
    """Say how many proteins there are, and name the first three."""
    return f"{len(proteins)} proteins: {few(proteins)}"


def list_not_judged(ranks: Sequence[RankCheck]) -> list[str]:
    """Say for each representation what the sample was too small or too uniform for."""
    lines = {}
    for comparison in (comparison for rank in ranks for comparison in rank.comparisons):
        name = f"{comparison.kind} of layer {comparison.layer}"
        if not comparison.spread:
            lines[name] = (
                f"{name}: fair-esm's vectors are all alike or there is one: errors are shares of its length, "
                "and no neighbours were compared"
            )
        elif comparison.neighbours_kept is None:
            lines[name] = (
                f"{name}: no neighbours were compared, which takes {FEWEST_WITH_NEIGHBOURS} vectors or more"
            )
    return list(lines.values())


def in_words(comparison: Comparison) -> str:
    """Write the worst error, and what it is measured against."""
    single = "" if comparison.worst_vector == comparison.worst_error else f" ({comparison.worst_vector:.3g})"
    return f"{comparison.worst_error:.3g}{single} of the {'spread' if comparison.spread else 'length'}"


def share_kept(share: float | None) -> str:
    """Write a share of neighbours, or that there are none to speak of."""
    return "too few" if share is None else f"{share:.4f}"


HEADINGS = (
    "rank",
    "device",
    "representation",
    "worst error",
    "median",
    "shift",
    "worst cosine",
    "neighbours kept",
    "nearest",
    "relative",
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
                in_words(comparison),
                f"{comparison.median_error:.3g}",
                f"{comparison.shift:.3g}",
                "none" if comparison.worst_cosine is None else f"{comparison.worst_cosine:.6f}",
                share_kept(comparison.neighbours_kept),
                share_kept(comparison.nearest_kept),
                f"{comparison.largest_relative_error:.1e}",
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
        if rank.recomputed:
            lines.append(
                f"rank {rank.rank}: not finite in {rank.dtype}, so computed again in a wider dtype, as a run "
                f"does: {count_and_name(rank.recomputed)}"
            )
    devices = {rank.kind_of_device for rank in ranks}
    if len(ranks) > 1:
        agree = all(
            len({rank.bits for rank in ranks if rank.kind_of_device == device}) == 1 for device in devices
        )
        among = "" if len(devices) == 1 else f" within each of {len(devices)} kinds of device"
        lines.append(f"all {len(ranks)} ranks: {'the same bits' if agree else 'OTHER BITS'}{among}")
    return "\n".join([*lines, *list_not_judged(ranks)])
