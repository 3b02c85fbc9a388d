"""OutputTable read back, the same for every format: one output, or all of a run in input order."""

from __future__ import annotations

import json
import operator
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from dist_esm.attempt import as_value
from dist_esm.outputs.formats.base import About, Opened
from dist_esm.outputs.formats.registry import FORMATS, format_at

MAX_OPEN = 8
"""Outputs that are kept open at a time."""


def load(path: str | os.PathLike[str]) -> EmbeddingSet:
    """OutputTable of one output, or of a whole run.

    Parameters
    ----------
    path
        An `output_dir` with its ``report.json``: all files that are embedded, in input order. Or one output of any format: a file, or
        a folder of ``format=fair_esm``.

    Returns
    -------
    EmbeddingSet
        Nothing but the report is read until it is asked for.

    Raises
    ------
    ValueError
        If that is no output, in one line that names the path and the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: name an output_dir or one output in it")
    report = path / "report.json"
    if report.is_file():
        files = as_value(lambda: json.loads(report.read_text(encoding="utf-8"))["files"])
        if isinstance(files, Exception):
            raise ValueError(
                f"{report} is no report of dist_esm ({type(files).__name__}): run again, or name one output"
            )
        return EmbeddingSet([path / output for entry in files for output in entry["outputs"]])
    if format_at(path) is None:
        if path.is_dir():
            marks = [
                output_format.codec.marks[0] for output_format in FORMATS.values() if output_format.is_folder
            ]
            raise ValueError(
                f"{path} has neither a report.json nor an {' or '.join(marks)}: "
                "name the output_dir of a run that has ended, or one output"
            )
        suffixes = ", ".join(filter(None, (output_format.suffix for output_format in FORMATS.values())))
        raise ValueError(
            f"{path} is no output of dist_esm: name an output_dir, or a file that ends in {suffixes}"
        )
    return EmbeddingSet([path])


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
    opened = as_value(output_format.codec.open, path)
    if isinstance(opened, ModuleNotFoundError):
        raise ValueError(f"reading {path} needs {opened.name}: pip install 'dist_esm[formats]'")
    if isinstance(opened, Exception):
        reason = " ".join(str(opened).split())
        raise ValueError(
            f"{path} is damaged or no output of dist_esm ({type(opened).__name__}: {reason}): embed its input again"
        )
    return opened


class EmbeddingSet:
    """N proteins in input order, from one output or many. It reads what is asked for when it is asked for, and is for one thread.

    ``set[3]`` and ``set["P12345"]`` are a protein's vector, shape (D,); of an id that is there more than once, the first's, and `positions` names
    all of them. ProteinEmbedding are the mean over residues of the last requested layer; `vectors_of` has the others.

    Parameters
    ----------
    outputs
        Paths of the outputs, in order.
    """

    def __init__(self, outputs: Sequence[Path]) -> None:
        self._outputs = list(outputs)
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, protein: object) -> bool:
        return protein in self._positions

    def __getitem__(self, protein: str | SupportsIndex) -> NDArray[np.float32]:
        output, position = self._find(protein)
        return self._opened(output).vector("mean", self.about.main_layer, position).astype(np.float32)

    def __repr__(self) -> str:
        return f"<EmbeddingSet of {len(self._outputs)} outputs{f' from {self._outputs[0]}' if self._outputs else ''}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"_outputs": self._outputs, "_open": OrderedDict()}

    @cached_property
    def ids(self) -> list[str]:
        """Ids, duplicates included."""
        return [protein for _, ids, _ in self._index for protein in ids]

    @cached_property
    def lengths(self) -> list[int]:
        """Residues that each embedding is of."""
        return [length for _, _, lengths in self._index for length in lengths]

    @property
    def headers(self) -> list[str]:
        """Whole headers. Read from disk each time."""
        return [
            header for output in range(len(self._outputs)) for header in self._opened(output).records()[1]
        ]

    @property
    def sources(self) -> list[str]:
        """Path of the input file of each protein, relative to the common root of the run's inputs."""
        return [about.source for about, ids, _ in self._index for _ in ids]

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """All vectors, shape (N, D): the mean of the last requested layer. Read once and kept."""
        return self.vectors_of("mean", self.about.main_layer)

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, weights' hash and settings that the numbers depend on."""
        return self.about.provenance

    @property
    def about(self) -> About:
        """What the outputs say of themselves; `kinds` are the representations that are there.

        Raises
        ------
        ValueError
            If there are no outputs.
        """
        if not self._index:
            raise ValueError(
                "the run has no outputs, so there is nothing to say of them: see failed_files.txt"
            )
        return self._index[0][0]

    def vectors_of(self, kind: str, layer: int) -> NDArray[np.float32]:
        """All vectors of a kind, `mean` or `bos`, and a layer, shape (N, D)."""
        if kind == "per_tok":
            raise ValueError("per_tok is not one vector for each protein: use residues(id)")
        self._check(kind, layer)
        rows = np.empty((len(self), self.about.width), np.float32)
        for output in range(len(self._outputs)):
            rows[self._starts[output] : self._starts[output + 1]] = self._opened(output).vectors(kind, layer)
        return rows

    def residues(self, protein: str | SupportsIndex, layer: int | None = None) -> NDArray[np.float32]:
        """A protein's per-residue representations, shape (L, D); of the last requested layer if none is named.

        Raises
        ------
        ValueError
            If they were not asked for when it was embedded.
        """
        layer = self.about.main_layer if layer is None else layer
        self._check("per_tok", layer)
        output, position = self._find(protein)
        return self._opened(output).residues(layer, position).astype(np.float32)

    def positions(self, protein: str) -> list[int]:
        """All positions of an id."""
        if protein not in self._positions:
            raise KeyError(protein)
        return list(self._positions[protein])

    def _check(self, kind: str, layer: int) -> None:
        kinds = self.about.kinds
        if layer not in kinds.get(kind, []):
            there = ", ".join(
                f"{one} of layer {number}" for one, layers in kinds.items() for number in layers
            )
            raise ValueError(
                f"{kind} of layer {layer} is not there, but {there}: embed with include=[{kind}] and repr_layers=[{layer}]"
            )

    def _find(self, protein: str | SupportsIndex) -> tuple[int, int]:
        """An output and the position in it."""
        if isinstance(protein, str):
            position = self.positions(protein)[0]
        else:
            position = operator.index(protein)
            if not -len(self) <= position < len(self):
                raise IndexError(f"position {position} of {len(self)} proteins")
            position %= len(self)
        output = int(np.searchsorted(self._starts, position, side="right")) - 1
        return output, position - int(self._starts[output])

    def _opened(self, output: int) -> Opened:
        if output not in self._open:
            self._open[output] = open_output(self._outputs[output])
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(output)
        return self._open[output]

    @cached_property
    def _index(self) -> list[tuple[About, list[str], list[int]]]:
        """What each output says of itself, its ids and lengths; each is opened once."""
        index: list[tuple[About, list[str], list[int]]] = []
        for output, path in enumerate(self._outputs):
            opened = self._opened(output)
            about, first = opened.about, index[0][0] if index else opened.about
            if settings_of(about) != settings_of(first):
                raise ValueError(
                    f"{path} and {self._outputs[0]} were made under different settings: load them one by one"
                )
            ids, _, lengths = opened.records()
            index.append((about, list(ids), list(lengths)))
        return index

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Position of the first protein of each output, and N."""
        return np.cumsum([0, *(len(ids) for _, ids, _ in self._index)])

    @cached_property
    def _positions(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for position, protein in enumerate(self.ids):
            positions.setdefault(protein, []).append(position)
        return positions


def settings_of(about: About) -> tuple[dict[str, Any], dict[str, list[int]], int]:
    """Return what outputs that are read together must share: all but the code, which tells its numerics apart."""
    settings = {key: value for key, value in about.provenance.items() if key != "dist_esm"}
    return settings, about.kinds, about.width
