#!/usr/bin/env python3
"""This tool and its peers on the same proteins, in one run, with seeded random weights: tokens a second, and the share of what the device can do.

    scripts/bench.py --fasta proteins.fasta --models esm2_t33_650M_UR50D --json results.json

A token is a residue that is embedded (at most 1,022 of a protein), or its BOS or EOS; padding does not count. Rows:

matrix rate          the model's own matrix products alone, over random numbers, for as long as everything else runs
kernel loop          dist_esm, packs made beforehand: forward and pooling
end to end           the real command, from FASTA on disk to outputs on disk; `seconds` of the rank in its report, so without start and load
fair-esm             its extract loop as shipped, batches of 4,096 tokens, sorted by length (fp32, and the same with bf16 weights)
transformers         EsmModel, SDPA, batches of similar length
esm-efficient        packed, FlashAttention-2, where it is installed (without flash-attn, whose kernels torch has a copy of, it is given torch's)

Peers embed a sample of the proteins of at most --peer-tokens tokens. All numbers are medians of --repeats runs. Every contestant's means
of a few proteins are compared with fair-esm's own fp32 model; the worst cosine is in the table. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from esm.data import FastaBatchedDataset
from esm.model.esm2 import ESM2 as FairESM  # noqa: N811
from torch import Tensor, nn

from dist_esm.cli import compose_config
from dist_esm.config import ModelConfig
from dist_esm.fair_esm import ALPHABET
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.engine import AHEAD, Engine, build_engine
from dist_esm.model.esm2 import TOKEN_DROPOUT_FACTOR
from dist_esm.model.kernels.choose import choose_device, choose_dtype, choose_kernels
from dist_esm.model.weights import architecture, fair_esm_tensors
from dist_esm.pipeline.packer import Packer
from dist_esm.types import Pack, Segment

RESIDUES = 1022
CHECKED = 4
"""Proteins whose means are compared."""


@dataclass
class Row:
    """One line of the table."""

    model: str
    name: str
    dtype: str
    tokens_per_second: float | None = None
    share_of_limit: float | None = None
    worst_cosine: float | None = None
    runs: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Protein:
    """An id and its residues, truncated."""

    id: str
    residues: str

    @property
    def tokens(self) -> int:
        """With BOS and EOS."""
        return len(self.residues) + 2


Run = Callable[[Sequence[Protein]], dict[str, np.ndarray]]
"""Embeds proteins: id to mean, shape (D,)."""


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fasta", type=Path, required=True)
    parser.add_argument(
        "--proteins", type=int, default=10_000, help="repeats the file under other ids if it has fewer"
    )
    parser.add_argument("--models", nargs="+", default=["esm2_t36_3B_UR50D", "esm2_t33_650M_UR50D"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-tokens", type=int, default=100_000)
    parser.add_argument("--loop-tokens", type=int, default=1_000_000)
    parser.add_argument(
        "--files",
        type=int,
        nargs="+",
        default=[1, 1000],
        help="end to end: files that the proteins are spread over",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1],
        help="end to end: ranks, by torchrun if there are several",
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    proteins = read(options.fasta, options.proteins)
    rows: list[Row] = []
    for name in options.models:
        for part in options.only:
            began, num_rows = time.monotonic(), len(rows)
            bench = Bench(options, name, proteins, rows)
            try:
                PARTS[part](bench)
            except Exception as error:
                rows.append(
                    Row(
                        name,
                        part,
                        "",
                        note=f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    )
                )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            for row in rows[num_rows:]:
                rate = f"{row.tokens_per_second:,.0f} tokens/s " if row.tokens_per_second else ""
                print(f"{name} {row.name}: {rate}{row.note}", file=sys.stderr, flush=True)
            print(f"{name} {part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    result = {
        "command": " ".join(sys.argv),
        "environment": environment(),
        "tokens": sum(p.tokens for p in proteins),
        "rows": [asdict(row) for row in rows],
    }
    print(table(rows, result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


class Bench:
    """One model, and what its parts share."""

    def __init__(
        self, options: argparse.Namespace, name: str, proteins: list[Protein], rows: list[Row]
    ) -> None:
        self.options, self.name, self.proteins, self.rows = options, name, proteins, rows
        self.config = compose_config(
            [
                "input=.",
                f"model={name}",
                "model.weights=random",
                f"device={options.device}",
                f"dtype={options.dtype}",
                "dedupe=false",
            ]
        )
        self.device = choose_device(self.config.device, 0, 1, "this machine")
        self.dtype = choose_dtype(self.config.dtype, self.device)
        self.layer = self.config.model.num_layers
        self.kernels = choose_kernels(
            self.config.attention,
            self.config.linear,
            self.device,
            self.dtype,
            architecture(self.config.model).head_dim,
        )

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        rates: Sequence[float],
        means: dict[str, np.ndarray] | None = None,
        note: str = "",
        devices: int = 1,
    ) -> None:
        """A row from the rates of its runs on so many devices."""
        middle = statistics.median(rates)
        limit = next(
            (
                row.tokens_per_second
                for row in self.rows
                if row.model == self.name and row.name == "matrix rate"
            ),
            None,
        )
        cosine = self.worst_cosine(means) if means else None
        runs = [round(rate, 1) for rate in rates]
        self.rows.append(
            Row(
                self.name,
                name,
                str(dtype).removeprefix("torch."),
                middle,
                middle / limit / devices if limit else None,
                cosine,
                runs,
                note,
            )
        )

    def worst_cosine(self, means: dict[str, np.ndarray]) -> float:
        """Of a contestant's means with those of fair-esm's own model in fp32."""
        reference = REFERENCE.get(self.name)
        if reference is None:
            model = fair_esm(self, torch.float32)
            reference = REFERENCE[self.name] = fair_esm_run(self, model)(self.checked())
        return min(
            float(
                F.cosine_similarity(
                    torch.from_numpy(means[id_]).double(), torch.from_numpy(reference[id_]).double(), 0
                )
            )
            for id_ in reference
        )

    def checked(self) -> list[Protein]:
        """The first few proteins of the sample."""
        return self.sample(self.options.peer_tokens)[:CHECKED]

    def sample(self, num_tokens: int) -> list[Protein]:
        """Proteins of all lengths alike, drawn with a fixed seed."""
        order = np.random.default_rng(0).permutation(len(self.proteins))
        chosen, total = [], 0
        for index in order:
            if total + self.proteins[index].tokens > num_tokens:
                break
            chosen.append(self.proteins[index])
            total += self.proteins[index].tokens
        return chosen

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Run, dtype: torch.dtype, name: str, note: str = "") -> None:
        """Warm up, time a peer over its sample, and add its row."""
        sample = self.sample(self.options.peer_tokens)
        means = run(sample)
        rates = []
        for _ in range(self.options.repeats):
            self.sync()
            began = time.monotonic()
            run(sample)
            self.sync()
            rates.append(sum(p.tokens for p in sample) / (time.monotonic() - began))
        self.add(name, dtype, rates, means, note or f"{len(sample)} proteins")


REFERENCE: dict[str, dict[str, np.ndarray]] = {}


def matrix_rate(bench: Bench) -> None:
    """The model's matrix products alone, a second each, and the device's copy rate: the limit for everything else."""
    width, layers = bench.config.model.embed_dim, bench.config.model.num_layers
    num_rows = 25344 if bench.device.type == "cuda" else 1024
    seconds = 0.0
    flops = 0.0
    for out_features, in_features in (
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
    ):
        x = torch.randn(num_rows, in_features, device=bench.device).to(bench.dtype)
        weight = torch.randn(out_features, in_features, device=bench.device).to(bench.dtype)
        seconds += per_call(bench, lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
        flops += 2.0 * num_rows * out_features * in_features
    source = torch.randn((1 << 28) if bench.device.type == "cuda" else (1 << 24), device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / per_call(bench, lambda: target.copy_(source))
    note = f"{flops / seconds / 1e12:.1f} TFLOP/s at this model's shapes, copies {copied / 1e9:.0f} GB/s"
    bench.add("matrix rate", bench.dtype, [num_rows / (seconds * layers)], note=note)


def per_call(bench: Bench, work: Callable[[], object], least: float = 1.0) -> float:
    """Seconds of a call, over at least a second of them."""
    work()
    bench.sync()
    num_calls, began = 0, time.monotonic()
    while time.monotonic() - began < least:
        for _ in range(8):
            work()
        bench.sync()
        num_calls += 8
    return (time.monotonic() - began) / num_calls


def kernel_loop(bench: Bench) -> None:
    """dist_esm without reading and writing."""
    engine = build_engine(bench.config, bench.device, bench.dtype, bench.kernels)
    engine.warm_up()
    checked = bench.checked()
    answers = engine.run(Pack(tuple(segments(checked))))
    means = {
        one.id: answer.sums[bench.layer] / len(one.residues)
        for one, answer in zip(checked, answers, strict=True)
    }
    packer = Packer(engine.toks_per_batch)
    chosen = bench.sample(bench.options.loop_tokens)
    packs = [pack for segment in segments(chosen) for pack in packer.add(segment)] + list(packer.flush())
    loop(engine, packs[:AHEAD])
    rates = []
    for _ in range(bench.options.repeats):
        began = time.monotonic()
        loop(engine, packs)
        rates.append(sum(pack.num_tokens for pack in packs) / (time.monotonic() - began))
    engine.close()
    filled = sum(pack.num_tokens for pack in packs[:-1]) / (engine.toks_per_batch * max(1, len(packs) - 1))
    full = f" filled to {filled:.2%}" if len(packs) > 1 else ""
    bench.add(
        "kernel loop", bench.dtype, rates, means, f"{bench.kernels}, packs of {engine.toks_per_batch}{full}"
    )


def segments(proteins: Sequence[Protein]) -> Iterator[Segment]:
    """What the engine is given for proteins."""
    for number, one in enumerate(proteins):
        yield Segment(number, 0, tokenize(one.residues.encode()), (0, len(one.residues)))


def loop(engine: Engine, packs: Sequence[Pack]) -> None:
    """Run packs as the real run does, a few ahead."""
    ahead: deque[Any] = deque()
    for pack in packs:
        ahead.append(engine.submit(pack))
        if len(ahead) > AHEAD:
            ahead.popleft().result()
    for submitted in ahead:
        submitted.result()


def end_to_end(bench: Bench) -> None:
    """The real command, with all proteins in one file and in a thousand."""
    with tempfile.TemporaryDirectory() as folder:
        for num_files in bench.options.files:
            inputs = Path(folder) / f"in{num_files}"
            inputs.mkdir()
            for number in range(num_files):
                share = bench.proteins[number::num_files]
                if share:
                    (inputs / f"{number:04d}.fasta").write_text(
                        "".join(f">{one.id}\n{one.residues}\n" for one in share)
                    )
            for num_ranks in bench.options.ranks:
                rates, note = [], ""
                for repeat in range(bench.options.repeats):
                    out = Path(folder) / f"out{num_files}.{num_ranks}.{repeat}"
                    launched = time.time()
                    report = launch(
                        bench,
                        num_ranks,
                        f"input={inputs}",
                        f"output_dir={out}",
                        "model.weights=random",
                        "dedupe=false",
                    )
                    ranks = [rank for rank in report["ranks"] if rank["tokens"]]  # one file may be left whole
                    rates.append(sum(rank["tokens"] for rank in ranks) / report["embedding_seconds"])
                    waited = [
                        rank.get("device_idle", rank["waited_for_input"] + rank["waited_for_output"])
                        / rank["seconds"]
                        for rank in ranks
                    ]
                    first = max(rank["first_pack_at"] for rank in ranks) - launched
                    note = f"idle {max(waited):.1%}; launch to first pack {first:.1f} s; whole command {time.time() - launched:.1f} s"
                on = f" on {num_ranks} ranks" if num_ranks > 1 else ""
                bench.add(
                    f"end to end, {num_files} file{'s' if num_files > 1 else ''}{on}",
                    bench.dtype,
                    rates,
                    note=note,
                    devices=num_ranks,
                )


def launch(bench: Bench, num_ranks: int, *settings: str) -> dict[str, Any]:
    """Run the real command and return its report."""
    torchrun = (
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m"]
        if num_ranks > 1
        else []
    )
    devices = (f"model={bench.name}", f"device={bench.options.device}", f"dtype={bench.options.dtype}")
    result = subprocess.run(
        [sys.executable, "-m", *torchrun, "dist_esm", *settings, *devices],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise RuntimeError(
            next((line for line in lines if line.startswith("dist_esm: error:")), lines[-1])
        )  # torchrun's own come last
    (output_dir,) = (
        setting.removeprefix("output_dir=") for setting in settings if setting.startswith("output_dir=")
    )
    report: dict[str, Any] = json.loads((Path(output_dir) / "report.json").read_text())
    return report


def start(bench: Bench) -> None:
    """From launch to the first pack with a checkpoint on disk, in fair-esm's format and in fp32, its pages in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{bench.name}.pt"
        tensors = {
            f"encoder.sentence_encoder.{name}": tensor.cpu()
            for name, tensor in fair_esm_tensors(bench.config.model, bench.device)
        }
        settings = argparse.Namespace(arch="esm2", token_dropout=True)
        torch.save({"args": settings, "cfg": {"model": settings}, "model": tensors}, path)
        num_bytes = path.stat().st_size
        del tensors
        fasta = Path(folder) / "few.fasta"
        fasta.write_text("".join(f">{one.id}\n{one.residues}\n" for one in bench.proteins[:50]))
        for run in range(2):  # the first compiles, and brings every page to memory
            launched = time.time()
            (rank,) = launch(
                bench,
                1,
                f"input={fasta}",
                f"output_dir={Path(folder) / f'out{run}'}",
                f"model.weights={path}",
            )["ranks"]
            first = rank["first_pack_at"] - launched
            loading = f"checkpoint of {num_bytes / 1e9:.1f} GB {rank['load_seconds']:.1f} s, kernels {rank['kernels_seconds']:.1f} s"
            note = f"launch to first pack {first:.1f} s: {loading}"
            bench.rows.append(
                Row(
                    bench.name,
                    ("start, first", "start, again")[run],
                    str(bench.dtype).removeprefix("torch."),
                    note=note,
                )
            )


