"""Vectors of many outputs as one array, which stay on disk until they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from dist_esm.outputs.opened import OutputSequence

BLOCK_ROWS = 1024
"""Rows that are read at a time where they go one by one."""
FEWEST_OF_SPAN = 0.25
"""Rows that are so dense in a stretch of an output are read with all between them."""


class Vectors(NDArrayOperatorsMixin):
    """One vector for each of N proteins: float32, shape (N, D), read when it is used.

    It has `shape`, `dtype`, `ndim`, `size` and `len`, is indexed as numpy's arrays are, and goes through all
    rows a block at a time. An index gives a numpy array of the rows that it names, and only these are read;
    consecutive rows of one output that is saved as float32 in `npy`, `safetensors` or `pt` are not even
    copied, and cannot be written to. numpy's functions, arithmetic and an array's other methods (`mean`,
    `astype`, ...) take it as the whole array, which they read each time: ``EmbeddingSet.to_numpy()`` is for
    keeping it in memory.

    Parameters
    ----------
    outputs
        In order.
    kind
        `mean` or `bos`.
    layer
        One that is there.

    Raises
    ------
    ValueError
        By whatever reads rows, if an output is gone or damaged.

    Examples
    --------
    >>> vectors = load("embeddings").vectors  # doctest: +SKIP
    >>> vectors.shape, vectors[17].shape, vectors[-100:].shape  # doctest: +SKIP
    ((10000000, 1280), (1280,), (100, 1280))
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, outputs: OutputSequence, kind: str, layer: int) -> None:
        self._outputs = outputs
        self._kind = kind
        self._layer = layer
        self.shape = (int(outputs.starts[-1]), outputs.about.width)

    @property
    def size(self) -> int:
        """Numbers in all."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Vectors of {self._kind} of layer {self._layer}: float32, shape {self.shape}>"

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self), BLOCK_ROWS):
            yield from self._span(start, min(start + BLOCK_ROWS, len(self)))

    def __getitem__(self, key: Any) -> Any:
        rows, *columns = key if isinstance(key, tuple) and key else (key,)
        if (
            len(columns) > 1
            or any(isinstance(part, (bool, type(None), type(...), tuple)) for part in (rows, *columns))
            or (isinstance(rows, np.ndarray) and rows.dtype == bool and rows.ndim != 1)
        ):
            return np.asarray(self)[key]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            picked = self._span(start, stop) if step == 1 else self._take(np.arange(start, stop, step))
            return picked[:, columns[0]] if columns else picked
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {index.shape} for {len(self)} proteins")
            index = np.flatnonzero(index)
        elif index.size and not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"{rows!r} is no position, slice, mask or list of positions")
        picked = self._take(index.ravel().astype(np.int64))
        places = np.arange(index.size).reshape(index.shape)
        return picked[(places, *columns)] if index.ndim else picked[(0, *columns)]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        rows = self._span(0, len(self))
        is_view = rows.base is not None or not rows.flags.owndata
        needs_copy = not is_view or (dtype is not None and np.dtype(dtype) != rows.dtype)
        if copy is False and needs_copy:
            raise ValueError("these vectors cannot be an array without a copy: leave out copy=False")
        return rows.astype(rows.dtype if dtype is None else dtype, copy=bool(copy) and is_view)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(value) if isinstance(value, Vectors) else value for value in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        """The other methods and attributes of an array, of all rows."""
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(np.asarray(self), name)

    def _span(self, start: int, stop: int) -> NDArray[np.float32]:
        """Read consecutive rows."""
        if stop <= start:
            return np.empty((0, self.shape[1]), self.dtype)
        (first, begin), (last, end) = self._outputs.find(start), self._outputs.find(stop - 1)
        if first == last:
            return self._rows(first, begin, end + 1)
        rows = np.empty((stop - start, self.shape[1]), self.dtype)
        for output in range(first, last + 1):
            offset = int(self._outputs.starts[output])
            begin = max(start, offset)
            end = min(stop, int(self._outputs.starts[output + 1]))
            if begin < end:
                rows[begin - start : end - start] = self._rows(output, begin - offset, end - offset)
        return rows

    def _take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read rows in any order, each output once."""
        wrong = positions[(positions < -len(self)) | (positions >= len(self))]
        if wrong.size:
            raise IndexError(f"position {wrong[0]} of {len(self)} proteins")
        positions = np.where(positions < 0, positions + len(self), positions)
        rows = np.empty((len(positions), self.shape[1]), self.dtype)
        order = np.argsort(positions, kind="stable")
        outputs = np.searchsorted(self._outputs.starts, positions[order], side="right") - 1
        borders = np.flatnonzero(np.diff(outputs)) + 1
        for in_output in np.split(order, borders) if len(order) else []:
            output, _ = self._outputs.find(int(positions[in_output[0]]))
            for first in range(0, len(in_output), BLOCK_ROWS):
                places = in_output[first : first + BLOCK_ROWS]
                rows[places] = self._some_rows(output, positions[places] - self._outputs.starts[output])
        return rows

    def _some_rows(self, output: int, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Read rows of one output at positions in it that do not descend."""
        start, stop = int(positions[0]), int(positions[-1]) + 1
        if len(positions) >= FEWEST_OF_SPAN * (stop - start):
            return self._rows(output, start, stop)[positions - start]
        opened = self._outputs.opened(output)
        return np.stack([opened.vector(self._kind, self._layer, int(position)) for position in positions])

    def _rows(self, output: int, start: int, stop: int) -> NDArray[np.float32]:
        """Read consecutive rows of one output; a view of them where the format has them so."""
        rows = self._outputs.opened(output).vectors(self._kind, self._layer, start, stop)
        expected = (stop - start, self.shape[1])
        if rows.shape != expected:
            raise ValueError(
                f"{self._outputs.paths[output]} is damaged: {self._kind} of layer {self._layer} has shape "
                f"{rows.shape}, {expected} is expected: embed its input again"
            )
        return np.asarray(rows, self.dtype)
