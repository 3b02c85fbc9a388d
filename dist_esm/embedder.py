"""ESM-2 in a notebook: proteins in, arrays or frames out, on one device, with the numbers of the command."""

from __future__ import annotations

import json
import logging
import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from dist_esm.attempt import as_value
from dist_esm.config import (
    Attention,
    Config,
    DeviceKind,
    Dtype,
    Fp8,
    Include,
    LinearKind,
    Long,
    check,
    check_layers,
    choice,
    model_config,
)
from dist_esm.distributed import RefusedError, World
from dist_esm.fasta.segments import make_segments, num_embedded
from dist_esm.given import GivenProtein, read_given, warn_of_changes
from dist_esm.jobs.embed import run
from dist_esm.jobs.setup import SMALLER_PACKS, Setup, rows_in_free_memory
from dist_esm.keys import with_keys
from dist_esm.logs import logging_to_terminal
from dist_esm.model.checkpoints.locate import fetch
from dist_esm.model.engine import AHEAD, Engine, Submitted, build_engine, default_toks_per_batch
from dist_esm.model.kernels.choose import choose_device, choose_dtype, choose_kernels, quantized_products
from dist_esm.model.pool import combine
from dist_esm.model.weights import architecture, check_weights, complete
from dist_esm.outputs.convert import frame_of, need_frames
from dist_esm.outputs.formats.base import representation_name
from dist_esm.outputs.load import EmbeddingSet, load
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.retry import finish
from dist_esm.stop import signals_as_before
from dist_esm.types import Pack, ProteinEmbedding, RankResult, SegmentEmbedding

log = logging.getLogger("dist_esm")

BAR_SECONDS = 3.0
"""What takes no longer shows no progress bar."""
MOST_NAMED = 5
"""Files that an error names."""
OWN_KEYS = (
    *("model", "device", "dtype", "fp8", "attention", "linear"),
    *("truncation_seq_length", "long", "window_overlap", "toks_per_batch"),
)
"""Keys of the command line that are settled when an `Embedder` is made."""
KEYS_SET = ("input", "output_dir", "job", "ranks")
"""Keys that `Embedder.embed_file` sets."""


