"""A sample of the embeddings, read back from outputs, and its principal components."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_esm.attempt import as_value
from dist_esm.outputs.formats.base import Opened
from dist_esm.outputs.opened import open_output

MAX_OUTPUTS, MAX_POINTS = 64, 1000
MAX_SECONDS = 5.0
"""Reading ends then, with what is there: a file system may be slow, and people wait."""
FEW = 5000
"""Proteins of an output up to which all vectors are read at once."""


@dataclass
class Sample:
    """Proteins of some outputs, spread over all of them."""

    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    point_lengths: list[int] = field(default_factory=list)
    """Residues that each of these embeddings was made of."""
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """The same of all proteins of the outputs that were read."""
    num_outputs: int = 0
    """Outputs that were read."""


def read_sample(outputs: Sequence[Path]) -> Sample:
    """Read a sample of proteins, from at most `MAX_OUTPUTS` outputs spread evenly over the given ones.

    Outputs that cannot be read are passed over: that is for `job=verify` to say.
    """
    sample, deadline = Sample(), time.monotonic() + MAX_SECONDS
    chosen = [outputs[place] for place in spread(len(outputs), MAX_OUTPUTS)]
    for output in chosen:
        if time.monotonic() > deadline:
            break
        as_value(add_output, sample, output, -(-MAX_POINTS // len(chosen)))
    return sample


def add_output(sample: Sample, path: Path, most: int) -> None:
    """Add up to so many proteins of an output to a sample."""
    opened = open_output(path)
    ids, lengths = opened.ids(), opened.lengths()
    places = spread(len(ids), most)
    vectors = vectors_at(opened, places, len(ids))
    sample.num_outputs += 1
    sample.lengths += map(int, lengths)
    sample.ids += [ids[place] for place in places]
    sample.point_lengths += [int(lengths[place]) for place in places]
    sample.sources += [opened.about.source] * len(places)
    sample.vectors += [vectors[place] for place in range(len(places))]


def vectors_at(opened: Opened, places: Sequence[int], num_proteins: int) -> NDArray[np.float32]:
    """Return the means of an output's proteins at some places."""
    layer = opened.about.main_layer
    if num_proteins <= FEW:
        everything = np.asarray(opened.vectors("mean", layer), np.float32)
        return everything[list(places)]
    return np.stack([np.asarray(opened.vector("mean", layer, place), np.float32) for place in places])


def spread(number: int, most: int) -> list[int]:
    """Return at most so many of the numbers below `number`, spread evenly.

    Examples
    --------
    >>> spread(10, 3)
    [0, 4, 9]
    """
    if number <= most:
        return list(range(number))
    return [int(place) for place in np.linspace(0, number - 1, most).round()]


def principal_components(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project vectors onto the two directions in which they differ most.

    Parameters
    ----------
    vectors
        Shape (N, D), N of at least 3.

    Returns
    -------
    places, shape (N, 2), and the share of the variance of each direction, shape (2,). The sign of a direction
    is that of its largest number.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    # As the SVD of the rows, of which the products are far fewer numbers: ten times as fast for D = 5120.
    squares, left = np.linalg.eigh(centred @ centred.T)
    squares, left = np.maximum(squares[:-3:-1], 0.0), left[:, :-3:-1]
    directions = centred.T @ left
    largest = np.abs(directions).argmax(0)
    signs = np.where(directions[largest, [0, 1]] < 0, -1.0, 1.0)
    total = float((centred**2).sum()) or 1.0
    return left * np.sqrt(squares) * signs, squares / total
