"""Embeddings read back, the same for every format: one output, or all that runs left in one directory."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from dist_esm.outputs import convert, journal, launches
from dist_esm.outputs.finished import finished_files
from dist_esm.outputs.formats.base import About, representation_name
from dist_esm.outputs.formats.registry import FORMATS, format_at
from dist_esm.outputs.opened import OutputSequence
from dist_esm.outputs.positions import Positions
from dist_esm.outputs.vectors import Vectors

KINDS = ("mean", "bos", "per_tok")


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


class EmbeddingSet:
    """Embeddings of N proteins in input order, from one output or many.

    Everything is read when it is asked for, and no more than is asked for. ``proteins[3]`` and
    ``proteins["P12345"]`` are a protein's vector, shape (D,): the mean over residues of the last requested
    layer. ``proteins[:3]`` and ``proteins[["P12345", "Q9"]]`` are those of several, shape (n, D).
    `vectors_of` has the other representations. Of an id that is there more than once it is the first's, and
    `positions` gives all of them. One set is for one thread.

    Parameters
    ----------
    outputs
        Paths of the outputs, in order; `load` finds them.

    Raises
    ------
    ValueError
        By whatever reads, if an output is gone, is damaged, or was made under other settings than the first.

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
        self._outputs = OutputSequence(outputs)

    def __len__(self) -> int:
        return int(self._outputs.starts[-1])

    def __contains__(self, protein: object) -> bool:
        return isinstance(protein, str) and self._by_id.first(protein) is not None

    def __getitem__(self, proteins: str | SupportsIndex | slice | Sequence[str | int]) -> NDArray[np.float32]:
        if isinstance(proteins, slice):
            rows = self.vectors[proteins]
        elif isinstance(proteins, (Sequence, np.ndarray)) and not isinstance(proteins, str):
            rows = self.vectors[[self._position(protein) for protein in proteins]]
        else:
            output, position = self._outputs.find(self._position(proteins))
            rows = self._outputs.opened(output).vector("mean", self.about.main_layer, position)
        return np.array(rows, np.float32)

    def __repr__(self) -> str:
        paths = self._outputs.paths
        return f"<EmbeddingSet of {len(paths)} outputs{f' from {paths[0]}' if paths else ''}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"_outputs": self._outputs}

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the N proteins, duplicates included. Read once and kept."""
        outputs = self._outputs
        return [name for output in range(len(outputs)) for name in outputs.ids(output)]

    @cached_property
    def lengths(self) -> list[int]:
        """Residues that each embedding was made of, N of them. Read once and kept."""
        outputs = self._outputs
        return [length for output in range(len(outputs)) for length in outputs.opened(output).lengths()]

    @property
    def headers(self) -> list[str]:
        """Whole header lines of the N proteins; read from disk each time."""
        outputs = self._outputs
        return [header for output in range(len(outputs)) for header in outputs.opened(output).headers()]

    @property
    def sources(self) -> list[str]:
        """Path of the input file of each protein, relative to the common root of the run's inputs."""
        pairs = zip(self._outputs.sources, self._outputs.num_proteins, strict=True)
        return [source for source, num_proteins in pairs for _ in range(num_proteins)]

    @cached_property
    def vectors(self) -> Vectors:
        """All vectors, float32 of shape (N, D): the mean over residues of the last requested layer. They stay
        on disk until they are used, see `Vectors`."""
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
        return self._outputs.about

    def vectors_of(self, kind: str, layer: int) -> Vectors:
        """Return all vectors of one representation, which stay on disk until they are used.

        Parameters
        ----------
        kind
            `mean` or `bos`.
        layer
            One of those that were requested, counted from the embedding layer, 0.

        Returns
        -------
        Vectors
            As a float32 array, shape (N, D).

        Raises
        ------
        ValueError
            If it was not asked for when the proteins were embedded, or is `per_tok`.
        """
        if kind == "per_tok":
            raise ValueError("per_tok is not one vector for each protein: use residues(id)")
        self._check(kind, layer)
        return Vectors(self._outputs, kind, layer)

    def residues(self, protein: str | SupportsIndex, layer: int | None = None) -> NDArray[np.float32]:
        """Return a protein's per-residue representations.

        Of the numbers in its output no others are read; in a compressed `parquet` those of its row group are.

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
        output, position = self._outputs.find(self._position(protein))
        return np.array(self._outputs.opened(output).residues(layer, position), np.float32)

    def positions(self, protein: str) -> list[int]:
        """Return all positions of an id, counted from 0.

        Raises
        ------
        KeyError
            If there is none.
        """
        found = self._by_id.all(protein)
        if not found:
            raise KeyError(protein)
        return found

    def to_numpy(self, kind: str = "mean", layer: int | None = None) -> NDArray[np.float32]:
        """Read all vectors of one representation into memory.

        Parameters
        ----------
        kind
            `mean` or `bos`.
        layer
            Of those that were requested; None: the last.

        Returns
        -------
        float32 array, shape (N, D)
            A copy that may be written to.

        Raises
        ------
        ValueError
            As `vectors_of`.
        """
        return np.array(self.vectors_of(kind, self.about.main_layer if layer is None else layer))

    def to_frame(
        self, library: Literal["pandas", "polars"] = "pandas", include: Sequence[str] = ("mean", "bos")
    ) -> Any:
        """Read a run into a data frame, a row for each protein in input order.

        Parameters
        ----------
        library
            `pandas` or `polars`.
        include
            Kinds to take, of all their layers, as far as they are there: `mean`, `bos`, `per_tok`.

        Returns
        -------
        pandas.DataFrame or polars.DataFrame
            Columns `id`, `source`, `length` (embedded residues) and, as in `format=parquet`,
            ``mean_layer_33``, ``bos_layer_33``, ``per_tok_layer_33``. In pandas each value of these is a
            float32 array, shape (D,) or (L, D); in polars they are `Array` and `List(Array)`.

        Raises
        ------
        ValueError
            If the library is not installed, or there is no such library or kind.

        Examples
        --------
        >>> load("embeddings").to_frame().columns  # doctest: +SKIP
        Index(['id', 'source', 'length', 'mean_layer_33'], dtype='object')
        """
        wrong = [kind for kind in include if kind not in KINDS]
        if wrong or isinstance(include, str):
            raise ValueError(f"include={include!r} is no list of kinds: use any of {', '.join(KINDS)}")
        convert.need_frames(library)
        values: dict[str, Any] = {}
        for kind, layers in self.about.kinds.items():
            for layer in layers if kind in include else ():
                values[representation_name(kind, layer)] = (
                    [self.residues(position, layer) for position in range(len(self))]
                    if kind == "per_tok"
                    else self.to_numpy(kind, layer)
                )
        about: dict[str, Sequence[Any]] = {"id": self.ids, "source": self.sources, "length": self.lengths}
        return convert.frame_of(library, about, values, self.about.width)

    def to_anndata(self) -> Any:
        """Read a run into an AnnData, for scanpy.

        Returns
        -------
        anndata.AnnData
            N observations of D variables: `X` is the mean over residues of the last requested layer, float32.
            `obs_names` are the ids, made unique where one comes more than once (``P1``, ``P1-1``). `obs` has
            `id`, `length` (embedded residues) and `source`; `obsm` has the other means and the `bos`, as
            ``bos_layer_33``; ``uns["provenance"]`` has what the numbers depend on, as JSON.

        Raises
        ------
        ValueError
            If anndata is not installed.

        Examples
        --------
        >>> load("embeddings").to_anndata().shape  # doctest: +SKIP
        (28, 1280)
        """
        convert.need_anndata()
        about: dict[str, Sequence[Any]] = {"id": self.ids, "source": self.sources, "length": self.lengths}
        others = {
            representation_name(kind, layer): self.to_numpy(kind, layer)
            for kind, layers in self.about.kinds.items()
            for layer in layers
            if kind != "per_tok" and (kind, layer) != ("mean", self.about.main_layer)
        }
        return convert.anndata_of(self.to_numpy(), about, others, self.provenance)

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

    def _position(self, protein: str | SupportsIndex) -> int:
        """Return the position of a protein, from 0 to N - 1."""
        if isinstance(protein, str):
            found = self._by_id.first(protein)
            if found is None:
                raise KeyError(protein)
            return found
        position = operator.index(protein)
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} proteins")
        return position % len(self)

    @cached_property
    def _by_id(self) -> Positions:
        return Positions(self._outputs)
