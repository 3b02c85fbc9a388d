"""A stand-in for the device whose answer names its input, and a run around it without ranks.

Each residue's row is small whole numbers made of its token, its place and all tokens of its segment. So sums
are exact, and another protein, a neighbouring residue or another window has a different vector.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from esm.data import Alphabet

from dist_esm.checksum import read_back
from dist_esm.config import Config, DeviceKind, Include, ModelConfig, Writers
from dist_esm.distributed import World
from dist_esm.fasta.blocks import text_digest, whole_file
from dist_esm.jobs.embed import run
from dist_esm.jobs.report.content import FileReport
from dist_esm.jobs.setup import Setup
from dist_esm.outputs.finished import FinishedFile
from dist_esm.outputs.journal import Entry
from dist_esm.pipeline.writer_processes import WriterProcesses
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.inputs import find_files
from dist_esm.planning.units import Plan
from dist_esm.types import Failure, Pack, Segment, SegmentEmbedding, Tally

WIDTH = 6
ALL_KINDS = [Include.mean, Include.bos, Include.per_tok]
FAIR_ESM = Alphabet.from_architecture("ESM-1b")


def rows_of(tokens: np.ndarray, layer: int) -> np.ndarray:
    """Rows of a segment's residues, shape (len(tokens) - 2, WIDTH), int64."""
    token = tokens[1:-1].astype(np.int64)
    place = np.arange(len(token))
    whole = np.full(len(token), zlib.crc32(tokens.astype(np.uint8).tobytes()) % 251)
    return np.stack(
        [np.full(len(token), layer + 1), token, token * (place % 61 + 1), place % 127, whole, token**2 % 29],
        axis=1,
    )


def bos_of(tokens: np.ndarray, layer: int) -> np.ndarray:
    """The row of BOS, shape (WIDTH,), int64."""
    return np.array([layer + 1, len(tokens), zlib.crc32(tokens.astype(np.uint8).tobytes()) % 65521, 1, 2, 3])


def fair_esm_tokens(residues: str) -> np.ndarray:
    """fair-esm's tokens of a sequence, with BOS and EOS, a letter at a time.

    A test holds them to `Alphabet.encode`.
    """
    return np.array([FAIR_ESM.cls_idx, *map(FAIR_ESM.tok_to_idx.__getitem__, residues), FAIR_ESM.eos_idx])


@dataclass
class Expected:
    """The stand-in's answer for a protein, worked out from its letters alone."""

    mean: np.ndarray
    bos: np.ndarray
    rows: np.ndarray


def expected(
    residues: str, layer: int = 1, spans: Sequence[tuple[int, int, int, int]] | None = None
) -> Expected:
    """The right answer for a protein.

    `spans` are its segments as (start, stop, first kept, one past the last kept).
    """
    spans = spans or [(0, len(residues), 0, len(residues))]
    kept, sums = [], []
    for start, stop, first, last in spans:
        rows = rows_of(fair_esm_tokens(residues[start:stop]), layer)[first - start : last - start]
        kept.append(rows.astype(np.float32))
        sums.append(rows.sum(0).astype(np.float32))
    rows = np.concatenate(kept)
    mean = np.sum(sums, axis=0, dtype=np.float32) / np.float32(len(rows))
    return Expected(
        mean, bos_of(fair_esm_tokens(residues[slice(*spans[0][:2])]), layer).astype(np.float32), rows
    )