def fair_esm(bench: Bench, dtype: torch.dtype) -> nn.Module:
    """fair-esm's own model as it is shipped, LM head and all, with our weights."""
    config = bench.config.model
    with torch.device(bench.device):
        model: nn.Module = FairESM(
            config.num_layers, config.embed_dim, config.attention_heads, ALPHABET, token_dropout=True
        )
    with torch.no_grad():
        own = model.state_dict(keep_vars=True)
        for name, tensor in fair_esm_tensors(config, bench.device):
            own[name].copy_(tensor)
    return model.to(dtype).eval()


def fair_esm_run(bench: Bench, model: nn.Module) -> Run:
    """The steps of fair-esm's extract script: sorted batches of 4,096 tokens, padded, all of a layer copied to the host, means there."""

    @torch.inference_mode()
    def run(proteins: Sequence[Protein]) -> dict[str, np.ndarray]:
        dataset = FastaBatchedDataset([one.id for one in proteins], [one.residues for one in proteins])
        batches = dataset.get_batch_indices(4096, extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(
            dataset, collate_fn=ALPHABET.get_batch_converter(RESIDUES), batch_sampler=batches
        )
        means = {}
        for labels, texts, tokens in loader:
            hidden = model(
                tokens.to(bench.device, non_blocking=True), repr_layers=[bench.layer], return_contacts=False
            )["representations"][bench.layer].cpu()
            for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
                means[label] = hidden[row, 1 : min(RESIDUES, len(text)) + 1].float().mean(0).numpy()
        return means

    return run


def peer_fair_esm(bench: Bench) -> None:
    """fair-esm in fp32, and in bf16 where the device has it."""
    has_bf16 = bench.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_bf16]:
        bench.timed(fair_esm_run(bench, fair_esm(bench, dtype)), dtype, "fair-esm")


