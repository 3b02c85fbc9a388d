"""Embeddings read back, the same for every format: one output, or all that runs left in one directory."""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from dist_esm.attempt import as_value
from dist_esm.names import readable_name
from dist_esm.outputs import journal, launches
from dist_esm.outputs.finished import finished_files
from dist_esm.outputs.formats.base import About, Opened
from dist_esm.outputs.formats.registry import FORMATS, format_at

MAX_OPEN = 8
"""Outputs that are kept open at a time."""


def load(path: str | os.PathLike[str], run: Literal["all", "last"] = "all") -> EmbeddingSet:
    """Load the embeddings of one output, or of a whole output directory.

    Parameters
    ----------
    path
        An `output_dir`, whether its last run has ended or not: every input file that its journal has as
        finished. Or one output of any format: a file, or a folder of ``format=fair_esm`` or ``format=npy``.
    run
        Of an `output_dir`: `all` for the files of all runs into it, in the order of their paths relative to
        the common root of their inputs; `last` for the inputs of the last run alone, in input order,
        whichever run embedded them.

    Returns
    -------
    EmbeddingSet
        Of N proteins. A file that was embedded anew counts once, as it was embedded last. Nothing but the
        journal is read until it is asked for.

    Raises
    ------
    ValueError
        If that is no output, or a journal that cannot be understood, in one line that names the path and the
        remedy.

    Examples
    --------
    >>> from dist_esm import load
    >>> proteins = load("embeddings")  # doctest: +SKIP
    >>> len(proteins), proteins.ids[0]  # doctest: +SKIP
    (28, 'P12345')
    >>> proteins.vectors.shape  # doctest: +SKIP
    (28, 1280)
    >>> proteins["P12345"].shape  # doctest: +SKIP
    (1280,)
    """
    path = Path(path)
    if run not in ("all", "last"):
        raise ValueError(f"run={run!r} is neither 'all' nor 'last'")
    if not path.exists():
        raise ValueError(f"{path} is not there: name an output_dir or one output in it")
    if journal.folder(path).is_dir():
        return EmbeddingSet([path / output for output in _outputs_of(path, run)])
    if format_at(path) is not None:
        return EmbeddingSet([path])
    if path.is_dir():
        marks = [
            output_format.codec.marks[0] for output_format in FORMATS.values() if output_format.is_folder
        ]
        raise ValueError(
            f"{path} has neither a journal in .dist_esm nor an {' or '.join(marks)}: "
            "name the output_dir of a run, or one output"
        )
    suffixes = ", ".join(filter(None, (output_format.suffix for output_format in FORMATS.values())))
    raise ValueError(
        f"{path} is no output of dist_esm: name an output_dir, or a file that ends in {suffixes}"
    )


def _outputs_of(output_dir: Path, run: str) -> list[str]:
    """Return the outputs of a directory, relative to it, in order."""
    finished = finished_files(journal.read(output_dir))
    if run == "all":
        files = list(finished.values())
    else:
        recorded = launches.launch_files(output_dir)
        if not recorded:
            raise ValueError(
                f"{output_dir} does not say which inputs its last run had: run again, or use run='all'"
            )
        inputs = launches.read_inputs(recorded[-1])
        files = [finished[item.output] for item in inputs if item.output in finished]
    return [written.path for file in files for written in file.written]


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
        reason = " ".join(str(opened).split())
        raise ValueError(
            f"{path} is damaged or no output of dist_esm ({type(opened).__name__}: {reason}): "
            "embed its input again"
        )
    return opened


WORDS = ("dist_esm", "weights_in_words")
"""Provenance that tells nothing of the numbers that other keys do not tell."""


def settings_of(about: About) -> tuple[dict[str, Any], dict[str, list[int]], int]:
    """Return what outputs that are read together must share: all but the code, which tells its numerics
    apart."""
    # Before numerics had a version of their own they were the first.
    provenance = {"numerics": 1, **about.provenance}
    return {key: value for key, value in provenance.items() if key not in WORDS}, about.kinds, about.width


