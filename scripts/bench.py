#!/usr/bin/env python3
"""This tool and its peers on the same proteins, in one run, with seeded random weights.

    scripts/bench.py --fasta proteins.fasta --models esm2_t33_650M_UR50D --json results.json

The table has tokens a second, and the share of what the device can do. A token is a residue that is
embedded (at most 1,022 of a protein), or its BOS or EOS; padding does not count. Rows:

matrix rate     the model's own matrix products alone, over random numbers: the limit for everything else
kernel loop     dist_esm, packs made beforehand: forward and pooling
end to end      the real command, from FASTA on disk to outputs on disk, without start and load
residues        the real command with a row for each residue, in every format (--only residues)
start           from launch to the first pack, with a checkpoint on disk
fair-esm        its extract loop as shipped, batches of 4,096 tokens, sorted by length (in fp32 and in bf16)
transformers    EsmModel, SDPA, batches of similar length
esm-efficient   packed, with flash-attn's FlashAttention-2, or with torch's copy of it

Peers embed a sample of the proteins of at most --peer-tokens tokens. All figures are medians of --repeats
runs. Every contestant's means of a few proteins are compared with fair-esm's own fp32 model: the table has
the largest error as a share of the spread of these proteins, and the share of their neighbours that stay.
The exit code is 1 if a part failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.fasta import write_fasta
from benchmarks.harness import Table, begin, disk_rates, end, make_parser, parse_options, timed
from benchmarks.peers import PEERS, Means, fair_esm
from benchmarks.proteins import Protein, as_records, load_proteins, make_packs, make_segments, num_tokens
from dist_esm.atomic import size_of
from dist_esm.attempt import as_value
from dist_esm.commandline.cli import compose_config
from dist_esm.config import Format, SaveDtype
from dist_esm.jobs.selfcheck.yardstick import Distance, measure
from dist_esm.model.engine import AHEAD, Engine, Submitted, build_engine
from dist_esm.model.kernels.choose import (
    choose_device,
    choose_dtype,
    choose_kernels,
    precision_of,
    quantized_products,
)
from dist_esm.model.weights import architecture, fair_esm_tensors
from dist_esm.types import Pack

NUM_CHECKED = 32
"""Proteins whose means are compared."""
NUM_STARTED = 50
"""Proteins of the runs that time the start."""
DISK_BYTES = 2 << 30
"""Bytes of the files that time the disk."""
FAILED = "failed: "
"""Begins the note of a part that failed."""
HEADINGS = ("model", "what", "dtype", "tokens/s", "of limit", "error / spread", "kept", "note")


@dataclass
class Row:
    """One line of the table."""

    model: str
    name: str
    dtype: str
    tokens_per_second: float | None = None
    share_of_limit: float | None = None
    worst_error: float | None = None
    """Largest |ours - fair-esm's| of a mean over the spread of fair-esm's."""
    neighbours_kept: float | None = None
    runs: list[float] = field(default_factory=list)
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row as the table shows it."""
        return (
            self.model,
            self.name,
            self.dtype,
            f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else "",
            f"{self.share_of_limit:.1%}" if self.share_of_limit else "",
            "" if self.worst_error is None else f"{self.worst_error:.4f}",
            "" if self.neighbours_kept is None else f"{self.neighbours_kept:.3f}",
            self.note,
        )