def transformers_name(name: str) -> str:
    """The name that transformers gives to a tensor of fair-esm's."""
    if name == "embed_tokens.weight":
        return "embeddings.word_embeddings.weight"
    if name.startswith("emb_layer_norm_after"):
        return f"encoder.{name}"
    _, number, rest = name.split(".", 2)
    inner = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn.rot_emb": "attention.self.rotary_embeddings",
        "self_attn_layer_norm": "attention.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "LayerNorm",
    }
    module, _, part = rest.rpartition(".")
    return f"encoder.layer.{number}.{inner[module]}.{part}"


def peer_transformers(bench: Bench) -> None:
    """Hugging Face's EsmModel."""
    from transformers import EsmConfig, EsmModel

    model_config: ModelConfig = bench.config.model
    settings = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=model_config.embed_dim,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.attention_heads,
        intermediate_size=4 * model_config.embed_dim,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )
    settings._attn_implementation = "sdpa"
    with torch.device(bench.device):
        model = EsmModel(settings, add_pooling_layer=False)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in fair_esm_tensors(model_config, bench.device):
            if transformers_name(name) in own or not name.endswith("inv_freq"):
                own[transformers_name(name)].copy_(tensor)
    model = model.to(bench.dtype).eval()
    budget = 16384 if bench.device.type == "cuda" else 2048

    @torch.inference_mode()
    def run(proteins: Sequence[Protein]) -> dict[str, np.ndarray]:
        means: dict[str, np.ndarray] = {}
        batch: list[Protein] = []
        for one in (*sorted(proteins, key=lambda one: one.tokens), None):
            if batch and (one is None or one.tokens * (len(batch) + 1) > budget):
                longest = batch[-1].tokens
                tokens = torch.full((len(batch), longest), 1)
                for row, each in enumerate(batch):
                    tokens[row, : each.tokens] = torch.from_numpy(tokenize(each.residues.encode()))
                mask = tokens.ne(1)
                hidden = model(
                    tokens.to(bench.device), attention_mask=mask.to(bench.device)
                ).last_hidden_state
                inner = mask.clone()
                inner[:, 0] = False
                for row, each in enumerate(batch):
                    inner[row, each.tokens - 1] = False
                weights = inner.to(bench.device).unsqueeze(-1)
                pooled: Tensor = (hidden.float() * weights).sum(1) / weights.sum(1)
                means |= dict(zip((each.id for each in batch), pooled.cpu().numpy(), strict=True))
                batch = []
            if one is not None:
                batch.append(one)
        return means

    bench.timed(run, bench.dtype, "transformers", f"EsmModel {version('transformers')}, SDPA")


