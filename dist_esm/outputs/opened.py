"""Outputs in order, opened when they are needed: what they say of themselves, and where each protein is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_esm.attempt import as_value
from dist_esm.names import readable_name
from dist_esm.outputs.formats.base import About, Opened
from dist_esm.outputs.formats.registry import format_at

P = ParamSpec("P")
T = TypeVar("T")

MAX_OPEN = 8
"""Outputs that are kept open at a time."""
WORDS = ("dist_esm", "weights_in_words")
"""Provenance that tells nothing of the numbers that other keys do not tell."""


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error of an output that cannot be read."""
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path} is damaged or no output of dist_esm ({type(error).__name__}: {reason}): "
        "embed its input again"
    )


class NamedOutput:
    """An opened output, whose name is in every error.

    Opening reads little: damage behind that is met by what reads the rest.

    Parameters
    ----------
    opened
        The output.
    path
        Its path.

    Raises
    ------
    ValueError, MemoryError
        By whatever reads, if the output is damaged, or if there is no room for what was read.
    """

    def __init__(self, opened: Opened, path: Path) -> None:
        self._opened = opened
        self._path = path
        self.about = opened.about

    @property
    def num_proteins(self) -> int:
        """N."""
        return self._read(lambda: self._opened.num_proteins)

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        return self._read(self._opened.ids)

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        return self._read(self._opened.headers)

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        return self._read(self._opened.lengths)

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return a representation of consecutive proteins, shape (n, D)."""
        return self._read(self._opened.vectors, kind, layer, start, stop)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return a representation of one protein, shape (D,)."""
        return self._read(self._opened.vector, kind, layer, position)

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        return self._read(self._opened.residues, layer, position)

    def _read(self, read: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        value = as_value(read, *args, **options)
        if isinstance(value, MemoryError):
            raise value
        if isinstance(value, Exception):
            raise damaged(self._path, value)
        return value


def open_output(path: Path) -> Opened:
    """Open one output.

    Raises
    ------
    ValueError
        If it is not there, is damaged or is something else, or what reads it is not installed.
    """
    output_format = format_at(path)
    if output_format is None:
        raise ValueError(f"{path} is not there or not whole: run again with resume=true, which does it again")
    with readable_name(path) if path.is_file() else nullcontext(path) as name:
        opened = as_value(output_format.codec.open, name)
    if isinstance(opened, ModuleNotFoundError):
        raise ValueError(f"reading {path} needs {opened.name}: pip install 'dist_esm[formats]'")
    if isinstance(opened, Exception):
        raise damaged(path, opened)
    return NamedOutput(opened, path)


def settings_of(about: About) -> tuple[dict[str, Any], dict[str, list[int]], int]:
    """Return what outputs that are read together must share: all but the code, which tells its numerics
    apart."""
    # Before numerics had a version of their own they were the first.
    provenance = {"numerics": 1, **about.provenance}
    return {key: value for key, value in provenance.items() if key not in WORDS}, about.kinds, about.width


class OutputSequence:
    """Outputs in order, of N proteins in all. A few are kept open at a time.

    Parameters
    ----------
    paths
        Of the outputs.

    Raises
    ------
    ValueError
        By whatever opens outputs, if one is gone, is damaged, or was made under other settings than the
        first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def opened(self, output: int) -> Opened:
        """Open one output, by its place."""
        if output not in self._open:
            self._open[output] = open_output(self.paths[output])
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(output)
        return self._open[output]

    @property
    def about(self) -> About:
        """All that the first output says of itself.

        Raises
        ------
        ValueError
            If there are no outputs.
        """
        if not self.paths:
            raise ValueError(
                "the run has no outputs, so there is nothing to say of them: see failed_files.txt"
            )
        return self._index[0][0]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Position of the first protein of each output, and N."""
        return np.cumsum([0, *(num_proteins for _, num_proteins in self._index)])

    @property
    def sources(self) -> list[str]:
        """Path of the input file of each output, relative to the common root of the run's inputs."""
        return [about.source for about, _ in self._index]

    @property
    def num_proteins(self) -> list[int]:
        """Proteins of each output."""
        return [num_proteins for _, num_proteins in self._index]

    def ids(self, output: int) -> list[str]:
        """Read the ids of an output, in file order."""
        ids = self.opened(output).ids()
        if len(ids) != self.num_proteins[output]:
            raise ValueError(
                f"{self.paths[output]} is damaged: it has {len(ids)} ids and vectors of "
                f"{self.num_proteins[output]} proteins: embed its input again"
            )
        return ids

    def find(self, position: int) -> tuple[int, int]:
        """Find the output of a protein, by its position from 0 to N - 1, and its position in it."""
        output = int(np.searchsorted(self.starts, position, side="right")) - 1
        return output, position - int(self.starts[output])

    @cached_property
    def _index(self) -> list[tuple[About, int]]:
        """For each output what it says of itself and how many proteins it has; each is opened once."""
        index: list[tuple[About, int]] = []
        settings = None
        for output, path in enumerate(self.paths):
            opened = self.opened(output)
            settings = settings or settings_of(opened.about)
            if settings_of(opened.about) != settings:
                raise ValueError(
                    f"{path} and {self.paths[0]} were made under different settings: load them one by one"
                )
            index.append((opened.about, opened.num_proteins))
        return index
