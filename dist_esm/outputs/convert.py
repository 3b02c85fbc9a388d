"""Embeddings as pandas, polars and anndata have them. The only door to these three, none of which is needed
for anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARIES = ("pandas", "polars")
"""What a data frame may be made with."""


def need_frames(library: str) -> Any:
    """Return the module of a library of data frames.

    Raises
    ------
    ValueError
        If there is no such library, or it is not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"{library!r} is no library of data frames: use 'pandas' or 'polars'")
    return _import(library, "a data frame")


def need_anndata() -> Any:
    """Return anndata.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    return _import("anndata", "an AnnData")


def _import(package: str, what: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} needs {error.name}: pip install 'dist_esm[notebook]'") from None


def frame_of(
    library: str,
    about: Mapping[str, Sequence[Any]],
    values: Mapping[str, NDArray[np.float32] | Sequence[NDArray[np.float32]]],
    width: int,
) -> Any:
    """Make a data frame of N proteins.

    Parameters
    ----------
    library
        `pandas` or `polars`.
    about
        Columns of N texts or numbers each.
    values
        Columns of vectors, shape (N, D), or of residues, N arrays of shape (L, D).
    width
        D.

    Returns
    -------
    pandas.DataFrame or polars.DataFrame

    Raises
    ------
    ValueError
        As `need_frames`.
    """
    frames = need_frames(library)
    if library == "pandas":
        objects = {name: frames.Series(list(arrays), dtype=object) for name, arrays in values.items()}
        return frames.DataFrame({**{name: list(column) for name, column in about.items()}, **objects})
    vector = frames.Array(frames.Float32, width)
    kinds = {str: frames.String, int: frames.Int64}
    # The types of columns without rows cannot be seen in them.
    columns = [
        frames.Series(name, list(column), dtype=kinds[int if name == "length" else str])
        for name, column in about.items()
    ]
    for name, arrays in values.items():
        if isinstance(arrays, np.ndarray):
            columns.append(frames.Series(name, arrays if len(arrays) else [], dtype=vector))
        else:
            rows = [frames.Series(array, dtype=vector) for array in arrays]
            columns.append(frames.Series(name, rows, dtype=frames.List(vector)))
    return frames.DataFrame(columns)


def anndata_of(
    vectors: NDArray[np.float32],
    about: Mapping[str, Sequence[Any]],
    others: Mapping[str, NDArray[np.float32]],
    provenance: Mapping[str, Any],
) -> Any:
    """Make an AnnData of N proteins.

    Parameters
    ----------
    vectors
        `X`, shape (N, D).
    about
        Columns of `obs`, `id` among them, whose values name the observations.
    others
        `obsm`, each of shape (N, D).
    provenance
        Goes into `uns`, as JSON.

    Raises
    ------
    ValueError
        If anndata is not installed.
    """
    anndata, pandas = need_anndata(), need_frames("pandas")
    obs = pandas.DataFrame({name: list(column) for name, column in about.items()})
    obs.index = pandas.Index(unique(about["id"]), dtype=object)
    return anndata.AnnData(vectors, obs=obs, obsm=dict(others), uns={"provenance": json.dumps(provenance)})


def unique(names: Sequence[str]) -> list[str]:
    """Return names as `obs_names_make_unique` makes them: ``-1`` behind the second of one, and so on.

    Examples
    --------
    >>> unique(["a", "b", "a", "a-1", "a"])
    ['a', 'b', 'a-2', 'a-1', 'a-3']
    """
    taken, counts = set(names), dict.fromkeys(names, 0)
    seen: set[str] = set()
    result = []
    for name in names:
        marked = name
        if name in seen:
            while marked in taken:
                counts[name] += 1
                marked = f"{name}-{counts[name]}"
            taken.add(marked)
        seen.add(name)
        result.append(marked)
    return result