def esm_efficient_name(name: str) -> str:
    """The name that esm-efficient gives to a tensor of fair-esm's."""
    for ours, theirs in (
        ("self_attn_layer_norm", "self_attn.norm"),
        ("_proj", ""),
        ("final_layer_norm", "final.0"),
        ("fc1", "final.1"),
        ("fc2", "final.3"),
    ):
        name = name.replace(ours, theirs)
    return name


def flash_attention_2() -> str:
    """Whose FlashAttention-2 esm-efficient calls: flash-attn's, or where that is not installed torch's copy of it, which is put in its place."""
    with suppress(PackageNotFoundError):
        return f"flash-attn {version('flash-attn')}"
    from torch.nn.attention.varlen import varlen_attn

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        causal: bool,
    ) -> Any:
        assert dropout_p == 0
        assert not causal
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    package, unused = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        __spec__=ModuleSpec("flash_attn", None), flash_attn_varlen_func=flash_attn_varlen_func
    )
    vars(unused).update(pad_input=None, unpad_input=None)
    sys.modules |= {package.__name__: package, unused.__name__: unused}
    return "FlashAttention-2 of torch"


def peer_esm_efficient(bench: Bench) -> None:
    """esm-efficient, where it is installed."""
    try:
        found, attention = version("esm-efficient"), flash_attention_2()
        from esme import ESM2 as Esme  # noqa: N811
    except (PackageNotFoundError, ImportError) as error:
        bench.rows.append(Row(bench.name, "esm-efficient", "", note=f"not run: {error}"))
        return
    config = bench.config.model
    with torch.device(bench.device):
        model = Esme(config.num_layers, config.embed_dim, config.attention_heads, dtype=torch.bfloat16)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in fair_esm_tensors(config, bench.device):
            if esm_efficient_name(name) in own or not name.endswith("inv_freq"):
                own[esm_efficient_name(name)].copy_(
                    tensor * TOKEN_DROPOUT_FACTOR if name == "embed_tokens.weight" else tensor
                )
    model = model.eval()

    @torch.inference_mode()
    def run(proteins: Sequence[Protein]) -> dict[str, np.ndarray]:
        means: dict[str, np.ndarray] = {}
        packer = Packer(16384)
        packs = [pack for segment in segments(proteins) for pack in packer.add(segment)] + list(
            packer.flush()
        )
        for pack in packs:
            bounds = np.cumsum([0, *(len(segment.tokens) for segment in pack.segments)])
            tokens = (
                torch.from_numpy(np.concatenate([segment.tokens for segment in pack.segments]))
                .long()
                .to(bench.device)
            )
            lengths = torch.from_numpy(bounds).int().to(bench.device)
            hidden = model.forward_representation(tokens, (lengths, int(np.diff(bounds).max())))
            means |= {
                proteins[segment.protein].id: hidden[first + 1 : stop - 1].float().mean(0).cpu().numpy()
                for segment, first, stop in zip(pack.segments, bounds, bounds[1:], strict=False)
            }
        return means

    bench.timed(run, torch.bfloat16, "esm-efficient", f"{found}, packed, {attention}")