class Embedder:
    """An ESM-2 on one device.

    Parameters
    ----------
    model
        One of fair-esm's names, `esm2_t6_8M_UR50D` to `esm2_t48_15B_UR50D`, or `auto`: what the weights are.
    weights
        As `model.weights` on the command line: a path, an id in Hugging Face's cache, `random`, or None for
        torch hub's cache.
    adapter
        As `model.adapter` on the command line: the directory of a LoRA adapter; None: none.
    repr_layers
        The layer to return, or a list of layers, fair-esm's numbering, negatives from the end.
    device, dtype, fp8, attention, linear
        As on the command line.
    truncation_seq_length, long, window_overlap
        As on the command line; what `long=skip` and `long=fail` would leave out is a ValueError in `embed`.
    toks_per_batch
        Tokens in a pack; None: the default for the device, halved until a pack fits in a GPU's free memory.

    Raises
    ------
    ValueError
        If a value is wrong, the weights cannot be had, or the device is not there.

    Examples
    --------
    >>> embedder = Embedder("esm2_t6_8M_UR50D", weights="random", device="cpu")
    >>> embedder.embed(["MKTAYIAKQR", "GAVLIPFMW"]).shape
    (2, 320)
    >>> [rows.shape for rows in embedder.embed({"P1": "MKTAYIAKQR", "P2": "GAV"}, include="per_tok")]
    [(10, 320), (3, 320)]
    """

    def __init__(
        self,
        model: str = "esm2_t33_650M_UR50D",
        *,
        weights: str | os.PathLike[str] | None = None,
        adapter: str | os.PathLike[str] | None = None,
        repr_layers: SupportsIndex | Sequence[int] = -1,
        device: str = "auto",
        dtype: str = "auto",
        fp8: str = "all",
        attention: str = "auto",
        linear: str = "auto",
        truncation_seq_length: int | None = 1022,
        long: str = "truncate",
        window_overlap: int = 256,
        toks_per_batch: int | None = None,
    ) -> None:
        config = Config(
            input="sequences",
            model=model_config(model),
            repr_layers=list_of(repr_layers),
            device=choice(DeviceKind, "device", device),
            dtype=choice(Dtype, "dtype", dtype),
            fp8=choice(Fp8, "fp8", fp8),
            attention=choice(Attention, "attention", attention),
            linear=choice(LinearKind, "linear", linear),
            truncation_seq_length=truncation_seq_length,
            long=choice(Long, "long", long),
            window_overlap=window_overlap,
            toks_per_batch=toks_per_batch,
        )
        config.model.weights = None if weights is None else os.fspath(weights)
        config.model.adapter = None if adapter is None else os.fspath(adapter)
        check(config)
        fetch(config.model)
        complete(config.model)
        check_layers(config)
        weights_id = check_weights(config.model)
        self.weights = weights_id.words
        self.config = config
        self.repr_layers = repr_layers
        place = choose_device(config.device, 0, 1, "this machine")
        precision = choose_dtype(config.dtype, place)
        head_dim, products = architecture(config.model).head_dim, quantized_products(config.dtype, config.fp8)
        kernels = choose_kernels(config.attention, config.linear, place, precision, head_dim, products)
        if toks_per_batch is None:
            rows, reason = rows_in_free_memory(config.model, place, precision)
            default = default_toks_per_batch(place.type, config.model.embed_dim)
            if rows < default:
                config.toks_per_batch = rows
                log.warning(SMALLER_PACKS, rows, default, reason)
        self.engine = build_engine(config, place, precision, kernels, fingerprint=weights_id.fingerprint)

    def embed(
        self,
        sequences: Any,
        include: str | Sequence[str] = "mean",
        repr_layers: SupportsIndex | Sequence[int] | None = None,
        *,
        as_frame: bool | Literal["pandas", "polars"] = False,
        progress: bool | None = None,
    ) -> Any:
        """Embed proteins, in their order.

        Letters are put right as the command line does by default: upper-cased, no blanks, gaps and trailing
        stops, X for each unknown letter. Identical sequences are computed once. A protein that is longer than
        `truncation_seq_length` is treated as `long` says; if it is truncated, or letters became X, a warning
        says how many and which.

        Parameters
        ----------
        sequences
            A list of sequences (any iterable of text); a dict of id to sequence; pairs (id, sequence);
            records of Biopython, in a list or as the values of a dict; or the path of one FASTA file, also
            compressed. What looks like a path or an id is never taken for a sequence.
        include
            `mean` over residues, `bos`, or `per_tok`; or a list of these.
        repr_layers
            A layer, or a list of layers; None: those of the `Embedder`.
        as_frame
            True or `"pandas"` for a pandas data frame, `"polars"` for one of polars.
        progress
            A progress bar: True shows one after a few seconds, False none; None: if tqdm is installed.

        Returns
        -------
        float32 array, list, dict or data frame
            For one kind and layer, not in lists: an array, shape (N, D), for `mean` and `bos`; a list of N
            arrays, shape (L, D), for `per_tok`. If either is a list: a dict of these, whose keys are
            ``mean_layer_33`` and the like. As a frame: a row for each protein, with the columns `id`
            (``sequence_0`` and so on, where none was given), `length` (embedded residues) and
            ``mean_layer_33`` and the like. No proteins give arrays of shape (0, D), empty lists, or a frame
            without rows.

        Raises
        ------
        ValueError
            If `sequences` is something else, if one of them is empty or left out by the policies for letters
            and lengths (the message has its place, from 0, and its id), if a kind or a layer is unknown, or
            if a package that was asked for is not installed.

        Examples
        --------
        >>> embedder = Embedder("esm2_t6_8M_UR50D", weights="random", device="cpu")
        >>> embedder.embed({"P1": "MKTAYIAKQR"}, as_frame=True).columns.to_list()
        ['id', 'length', 'mean_layer_6']
        >>> vectors = embedder.embed(["MKT", "GAV"], include=["mean", "bos"], repr_layers=[3, 6])
        >>> sorted(vectors), vectors["bos_layer_3"].shape
        (['bos_layer_3', 'bos_layer_6', 'mean_layer_3', 'mean_layer_6'], (2, 320))
        """
        library = "pandas" if as_frame is True else as_frame or None
        if library is not None:
            need_frames(library)
        layers = self.repr_layers if repr_layers is None else repr_layers
        config = replace(self.config, repr_layers=list_of(layers), include=kinds_of(include))
        check(config)
        wanted = [(kind, layer) for kind in config.include for layer in config.resolved_layers()]
        given = read_given(sequences, config)
        warn_of_changes(given, config)
        wants_rows = Include.per_tok in config.include
        with self.engine.for_layers(config.resolved_layers(), wants_rows) as engine:
            proteins = embed_given(engine, given, wanted, progress)
        arrays = {
            representation_name(kind.name, layer): together(
                [protein[kind, layer] for protein in proteins], kind, self.width
            )
            for kind, layer in wanted
        }
        if library is not None:
            about: dict[str, Sequence[Any]] = {
                "id": [one.id for one in given],
                "length": [num_embedded(one.spans) for one in given],
            }
            return frame_of(library, about, arrays, self.width)
        if isinstance(include, str) and isinstance(layers, SupportsIndex):
            (only,) = arrays.values()
            return only
        return arrays

    @property
    def width(self) -> int:
        """D."""
        return self.config.model.embed_dim

    def embed_file(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        output_dir: str | os.PathLike[str],
        **keys: Any,
    ) -> EmbeddingSet:
        """Embed FASTA files into an output directory: the run of the command with one rank.

        Outputs, their bits, journal, report and log lines are those of the command with these settings, and
        either goes on with what the other began. The model that is loaded is used. torch.distributed is not
        initialised, and a program's own use of it, of Hydra or of logging is left alone.

        Parameters
        ----------
        path
            As `input` on the command line: a file, a directory, a glob, or a list of these.
        output_dir
            Where everything is written.
        keys
            Other keys of the command line, for example ``format="parquet"``, ``include=["mean", "per_tok"]``,
            ``residues={"unknown": "fail"}`` or ``verbosity="quiet"``. Those of the model and of lengths are
            the `Embedder`'s.

        Returns
        -------
        EmbeddingSet
            What ``load(output_dir, run="last")`` gives.

        Raises
        ------
        ValueError
            If the run cannot start, in one line that names the key, or if files failed: all others are done
            then, and `report.json` names each.
        KeyboardInterrupt
            If it was interrupted. What is done is kept, and the same call goes on from there.
        RuntimeError
            If something else ended it early.

        Examples
        --------
        >>> embedder = Embedder("esm2_t33_650M_UR50D")  # doctest: +SKIP
        >>> run = embedder.embed_file("proteins/", "embeddings", format="parquet")  # doctest: +SKIP
        >>> run.vectors.shape  # doctest: +SKIP
        (28, 1280)
        """
        inputs = (
            os.fspath(path) if isinstance(path, (str, os.PathLike)) else [os.fspath(item) for item in path]
        )
        for key in keys:
            if key in OWN_KEYS or key in KEYS_SET:
                own = key in OWN_KEYS
                where = "it is settled when an Embedder is made" if own else "embed_file sets it itself"
                raise ValueError(f"{key} is no key for embed_file: {where}")
        config = with_keys(deepcopy(self.config), keys)
        config = replace(config, input=inputs, output_dir=Path(output_dir).expanduser(), ranks=1)
        if self.engine.is_gpu:  # it is loaded: what it computes with is the setting, whatever is free now
            config.toks_per_batch = self.engine.toks_per_batch
        check(config)

        def engine_of_run(config: Config, setup: Setup, world: World) -> Engine:
            rows_dtype = config.save_dtype.name
            return self.engine.for_layers(
                config.resolved_layers(), Include.per_tok in config.include, rows_dtype
            )

        with signals_as_before(), logging_to_terminal(0, config.verbosity):
            try:
                code = run(config, World.alone(), engine_of_run)
            except RefusedError as refused:
                raise ValueError("; ".join(refused.problems)) from None
        if code != 0:
            raise ending_of_run(config.output_dir)
        return load(config.output_dir, run="last")


