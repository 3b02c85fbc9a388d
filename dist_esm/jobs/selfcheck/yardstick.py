"""The distance between two models' vectors of the same things, seen against what tells these things apart.

One channel may carry nine tenths of the length of every vector of ESM-2, so that unrelated proteins have
cosines of 0.98. An error small beside a vector's length may then be as large as the distance between two
proteins. So errors are measured against the spread of the sample, and by who is whose neighbour.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 10
FEWEST_WITH_NEIGHBOURS = 2 * NEIGHBOURS + 1
"""Of fewer vectors, the 10 nearest would be most of those that there are."""
MOST_WITH_NEIGHBOURS = 1000
"""Neighbours are sought among so many vectors at most, taken evenly: their number of pairs is squared."""


@dataclass(frozen=True)
class Distance:
    """How far our vectors are from theirs. A distance of vectors that are not finite is infinite."""

    spread: float
    """Root mean square of the distance of their vectors from the mean of their vectors."""
    errors: tuple[float, ...]
    """For each array: the root mean square over its vectors of |ours - theirs| / spread; infinite if the
    spread is 0 and the vectors differ."""
    worst_vector: float
    """Largest |ours - theirs| / spread of a single vector."""
    relative_errors: tuple[float, ...]
    """For each array: the largest |ours - theirs| / |theirs| of its vectors."""
    median_error: float
    """Median over all vectors of |ours - theirs| / spread."""
    shift: float
    """The part of the error that all vectors share: |mean of (ours - theirs)| / spread."""
    worst_cosine: float
    """Least cosine after their mean was subtracted from both; -1 where there is none."""
    median_cosine: float
    largest_difference: float
    """Largest |ours - theirs| of a single number."""
    neighbours_kept: float | None
    """Share of each vector's 10 nearest among theirs that are among its 10 nearest among ours; None of fewer
    than 21 vectors."""
    nearest_kept: float | None
    """Share of vectors whose nearest is the same."""


def measure(ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> Distance:
    """Measure the distance, in float64.

    Parameters
    ----------
    ours, theirs : sequence of arrays, shape (D,) or (L, D)
        An array of each model for each protein, of the same shape; at least one vector in all.
    """
    pairs = [
        (_rows(our_array), _rows(their_array)) for our_array, their_array in zip(ours, theirs, strict=True)
    ]
    num_vectors = sum(len(y_LD) for _, y_LD in pairs)
    centre_D = sum(y_LD.sum(0, dtype=np.float64) for _, y_LD in pairs) / num_vectors
    shift_D = np.zeros_like(centre_D)
    squares = largest_difference = 0.0
    distances, relative_errors, cosines = [], [], []
    with np.errstate(all="ignore"):
        for our_LD, their_LD in pairs:  # one at a time: the rows of all proteins in float64 may be many GB
            x_LD, y_LD = our_LD - centre_D, their_LD - centre_D
            difference_LD = x_LD - y_LD
            distance_L, x_L, y_L = (np.linalg.norm(values, axis=1) for values in (difference_LD, x_LD, y_LD))
            squares += float((y_L**2).sum())
            shift_D += difference_LD.sum(0) / num_vectors
            distances.append(_or_infinite(distance_L))
            relative_errors.append(float(_ratio(distance_L, np.linalg.norm(their_LD, axis=1)).max()))
            cosine_L = np.where(distance_L == 0, 1.0, (x_LD * y_LD).sum(1) / (x_L * y_L))
            cosines.append(np.where(np.isnan(cosine_L), -1.0, np.clip(cosine_L, -1.0, 1.0)))
            largest_difference = max(largest_difference, float(_or_infinite(np.abs(difference_LD)).max()))
        spread = float(np.sqrt(squares / num_vectors))
        # Identical vectors differ from their computed mean by its rounding: that is no spread.
        spread = 0.0 if spread <= 1e-12 * float(np.linalg.norm(centre_D)) else spread
        errors_L = [_ratio(distance_L, spread) for distance_L in distances]
        all_errors = np.concatenate(errors_L)
        shift = float(_ratio(np.linalg.norm(shift_D[None], axis=1), spread)[0])
    kept, nearest = count_kept(pairs, centre_D, num_vectors)
    all_cosines = np.concatenate(cosines)
    return Distance(
        spread=spread,
        errors=tuple(float(np.sqrt((error_L**2).mean())) for error_L in errors_L),
        worst_vector=float(all_errors.max()),
        relative_errors=tuple(relative_errors),
        median_error=float(np.median(all_errors)),
        shift=shift,
        worst_cosine=float(all_cosines.min()),
        median_cosine=float(np.median(all_cosines)),
        largest_difference=largest_difference,
        neighbours_kept=kept,
        nearest_kept=nearest,
    )


def count_kept(
    pairs: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    centre_D: NDArray[np.float64],
    num_vectors: int,
) -> tuple[float | None, float | None]:
    """Return the shares of neighbours and of nearest neighbours that stay; None of too few vectors."""
    if num_vectors < FEWEST_WITH_NEIGHBOURS:
        return None, None
    num_taken = min(num_vectors, MOST_WITH_NEIGHBOURS)
    taken = np.linspace(0, num_vectors - 1, num_taken).round().astype(np.int64)
    ends = list(itertools.accumulate(len(y_LD) for _, y_LD in pairs))
    starts = [0, *ends[:-1]]

    def nearest(which: int) -> NDArray[np.int64]:
        rows = [
            pair[which][taken[(taken >= start) & (taken < end)] - start]
            for pair, start, end in zip(pairs, starts, ends, strict=True)
        ]
        return find_nearest(np.concatenate(rows) - centre_D)

    ours_NK, theirs_NK = nearest(0), nearest(1)
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(theirs_NK, ours_NK, strict=True)])
    return float(kept), float((ours_NK[:, 0] == theirs_NK[:, 0]).mean())


def find_nearest(x_ND: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of each vector's 10 nearest others, shape (N, 10), the nearest first.

    One that is not finite is nobody's neighbour.
    """
    with np.errstate(all="ignore"):
        squares_N = (x_ND**2).sum(1)
        distances_NN = squares_N[:, None] + squares_N[None, :] - 2 * (x_ND @ x_ND.T)
    distances_NN = _or_infinite(distances_NN)
    np.fill_diagonal(distances_NN, np.inf)
    nearest_NK: NDArray[np.int64] = np.argsort(distances_NN, axis=1, kind="stable")[:, :NEIGHBOURS]
    return nearest_NK


def _rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.atleast_2d(values)


def _or_infinite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isnan(values), np.inf, values)


def _ratio(distance: NDArray[np.float64], of: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Divide; no distance is no error, whatever it is divided by."""
    return np.where(distance == 0, 0.0, _or_infinite(distance / of))