PARTS: dict[str, Callable[[Bench], None]] = {
    "matrix": matrix_rate,
    "loop": kernel_loop,
    "end": end_to_end,
    "start": start,
    "fair-esm": peer_fair_esm,
    "transformers": peer_transformers,
    "esm-efficient": peer_esm_efficient,
}


def read(path: Path, number: int) -> list[Protein]:
    """Proteins of a FASTA file, truncated; the file again under other ids until there are so many."""
    dataset = FastaBatchedDataset.from_file(path)
    texts = [text[:RESIDUES] for text in dataset.sequence_strs]
    return [Protein(f"p{index}", texts[index % len(texts)]) for index in range(number)]


def environment() -> dict[str, Any]:
    """What the numbers were taken on."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
    }
    for name in (
        "dist_esm",
        "torch",
        "triton",
        "fair-esm",
        "transformers",
        "quack-kernels",
        "nvidia-cutlass-dsl",
        "esm-efficient",
    ):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    found["commit"] = commit.stdout.strip() or None
    found["cpu"] = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return found


def table(rows: Sequence[Row], result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in result["environment"].items() if value),
        result["command"],
    ]
    head = ("model", "what", "dtype", "tokens/s", "of limit", "worst cosine", "")
    body = [
        (
            row.model,
            row.name,
            row.dtype,
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "",
            f"{row.share_of_limit:.1%}" if row.share_of_limit else "",
            f"{row.worst_cosine:.7f}" if row.worst_cosine else "",
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(6)]
    for line in (head, *body):
        cells = [
            f"{cell:>{width}}" if 3 <= column <= 5 else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        lines.append("  ".join((*cells, line[6])).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