def list_of(layers: SupportsIndex | Sequence[int]) -> list[int]:
    """Return layers as a list."""
    return [operator.index(layers)] if isinstance(layers, SupportsIndex) else list(layers)


def kinds_of(include: str | Sequence[str]) -> list[Include]:
    """Return kinds by their names."""
    names = [include] if isinstance(include, str) else include
    return [choice(Include, "include", name) for name in names]


def embed_given(
    engine: Engine,
    given: Sequence[GivenProtein],
    wanted: Sequence[tuple[Include, int]],
    progress: bool | None,
) -> list[ProteinEmbedding]:
    """Embed proteins, identical ones once, and return the embedding of each in order."""
    first_with: dict[bytes, int] = {}
    places = [first_with.setdefault(one.residues, place) for place, one in enumerate(given)]
    firsts = list(first_with.values())
    parts: dict[int, list[SegmentEmbedding | None]] = {
        place: [None] * len(given[place].spans) for place in firsts
    }
    embeddings: dict[int, ProteinEmbedding] = {}
    total = sum(span.stop - span.start for place in firsts for span in given[place].spans)
    with progress_bar(total, progress) as bar:
        for pack, answers in answers_of(engine, packs_of(engine, given, firsts)):
            for segment, answer in zip(pack.segments, answers, strict=True):
                if isinstance(answer, Exception):
                    raise answer
                of_protein = parts[segment.protein]
                of_protein[segment.part] = answer
                whole = [part for part in of_protein if part is not None]
                if len(whole) == len(of_protein):
                    num_residues = num_embedded(given[segment.protein].spans)
                    embeddings[segment.protein] = combine(whole, num_residues, wanted)
                    del parts[segment.protein]
            bar.update(pack.num_tokens - 2 * len(pack.segments))
    # A copy for each that comes again: whoever writes into one protein's rows must not change another's.
    return [
        embeddings[first] if first == place else deepcopy(embeddings[first])
        for place, first in enumerate(places)
    ]