class StandIn:
    """The interface of `dist_esm.model.engine.Engine`.

    A segment whose tokens are in `poison` fails its forward.
    """

    def __init__(
        self, layers: Sequence[int], wants_rows: bool, toks_per_batch: int, poison: Sequence[str] = ()
    ) -> None:
        self.layers = list(layers)
        self.wants_rows = wants_rows
        self.toks_per_batch = toks_per_batch
        self.toks_of_last = max(1, toks_per_batch // 2)
        self.num_threads = 2
        self.poison = {fair_esm_tokens(residues).astype(np.uint8).tobytes() for residues in poison}
        self.num_segments = 0
        self.num_tokens = 0
        self.is_gpu = False
        self.idle_seconds = 0.0
        self.startup: dict[str, float] = {}

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def submit(self, pack: Pack) -> StandInPack:
        """A pack whose answers are worked out when they are asked for."""
        return StandInPack(self, pack)

    def num_rows(self, pack: Pack) -> int:
        """As on a CPU, where it matters to nothing."""
        return self.toks_per_batch

    def run(self, pack: Pack, num_rows: int | None = None) -> list[SegmentEmbedding]:
        """Embed the segments of a pack, in their order."""
        if any(segment.tokens.tobytes() in self.poison for segment in pack.segments):
            raise RuntimeError("poisoned segment")
        assert pack.num_tokens <= self.toks_per_batch or len(pack.segments) == 1
        self.num_segments += len(pack.segments)
        self.num_tokens += pack.num_tokens
        answers = []
        for segment in pack.segments:
            first, last = segment.keep
            rows = {layer: rows_of(segment.tokens, layer)[first:last] for layer in self.layers}
            answers.append(
                SegmentEmbedding(
                    {layer: rows[layer].sum(0).astype(np.float32) for layer in self.layers},
                    {layer: bos_of(segment.tokens, layer).astype(np.float32) for layer in self.layers},
                    {layer: rows[layer].astype(np.float32) for layer in self.layers}
                    if self.wants_rows
                    else {},
                )
            )
        return answers

    def recompute(self, segment: Segment) -> SegmentEmbedding:
        """Return the answer of `run`: there is no wider dtype."""
        (answer,) = self.run(Pack((segment,)))
        return answer

    def free_memory(self) -> None:
        """Nothing is cached."""

    def abandon(self) -> None:
        """Nothing takes long."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class StandInPack:
    """The interface of `dist_esm.model.engine.Submitted`."""

    engine: StandIn
    pack: Pack

    def result(self) -> list[SegmentEmbedding]:
        """Answers in the order of the segments."""
        return self.engine.run(self.pack)


@dataclass
class ReportRead:
    """report.json, with the classes that it was written from."""

    status: str
    reason: str | None
    files: list[FileReport]
    failed: list[Failure]
    not_attempted: list[str]
    records: dict[str, Any]

    @classmethod
    def of(cls, output_dir: Path) -> ReportRead:
        content = json.loads((output_dir / "report.json").read_text())
        names = [field.name for field in fields(FileReport) if field.name != "tally"]
        files = [
            FileReport(**{name: entry[name] for name in names}, tally=Tally()) for entry in content["files"]
        ]
        failed = [Failure(**failure) for failure in content["failed"]]
        rest = {name: content[name] for name in ("status", "reason", "not_attempted", "records")}
        return cls(files=files, failed=failed, **rest)


@dataclass
class Embedded:
    """A finished run."""

    report: ReportRead
    plan: Plan
    engine: StandIn
    output_dir: Path

    def load(self, output: str) -> dict[str, Any]:
        """An output by its path relative to `output_dir`, without suffix."""
        return torch.load(self.output_dir / f"{output}.pt", weights_only=True)

    def outputs(self) -> list[str]:
        """Paths of all outputs, without suffix."""
        paths = self.output_dir.rglob("*.pt")
        return sorted(
            str(path.relative_to(self.output_dir).with_suffix(""))
            for path in paths
            if ".dist_esm" not in path.parts
        )

    def notes(self, output: str) -> list[dict[str, str]]:
        """The lines of an output's records.tsv; [] if it has none."""
        path = self.output_dir / f"{output}.records.tsv"
        if not path.exists():
            return []
        head, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]

    def failure(self, name: str) -> str:
        """The message of the failed file of this name."""
        (message,) = [
            failure.error_message for failure in self.report.failed if Path(failure.path).name == name
        ]
        return message


def make_config(inputs: Any, output_dir: Path, **overrides: Any) -> Config:
    """A configuration for the stand-in: one layer, packs of few tokens, and no end for files that fail."""
    settings: dict[str, Any] = {
        "device": DeviceKind.cpu,
        "toks_per_batch": 200,
        "max_consecutive_failures": 1_000_000,
        "unit_share": 1.0,
        **overrides,
    }
    model = ModelConfig("stand-in", 1, WIDTH, 1, "random")
    return Config(input=inputs, output_dir=output_dir, model=model, **settings)


def embed_directory(
    inputs: Any,
    output_dir: Path,
    poison: Sequence[str] = (),
    after_plan: Callable[[], object] = lambda: None,
    processes: WriterProcesses | None = None,
    **overrides: Any,
) -> Embedded:
    """Embed `inputs` with `dist_esm.jobs.embed.run`: a world of one, with the stand-in for the model.

    `after_plan` is called when the plan is made and nothing has been read for it yet.
    """
    inputs = [str(item) for item in inputs] if isinstance(inputs, (list, tuple)) else str(inputs)
    writers = {} if processes is None else {"writers": Writers.processes}
    config = make_config(inputs, output_dir, **writers, **overrides)
    engines: list[StandIn] = []

    def make_engine(config: Config, setup: Setup, world: World) -> StandIn:
        after_plan()
        wants_rows = any(kind.name == "per_tok" for kind in config.include)
        assert config.toks_per_batch is not None
        engines.append(StandIn(config.resolved_layers(), wants_rows, config.toks_per_batch, poison))
        return engines[-1]

    world = World(None, 0, 1, 0, 1)
    plan = agree_on_plan(config, find_files(config.input_list()), [], world)
    run(config, world, make_engine, processes)  # type: ignore[arg-type]
    engine = engines[0] if engines else StandIn([1], False, 1)
    return Embedded(ReportRead.of(output_dir), plan, engine, output_dir)


def finished_of(source: Path, output: Path) -> FinishedFile:
    """What a run would have in its journal of an output just below `output_dir`, as the output is now."""
    written = read_back(output.parent, Path(output.name))
    assert written is not None
    text = text_digest(whole_file(source))
    entry = Entry(output.stem, source.name, [(0, None)], [text], [written], Tally(), 0, 1.0, is_last=True)
    return FinishedFile((entry,))


def accounts_add_up(report: ReportRead) -> bool:
    """Records in = ok + truncated + windowed + skipped + failed + not attempted."""
    records = report.records
    return records["in"] == sum(
        records[key] for key in ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")
    )