class EmbeddingSet:
    """Embeddings of N proteins in input order, from one output or many.

    Numbers are read when they are asked for. ``proteins[3]`` and ``proteins["P12345"]`` are a protein's
    vector, shape (D,): the mean over residues of the last requested layer; `vectors_of` has the other
    representations. Of an id that is there more than once it is the first's, and `positions` gives all of
    them. One set is for one thread.

    Parameters
    ----------
    outputs
        Paths of the outputs, in order; `load` finds them.

    Raises
    ------
    ValueError
        By whatever reads numbers, if an output is gone, is damaged, or was made under other settings than the
        first.

    Examples
    --------
    >>> proteins = load("embeddings")  # doctest: +SKIP
    >>> "P12345" in proteins  # doctest: +SKIP
    True
    >>> proteins.vectors_of("bos", 33).shape  # doctest: +SKIP
    (28, 1280)
    >>> proteins.residues("P12345").shape  # doctest: +SKIP
    (335, 1280)
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
        origin = f" from {self._outputs[0]}" if self._outputs else ""
        return f"<EmbeddingSet of {len(self._outputs)} outputs{origin}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"_outputs": self._outputs, "_open": OrderedDict()}

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the N proteins, duplicates included."""
        return [protein for _, ids, _ in self._index for protein in ids]

    @cached_property
    def lengths(self) -> list[int]:
        """Residues that each embedding was made of, N of them."""
        return [length for _, _, lengths in self._index for length in lengths]

    @property
    def headers(self) -> list[str]:
        """Whole header lines of the N proteins; read from disk each time."""
        return [
            header for output in range(len(self._outputs)) for header in self._opened(output).records()[1]
        ]

    @property
    def sources(self) -> list[str]:
        """Path of the input file of each protein, relative to the common root of the run's inputs."""
        return [about.source for about, ids, _ in self._index for _ in ids]

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """All vectors, float32 of shape (N, D): the mean over residues of the last requested layer. Read once
        and kept."""
        return self.vectors_of("mean", self.about.main_layer)

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, weights' hash and settings that the numbers depend on, as the first output has them."""
        return self.about.provenance

    @property
    def about(self) -> About:
        """All that the first output says of itself; its `kinds` are the representations that are there.

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
        """Return all vectors of one representation.

        Parameters
        ----------
        kind
            `mean` or `bos`.
        layer
            One of those that were requested, counted from the embedding layer, 0.

        Returns
        -------
        float32 array, shape (N, D)

        Raises
        ------
        ValueError
            If it was not asked for when the proteins were embedded, or is `per_tok`.
        """
        if kind == "per_tok":
            raise ValueError("per_tok is not one vector for each protein: use residues(id)")
        self._check(kind, layer)
        rows = np.empty((len(self), self.about.width), np.float32)
        for output in range(len(self._outputs)):
            rows[self._starts[output] : self._starts[output + 1]] = self._opened(output).vectors(kind, layer)
        return rows

    def residues(self, protein: str | SupportsIndex, layer: int | None = None) -> NDArray[np.float32]:
        """Return a protein's per-residue representations.

        Parameters
        ----------
        protein
            Its id or its position.
        layer
            Of those that were requested; None: the last.

        Returns
        -------
        float32 array, shape (L, D)

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
        """Return all positions of an id, counted from 0.

        Raises
        ------
        KeyError
            If there is none.
        """
        if protein not in self._positions:
            raise KeyError(protein)
        return list(self._positions[protein])

    def _check(self, kind: str, layer: int) -> None:
        kinds = self.about.kinds
        if layer not in kinds.get(kind, []):
            there = ", ".join(
                f"{name} of layer {known}" for name, layers in kinds.items() for known in layers
            )
            raise ValueError(
                f"{kind} of layer {layer} is not there, but {there}: "
                f"embed with include=[{kind}] and repr_layers=[{layer}]"
            )

    def _find(self, protein: str | SupportsIndex) -> tuple[int, int]:
        """Find the output of a protein and its position in it."""
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
        """For each output what it says of itself, its ids and its lengths; each is opened once."""
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