def packs_of(engine: Engine, given: Sequence[GivenProtein], places: Iterable[int]) -> Iterator[Pack]:
    """Fill packs with the proteins at some places."""
    packer = Packer(engine.toks_per_batch)
    for place in places:
        for segment in make_segments(place, given[place].residues, given[place].spans):
            yield from packer.add(segment)
    yield from packer.flush()


def answers_of(
    engine: Engine, packs: Iterable[Pack]
) -> Iterator[tuple[Pack, list[SegmentEmbedding | Exception]]]:
    """Embed packs, some of them submitted ahead, so that the device always has its next one."""
    ahead: deque[tuple[Pack, Submitted | Exception]] = deque()
    for pack in packs:
        ahead.append((pack, as_value(engine.submit, pack)))
        if len(ahead) > AHEAD:
            first, submitted = ahead.popleft()
            yield first, finish(engine, first, submitted, RankResult())
    for first, submitted in ahead:
        yield first, finish(engine, first, submitted, RankResult())


def progress_bar(total: int, wanted: bool | None) -> Any:
    """Return a progress bar of residues, which shows itself after a few seconds.

    Raises
    ------
    ValueError
        If one is wanted and tqdm is not installed.
    """
    is_there = find_spec("tqdm") is not None
    if wanted and not is_there:
        raise ValueError("progress=True needs tqdm: pip install 'dist_esm[notebook]'")
    if wanted is False or not is_there:
        return NoBar()
    tqdm = import_module("tqdm.auto").tqdm
    return tqdm(total=total, desc="embedding", unit=" residues", unit_scale=True, delay=BAR_SECONDS)


class NoBar:
    """What stands for a progress bar that nobody wants."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was shown."""

    def update(self, num_residues: int) -> None:
        """Show nothing."""


def together(values: list[NDArray[np.float32]], kind: Include, width: int) -> Any:
    """Return vectors as one array, and residues as the list that they are."""
    if kind is Include.per_tok:
        return values
    return np.stack(values) if values else np.empty((0, width), dtype=np.float32)


def ending_of_run(output_dir: Path) -> BaseException:
    """Return what to raise for a run that did not embed every file, by its report."""
    report = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
    if report["status"] == "aborted":
        reason = str(report["reason"])
        return (
            KeyboardInterrupt(reason)
            if "SIGINT" in reason
            else RuntimeError(f"{reason}: what is done is kept")
        )
    failed = [f"{failure['path']}: {failure['error_message']}" for failure in report["failed"]]
    more = f"; and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
    total = len(failed) + len(report["files"])
    return ValueError(
        f"{len(failed)} of {total} files failed, the others are in {output_dir}: "
        + "; ".join(failed[:MOST_NAMED])
        + more
    )