class Bench:
    """One model, and what its measurements share."""

    def __init__(
        self, options: argparse.Namespace, name: str, proteins: list[Protein], add: Callable[[Row], None]
    ) -> None:
        self.options, self.name, self.proteins = options, name, proteins
        settings = ["input=.", f"model={name}", "model.weights=random", "dedupe=false"]
        self.config = compose_config([*settings, *self.device_settings])
        self.model = self.config.model
        self.device = choose_device(self.config.device, 0, 1, "this machine")
        self.dtype = choose_dtype(self.config.dtype, self.device)
        head_dim = architecture(self.model).head_dim
        products = quantized_products(self.config.dtype, self.config.fp8)
        self.kernels = choose_kernels(
            self.config.attention, self.config.linear, self.device, self.dtype, head_dim, products
        )
        self.precision = precision_of(self.dtype, self.kernels)
        self.limit: float | None = None
        """Tokens a second of the matrix products alone, once they are measured."""
        self._add = add

    @property
    def device_settings(self) -> tuple[str, ...]:
        """Return the overrides that choose the device and its kernels."""
        return tuple(
            f"{key}={getattr(self.options, key)}" for key in ("device", "dtype", "fp8", "attention", "linear")
        )

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        rates: Sequence[float] = (),
        means: Means | None = None,
        note: str = "",
        devices: int = 1,
    ) -> None:
        """Add a row: the tokens a second of its runs on so many devices, and how right its means are."""
        middle = statistics.median(rates) if rates else None
        distance = self.distance(means) if means else None
        self._add(
            Row(
                self.name,
                name,
                str(dtype).removeprefix("torch."),
                middle,
                middle / self.limit / devices if middle and self.limit else None,
                max(distance.errors) if distance else None,
                distance.neighbours_kept if distance else None,
                [round(rate, 1) for rate in rates],
                note,
            )
        )

    def distance(self, means: Means) -> Distance:
        """Return how far a contestant's means are from those of fair-esm's own model in fp32."""
        return measure([means[id_] for id_ in self.reference], list(self.reference.values()))

    @cached_property
    def reference(self) -> Means:
        """The means of fair-esm's own model in fp32."""
        return fair_esm(self.model, self.device, torch.float32)(self.checked())

    def checked(self) -> list[Protein]:
        """Return the first few proteins of the sample."""
        return self.sample(self.options.peer_tokens)[:NUM_CHECKED]

    def sample(self, max_tokens: int) -> list[Protein]:
        """Draw proteins of all lengths alike with a fixed seed, at most `max_tokens` tokens."""
        drawn: list[Protein] = []
        total = 0
        for index in np.random.default_rng(0).permutation(len(self.proteins)):
            total += self.proteins[index].num_tokens
            if total > max_tokens:
                break
            drawn.append(self.proteins[index])
        return drawn

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, part: str) -> None:
        """Measure one part, and give the memory back that it took."""
        error = as_value(PARTS[part], self)
        if isinstance(error, ImportError) and part in PEERS:
            self._add(Row(self.name, part, "", note=f"not run: {error}"))
        elif isinstance(error, Exception):
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            self._add(Row(self.name, part, "", note=f"{FAILED}{message}"))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def matrix_rate(bench: Bench) -> None:
    """Time the model's matrix products alone, a second each, and copies: the limit for everything else."""
    width, is_gpu = bench.model.embed_dim, bench.device.type == "cuda"
    num_rows = 25344 if is_gpu else 1024
    seconds = flops = 0.0
    for out_features, in_features in (
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
    ):
        x = torch.randn(num_rows, in_features, device=bench.device).to(bench.dtype)
        weight = torch.randn(out_features, in_features, device=bench.device).to(bench.dtype)
        seconds += per_call(bench, partial(F.linear, x, weight))
        flops += 2.0 * num_rows * out_features * in_features
    source = torch.randn((1 << 28) if is_gpu else (1 << 24), device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / per_call(bench, partial(target.copy_, source))
    note = f"{flops / seconds / 1e12:.3g} TFLOP/s at this model's shapes, copies {copied / 1e9:.3g} GB/s"
    bench.limit = num_rows / (seconds * bench.model.num_layers)
    bench.add("matrix rate", bench.dtype, [bench.limit], note=note)


def per_call(bench: Bench, work: Callable[[], object], least: float = 1.0) -> float:
    """Return the seconds of a call, over at least a second of calls."""
    work()
    bench.sync()
    num_calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        for _ in range(8):
            work()
        bench.sync()
        num_calls += 8
    return (time.perf_counter() - began) / num_calls


def kernel_loop(bench: Bench) -> None:
    """Time dist_esm without reading and writing."""
    engine = build_engine(bench.config, bench.device, bench.dtype, bench.kernels)
    engine.warm_up()
    checked = bench.checked()
    embeddings = engine.run(Pack(tuple(make_segments(checked))))
    means = {
        protein.id: embedding.sums[bench.model.num_layers] / len(protein.residues)
        for protein, embedding in zip(checked, embeddings, strict=True)
    }
    packs = make_packs(bench.sample(bench.options.loop_tokens), engine.toks_per_batch)
    timing = timed(
        partial(run_packs, engine, packs),
        bench.options.repeats,
        warm_up=partial(run_packs, engine, packs[:AHEAD]),
    )
    engine.close()
    tokens = [pack.num_tokens for pack in packs]
    note = f"{bench.kernels}, packs of {engine.toks_per_batch}"
    if len(packs) > 1:  # the last pack holds what is left
        note += f" filled to {statistics.mean(tokens[:-1]) / engine.toks_per_batch:.2%}"
    rates = [sum(tokens) / seconds for seconds in timing.runs_s]
    bench.add("kernel loop", bench.precision, rates, means, note)


def run_packs(engine: Engine, packs: Sequence[Pack]) -> None:
    """Run packs as the real run does, a few ahead."""
    ahead: deque[Submitted] = deque()
    for pack in packs:
        ahead.append(engine.submit(pack))
        if len(ahead) > AHEAD:
            ahead.popleft().result()
    for submitted in ahead:
        submitted.result()


def end_to_end(bench: Bench) -> None:
    """Time the real command for each number of files and each number of ranks."""
    with tempfile.TemporaryDirectory() as name:
        for num_files in bench.options.files:
            inputs = Path(name) / f"in{num_files}"
            inputs.mkdir()
            for index, share in enumerate(spread(bench.proteins, num_files, bench.options.uneven)):
                write_fasta(inputs / f"{index:04d}.fasta", as_records(share))
            for num_ranks in bench.options.ranks:
                rates, note = [], ""
                for repeat in range(bench.options.repeats):
                    output_dir = Path(name) / f"out{num_files}.{num_ranks}.{repeat}"
                    rate, note = time_command(bench, inputs, output_dir, num_ranks)
                    rates.append(rate)
                    note += f"; outputs {digest_of(output_dir)[:12]}"
                    shutil.rmtree(output_dir)
                files = f"{num_files} file{'s' if num_files > 1 else ''}"
                ranks = f" on {num_ranks} ranks" if num_ranks > 1 else ""
                bench.add(f"end to end, {files}{ranks}", bench.precision, rates, note=note, devices=num_ranks)


def residues(bench: Bench) -> None:
    """Time the real command with rows of residues: each format, dtype, number of files and folder.

    Beside each rate stand its share of the rate of means alone in the same folder, what was written a second,
    and what the folder's disk takes.
    """
    for folder in bench.options.folders:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            disk = statistics.median(disk_rates(Path(name), DISK_BYTES, bench.options.repeats))
            for num_files in bench.options.files:
                inputs = Path(name) / f"in{num_files}"
                inputs.mkdir()
                for index, share in enumerate(spread(bench.proteins, num_files, bench.options.uneven)):
                    write_fasta(inputs / f"{index:04d}.fasta", as_records(share))
                what = f"{num_files} file{'s' if num_files > 1 else ''} to {folder}"
                means = time_outputs(bench, inputs, Path(name) / "out", f"means, {what}", "include=[mean]")
                for kind in bench.options.formats:
                    for save_dtype in bench.options.save_dtypes:
                        settings = f"format={kind}", f"save_dtype={save_dtype}", "include=[mean,per_tok]"
                        label = f"residues, {kind} {save_dtype}, {what}"
                        time_outputs(
                            bench, inputs, Path(name) / "out", label, *settings, means=means, disk=disk
                        )


def time_outputs(
    bench: Bench,
    inputs: Path,
    output_dir: Path,
    label: str,
    *settings: str,
    means: float | None = None,
    disk: float | None = None,
) -> float:
    """Add a row for the real command under some settings, and return its tokens a second."""
    rates: list[float] = []
    note = ""
    for _ in range(bench.options.repeats):
        report = launch(bench, 1, inputs, output_dir, "model.weights=random", "dedupe=false", *settings)
        (rank,) = report["ranks"]
        rates.append(rank["tokens"] / report["embedding_seconds"])
        outputs = [output_dir / output for file in report["files"] for output in file["outputs"]]
        written = sum(map(size_of, outputs)) / report["embedding_seconds"]
        idle = rank.get("device_idle", rank["waited_for_input"] + rank["waited_for_output"])
        first_pack = rank["first_pack_at"] - (rank["ended_at"] - rank["seconds"])
        phases = ", ".join(f"{name} {report['phases'].get(name, 0):.2f} s" for name in ("waiting", "joining"))
        note = (
            f"idle {idle / rank['seconds']:.1%}, first pack after {first_pack:.2f} s, "
            f"waited for inputs {rank['waited_for_input']:.2f} s, "
            f"for outputs {rank['waited_for_output']:.2f} s, "
            f"last outputs {rank['write_seconds']:.2f} s, {phases}; "
            f"{written / 1e6:,.0f} MB/s; {rank['peak_memory_mib']:,.0f} MiB"
        )
        shutil.rmtree(output_dir)
    middle = statistics.median(rates)
    if means is not None and disk is not None:
        note = f"{middle / means:.0%} of means; {note}; disk {disk / 1e6:,.0f} MB/s"
    bench.add(label, bench.precision, rates, note=note)
    return middle


def spread(proteins: Sequence[Protein], num_files: int, uneven: bool) -> Iterator[Sequence[Protein]]:
    """Share proteins out to files: as many to each, or as log-normal weights of a fixed seed have it.

    The largest of 1,000 uneven files is about 9 times the mean, the smallest a fortieth of it.
    """
    if not uneven:
        yield from (share for index in range(num_files) if (share := proteins[index::num_files]))
        return
    weights = np.random.default_rng(1).lognormal(size=num_files)
    borders = np.rint(np.cumsum(weights) / weights.sum() * len(proteins)).astype(int).tolist()
    for first, last in zip([0, *borders], borders, strict=False):
        if first < last:
            yield proteins[first:last]


def digest_of(output_dir: Path) -> str:
    """Return the SHA-256 of all outputs and their names: one for the same bytes, whatever the ranks."""
    digest = sha256()
    for path in sorted(output_dir.rglob("*_ESM*")):
        digest.update(str(path.relative_to(output_dir)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def time_command(bench: Bench, inputs: Path, output_dir: Path, num_ranks: int) -> tuple[float, str]:
    """Return the tokens a second of one command, and in words where the rest of the time went."""
    launched = time.time()
    report = launch(bench, num_ranks, inputs, output_dir, "model.weights=random", "dedupe=false")
    took = time.time() - launched
    ranks = [rank for rank in report["ranks"] if rank["tokens"]]  # one file that is not cut is one rank's
    rate = sum(rank["tokens"] for rank in ranks) / report["embedding_seconds"]
    idle = max(
        rank.get("device_idle", rank["waited_for_input"] + rank["waited_for_output"]) / rank["seconds"]
        for rank in ranks
    )
    first = max(rank["first_pack_at"] for rank in ranks) - launched
    tail = max(rank["ended_at"] for rank in ranks) - min(rank["ended_at"] for rank in ranks)
    memory = max(rank["peak_memory_mib"] for rank in ranks)
    return rate, (
        f"idle {idle:.1%}; launch to first pack {first:.1f} s; whole command {took:.1f} s; "
        f"embedding {report['embedding_seconds']:.1f} s, tail {tail:.2f} s; {memory:,.0f} MiB a rank"
    )


def launch(bench: Bench, num_ranks: int, inputs: Path, output_dir: Path, *settings: str) -> dict[str, Any]:
    """Run the real command, and return its report.

    Raises
    ------
    RuntimeError
        If it fails; with the command's own message, which torchrun's lines come after.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m"]
    paths = f"input={inputs}", f"output_dir={output_dir}", f"model={bench.name}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *(torchrun if num_ranks > 1 else ()),
            "dist_esm",
            f"ranks={num_ranks}",
            *paths,
            *bench.device_settings,
            *settings,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if line.startswith("dist_esm: error:")), lines[-1]))
    return dict(json.loads((output_dir / "report.json").read_text(encoding="utf-8")))


def start(bench: Bench) -> None:
    """Time the way from launch to the first pack, with fp32 weights on disk in fair-esm's and Hugging Face's
    form."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        inputs = folder / "few.fasta"
        write_fasta(inputs, as_records(bench.proteins[:NUM_STARTED]))
        tensors = {name: tensor.cpu() for name, tensor in fair_esm_tensors(bench.model, bench.device)}
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        for writer in (write_fair_esm_checkpoint, write_hugging_face_directory):
            weights = f"model.weights={writer(tensors, bench, folder)}"
            for attempt in ("first", "again"):  # the first compiles, and brings every page to memory
                launched = time.time()
                output_dir = folder / f"{writer.__name__}_{attempt}"
                (rank,) = launch(bench, 1, inputs, output_dir, weights)["ranks"]
                seconds = rank["first_pack_at"] - launched
                note = (
                    f"launch to first pack {seconds:.1f} s: {size:.1f} GB of weights "
                    f"{rank['load_seconds']:.1f} s, kernels {rank['kernels_seconds']:.1f} s"
                )
                what = f"start, {writer.__name__.removeprefix('write_')}, {attempt}"
                bench.add(what, bench.precision, note=note)


def write_fair_esm_checkpoint(tensors: Mapping[str, torch.Tensor], bench: Bench, folder: Path) -> Path:
    """Write a checkpoint in fair-esm's format."""
    path = folder / f"{bench.name}.pt"
    settings = argparse.Namespace(arch="esm2", token_dropout=True)
    named = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"args": settings, "cfg": {"model": settings}, "model": named}, path)
    return path


HUGGING_FACE_NAMES = {
    "embed_tokens.": "embeddings.word_embeddings.",
    "emb_layer_norm_after.": "encoder.emb_layer_norm_after.",
    "layers.": "encoder.layer.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".self_attn.out_proj.": ".attention.output.dense.",
    ".self_attn.rot_emb.": ".attention.self.rotary_embeddings.",
    ".self_attn_layer_norm.": ".attention.LayerNorm.",
    ".final_layer_norm.": ".LayerNorm.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
}


def write_hugging_face_directory(tensors: Mapping[str, torch.Tensor], bench: Bench, folder: Path) -> Path:
    """Write the same weights as a directory of transformers' `EsmModel`."""
    from safetensors.torch import save_file

    path = folder / "hugging_face"
    path.mkdir()
    named = {}
    for name, tensor in tensors.items():
        for ours, theirs in HUGGING_FACE_NAMES.items():
            name = name.replace(ours, theirs)
        named[name] = tensor.contiguous()
    save_file(named, path / "model.safetensors")
    settings = {
        "model_type": "esm",
        "architectures": ["EsmModel"],
        "num_hidden_layers": bench.model.num_layers,
        "hidden_size": bench.model.embed_dim,
        "intermediate_size": 4 * bench.model.embed_dim,
        "num_attention_heads": bench.model.attention_heads,
        "vocab_size": len(tensors["embed_tokens.weight"]),
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
    }
    (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def peers(name: str, bench: Bench) -> None:
    """Time a peer over its sample."""
    sample = bench.sample(bench.options.peer_tokens)
    for peer in PEERS[name](bench.model, bench.device, bench.dtype):
        timing = timed(partial(peer.embed, sample), bench.options.repeats, sync=bench.sync)
        rates = [num_tokens(sample) / seconds for seconds in timing.runs_s]
        bench.add(peer.name, peer.dtype, rates, timing.answer, peer.note or f"{len(sample)} proteins")


PARTS: dict[str, Callable[[Bench], None]] = {
    "matrix": matrix_rate,
    "loop": kernel_loop,
    "end": end_to_end,
    "residues": residues,
    "start": start,
    **{name: partial(peers, name) for name in PEERS},
}


def main() -> int:
    """Measure what is asked for; return 1 if a part failed, else 0."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument(
        "--proteins", type=int, default=10_000, help="repeats the file under other ids if it has fewer"
    )
    parser.add_argument("--models", nargs="+", default=["esm2_t36_3B_UR50D", "esm2_t33_650M_UR50D"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fp8", default="all", help="with --dtype fp8")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--linear", default="auto")
    parser.add_argument("--peer-tokens", type=int, default=100_000)
    parser.add_argument("--loop-tokens", type=int, default=1_000_000)
    parser.add_argument(
        "--files",
        type=int,
        nargs="+",
        default=[1, 1000],
        help="end to end: files that the proteins are spread over",
    )
    parser.add_argument("--uneven", action="store_true", help="end to end: files of unlike sizes")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1],
        help="end to end: ranks, by torchrun if there are several",
    )
    parser.add_argument(
        "--folders",
        nargs="+",
        default=["/dev/shm", tempfile.gettempdir()],
        help="residues: where outputs go, memory and disk (%(default)s)",
    )
    formats, save_dtypes = ([each.name for each in names] for names in (Format, SaveDtype))
    parser.add_argument("--formats", nargs="+", default=formats, choices=formats, help="residues")
    parser.add_argument("--save-dtypes", nargs="+", default=save_dtypes, choices=save_dtypes, help="residues")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[part for part in PARTS if part != "residues"],
        choices=list(PARTS),
        help="all but residues by default",
    )
    options = parse_options(parser)
    results = begin()
    proteins = load_proteins(options.fasta, options.proteins)
    table, rows = Table("", HEADINGS), []

    def add(row: Row) -> None:
        rows.append(row)
        table.add(*row.cells())

    for name in options.models:
        bench = Bench(options, name, proteins, add)
        for part in options.only:
            began = time.monotonic()
            bench.measure(part)
            print(f"{name} {part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    results |= {"tokens": num_tokens(proteins), "rows": [asdict(row) for row in rows]}
    end(results, [table], options)
    return int(any(row.note.startswith(FAILED) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
