#!/usr/bin/env python3
"""How fast FASTA becomes packs of tokens, and how much memory that takes, on this machine's CPU; no model runs.

What is measured:

tokens
    `dist_esm.fasta.tokens.tokenize` and fair-esm's `Alphabet.encode` with BOS and EOS put around it, on random proteins of 350 residues.
    The tokens are compared first. Aim: 100 times fair-esm on one core.
count
    `dist_esm.fasta.blocks.count`, which finds records, residues, the attention's work and lines, and Biopython's two parsers, which sum up
    records and residues, on one generated plain FASTA file (lines of 60, headers like UniRef's). Reading the file and doing
    nothing is the bound. All of them must find the same numbers. Aim: 10 times `SeqIO.parse`.
read
    `read_proteins`, then `tokenize`, then `Packer`: what has to be done for each residue before a device can have it; and the same
    as a rank does it, in the `Reader` thread, with its announcements and the digests for identical sequences. One GPU takes about
    400,000 tokens a second of a model of 650M parameters.
memory
    The whole run (cutting, counting, plan, reader, packer, collector, writers, report) with an engine that answers at once with D
    numbers, over generated files of N records, N/10 and N/100: distinct sequences in plain text; the same in ordinary gzip, which
    is streamed and not cut; and records drawn from 1,000 sequences, so that identical ones are embedded once. What grows from
    N/10 to N grows with the file. Every record must come out, or the measurement fails.

How: each measurement is a process of its own, on one thread where it is a timing. Files are generated first, untimed, in a temporary
directory, and are in the page cache when they are read. Timings are medians of repeated runs after one that is thrown away. Memory is
the process's peak resident set (VmHWM); `base` is what it was after the imports. MB are 10^6 bytes, MiB 2^20.

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PARTS = ("tokens", "count", "read", "memory")
LETTERS = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
LENGTH = 350
"""Residues of a protein where speed is measured."""
SHORT = 60
"""Mean residues of a protein where memory is measured."""
NUM_DISTINCT = 1000
GPU_TOKENS_PER_SECOND = 400_000
CHUNK = 20_000


# Generated inputs.


def random_proteins(num: int, mean: int, seed: int) -> Iterator[bytes]:
    """Random sequences of `mean` residues, give or take half."""
    rng = np.random.default_rng(seed)
    for first in range(0, num, CHUNK):
        lengths = rng.integers(mean // 2, mean + mean // 2 + 1, size=min(CHUNK, num - first))
        text = LETTERS[rng.integers(0, len(LETTERS), size=int(lengths.sum()), dtype=np.uint8)].tobytes()
        stop = 0
        for length in lengths.tolist():
            start, stop = stop, stop + length
            yield text[start:stop]


def write_fasta(path: Path, proteins: Iterator[bytes], width: int = 60) -> int:
    """Write plain FASTA, or gzip if the name ends so; returns the bytes of text."""
    num_bytes = 0
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else open(path, "wb") as file:
        for number, protein in enumerate(proteins):
            lines = b"\n".join(protein[start : start + width] for start in range(0, len(protein), width))
            num_bytes += file.write(
                b">UniRef50_%08d Uncharacterized protein n=%d Tax=root TaxID=1\n%b\n"
                % (number, number % 97, lines)
            )
    return num_bytes


# Timing and memory.


def peak_mib() -> float:
    """Peak resident set of this process. Not `ru_maxrss` where there is /proc: that one starts at the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1 << 20 if sys.platform == "darwin" else 1024
        )


def timed(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of each of `repeats` runs after one that is thrown away, their median, and what the work returned."""
    answer = work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return {"median_s": statistics.median(seconds), "runs_s": seconds, "answer": answer}


# What the child processes do. Each imports only what it needs, so that its memory is its own.


def child_tokens(repeats: int) -> dict[str, Any]:
    """Both tokenizers on the same proteins."""
    from esm.data import Alphabet

    from dist_esm.fasta.tokens import tokenize

    alphabet = Alphabet.from_architecture("ESM-1b")
    rng = np.random.default_rng(0)
    proteins = [LETTERS[rng.integers(0, 20, size=LENGTH)].tobytes() for _ in range(20_000)]
    texts = [protein.decode() for protein in proteins]

    def ours() -> None:
        for protein in proteins:
            tokenize(protein)

    num_theirs = 300

    def theirs() -> None:
        for text in texts[:num_theirs]:
            _ = [alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx]

    for protein, text in zip(proteins[:100], texts[:100], strict=True):
        assert tokenize(protein).tolist() == [alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx], (
            text
        )
    mine, esm = timed(ours, repeats), timed(theirs, repeats)
    rates = {
        "dist_esm_per_s": len(proteins) / mine["median_s"],
        "fair_esm_per_s": num_theirs / esm["median_s"],
    }
    return {**rates, "ratio": rates["dist_esm_per_s"] / rates["fair_esm_per_s"]}


def child_count(path: str, how: str, repeats: int) -> dict[str, Any]:
    """One way to count one file."""
    work: Callable[[], Any]
    if how == "dist_esm":
        from dist_esm.fasta.blocks import whole_file
        from dist_esm.fasta.slices import count_records

        def work() -> tuple[int, int]:
            found = count_records(whole_file(Path(path)), 1022)
            return found.sequences, found.residues

    elif how == "SimpleFastaParser":
        from Bio.SeqIO.FastaIO import SimpleFastaParser

        def work() -> tuple[int, int]:
            sequences = residues = 0
            with open(path) as file:
                for _, letters in SimpleFastaParser(file):
                    sequences += 1
                    residues += len(letters)
            return sequences, residues

    elif how == "SeqIO.parse":
        from Bio import SeqIO

        def work() -> tuple[int, int]:
            sequences = residues = 0
            for record in SeqIO.parse(path, "fasta"):
                sequences += 1
                residues += len(record)
            return sequences, residues

    else:

        def work() -> None:
            with open(path, "rb") as file:
                while file.read(1 << 20):
                    pass

    base = peak_mib()
    result = timed(work, repeats)
    return {
        **result,
        "base_mib": base,
        "peak_mib": peak_mib(),
        "mb_per_s": os.path.getsize(path) / 1e6 / result["median_s"],
    }


def child_read(path: str, how: str, repeats: int, toks_per_batch: int) -> dict[str, Any]:
    """One file to packs, by hand or in the reader thread."""
    from dist_esm.config import Config, ModelConfig
    from dist_esm.fasta.parser import read_proteins
    from dist_esm.fasta.tokens import tokenize
    from dist_esm.pipeline.failures import Failures
    from dist_esm.pipeline.packer import Packer
    from dist_esm.pipeline.reader import Reader
    from dist_esm.planning.inputs import find_files
    from dist_esm.planning.units import count_slice, cut_files, make_units
    from dist_esm.stop import Stop
    from dist_esm.types import Segment

    class Nobody:
        """A collector that takes every message and does nothing."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    config = Config(input=path, model=ModelConfig("none", 33, 1280, 20))
    files = find_files([path])
    counted = [
        (number, *pair, None)
        for number, piece, _ in cut_files(files, 1)
        for pair in count_slice(piece, 1022, 1 << 62, False)[0]
    ]
    units = make_units(counted, 1 << 62)
    expected = sum(unit.count.residues for unit in units)

    def parse() -> int:
        return sum(len(protein.residues) for protein in read_proteins(units[0], config))

    def by_hand() -> int:
        packer, num_tokens = Packer(toks_per_batch), 0
        for protein_index, protein in enumerate(read_proteins(units[0], config)):
            segment = Segment(protein_index, 0, tokenize(protein.residues), (0, len(protein.residues)))
            num_tokens += sum(pack.num_tokens for pack in packer.add(segment))
        num_tokens += sum(pack.num_tokens for pack in packer.flush())
        return num_tokens - 2 * units[0].count.sequences

    def in_thread() -> int:
        stop = Stop()
        reader = Reader(units, files, config, toks_per_batch, Nobody(), Failures(units, 1, 0, stop), stop)  # type: ignore[arg-type]
        reader.start()
        num_tokens = 0
        while (pack := reader.packs.get()) is not None:
            num_tokens += pack.num_tokens
        reader.join()
        if reader.crash is not None:
            raise reader.crash
        return num_tokens - 2 * units[0].count.sequences

    base = peak_mib()
    result = timed({"read_proteins": parse, "to packs": by_hand, "Reader": in_thread}[how], repeats)
    assert result["answer"] == expected, f"{how}: {result['answer']} residues of {expected}"
    return {
        **result,
        "base_mib": base,
        "peak_mib": peak_mib(),
        "residues_per_s": expected / result["median_s"],
    }


def child_memory(path: str, output_dir: str, width: int, expected: int) -> dict[str, Any]:
    """The whole run over one file with a stand-in engine."""
    from dist_esm.config import Config, DeviceKind, ModelConfig
    from dist_esm.distributed import World
    from dist_esm.types import Pack, SegmentEmbedding

    class Instant:
        """Answers at once, and each segment with numbers of its own."""

        toks_per_batch = 16384
        num_threads = 2
        is_gpu = False
        num_segments = 0

        def __init__(self) -> None:
            self.startup: dict[str, float] = {}

        def submit(self, pack: Pack) -> Any:
            return SimpleNamespace(result=partial(self.run, pack))

        def run(self, pack: Pack) -> list[SegmentEmbedding]:
            self.num_segments += len(pack.segments)
            bos = np.zeros(width, dtype=np.float32)
            return [
                SegmentEmbedding({6: np.full(width, segment.protein, dtype=np.float32)}, {6: bos}, {})
                for segment in pack.segments
            ]

        def free_memory(self) -> None: ...

        def close(self) -> None: ...

    engine = Instant()
    whole_run: Any = import_module("dist_esm.jobs.embed")
    plan_agreed: dict[str, float] = {}
    agree_on_plan = whole_run.agree_on_plan

    def plan(*args: Any) -> Any:
        agreed = agree_on_plan(*args)
        plan_agreed.update(
            plan_s=time.perf_counter() - began, plan_peak_mib=peak_mib(), units=len(agreed.units)
        )
        return agreed

    whole_run.load_engine = lambda *_: engine
    whole_run.agree_on_plan = plan
    logging.getLogger("dist_esm").setLevel(logging.ERROR)
    model = ModelConfig(
        "esm2_t6_8M_UR50D", num_layers=6, embed_dim=width, attention_heads=1, weights="random"
    )
    config = Config(input=path, output_dir=Path(output_dir), model=model, device=DeviceKind.cpu)
    base, began = peak_mib(), time.perf_counter()
    exit_code = whole_run.run(config, World(None, 0, 1, 0, 1))
    seconds = time.perf_counter() - began
    report = json.loads((Path(output_dir) / "report.json").read_text())
    found = report["records"]["ok"]
    assert exit_code == 0, f"exit code {exit_code}"
    assert found == expected, f"{found} records of {expected}"
    deduplicated = report["records"]["deduplicated"]
    assert deduplicated + engine.num_segments == expected, (
        f"{deduplicated} deduplicated and {engine.num_segments} embedded of {expected}"
    )
    outputs = len(list(Path(output_dir).glob("*.pt")))
    return {
        "seconds": seconds,
        "base_mib": base,
        "peak_mib": peak_mib(),
        **plan_agreed,
        "outputs": outputs,
        "deduplicated": deduplicated,
    }


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "tokens": child_tokens,
    "count": child_count,
    "read": child_read,
    "memory": child_memory,
}


def in_child(name: str, **kwargs: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, json.dumps(kwargs)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} {kwargs} failed, see above\n{done.stdout}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# The parent: generates, starts children, prints.


def bench_tokens(repeats: int) -> dict[str, Any]:
    """The table of the two tokenizers."""
    result = in_child("tokens", repeats=repeats)
    print(f"tokens: proteins of {LENGTH} residues, one core")
    print(f"  {'dist_esm tokenize':28} {result['dist_esm_per_s']:12,.0f} sequences/s")
    print(f"  {'fair-esm Alphabet.encode':28} {result['fair_esm_per_s']:12,.0f} sequences/s")
    print(f"  {'ratio':28} {result['ratio']:12,.0f} x (aim 100)\n", flush=True)
    return result


def bench_count(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """The table of ways to count."""
    path = folder / "count.fasta"
    num_bytes = write_fasta(path, random_proteins(megabytes * 1_000_000 // (LENGTH + 78), LENGTH, seed=1))
    print(f"count: a plain FASTA file of {num_bytes / 1e6:.0f} MB, proteins of {LENGTH} residues on average")
    found: dict[str, Any] = {"bytes": num_bytes}
    for how in ("read only", "dist_esm", "SimpleFastaParser", "SeqIO.parse"):
        result = found[how] = in_child(
            "count",
            path=str(path),
            how=how,
            repeats=repeats if how in ("read only", "dist_esm") else max(3, repeats // 2),
        )
        print(
            f"  {how:28} {result['mb_per_s']:12,.0f} MB/s   peak {result['peak_mib']:6.0f} MiB, base {result['base_mib']:6.0f}",
            flush=True,
        )
    answers = {json.dumps(found[how]["answer"]) for how in ("dist_esm", "SimpleFastaParser", "SeqIO.parse")}
    assert len(answers) == 1, f"the counts differ: {answers}"
    for how in ("SeqIO.parse", "SimpleFastaParser"):
        found[f"ratio to {how}"] = found["dist_esm"]["mb_per_s"] / found[how]["mb_per_s"]
        aim = " (aim 10)" if how == "SeqIO.parse" else ""
        print(f"  {'ratio to ' + how:28} {found[f'ratio to {how}']:12.1f} x{aim}", flush=True)
    print()
    path.unlink()
    return found


def bench_read(folder: Path, repeats: int) -> dict[str, Any]:
    """The table of ways to packs."""
    path = folder / "read.fasta"
    write_fasta(path, random_proteins(60_000, LENGTH, seed=2))
    print(f"read: plain FASTA, proteins of {LENGTH} residues on average, packs of 16,384 tokens")
    found: dict[str, Any] = {}
    for how in ("read_proteins", "to packs", "Reader"):
        result = found[how] = in_child("read", path=str(path), how=how, repeats=repeats, toks_per_batch=16384)
        rate = result["residues_per_s"]
        print(
            f"  {how:28} {rate:12,.0f} residues/s   {rate / GPU_TOKENS_PER_SECOND:5.0f} GPUs' worth",
            flush=True,
        )
    print()
    path.unlink()
    return found


def bench_memory(folder: Path, records: int, width: int) -> dict[str, Any]:
    """The table of whole runs."""
    print(
        f"memory: whole runs, proteins of {SHORT} residues on average, D = {width}, an engine that answers at once"
    )
    print(
        f"  {'input':22} {'records':>10} {'MB':>7} {'units':>6} {'seconds':>8} {'per s':>9} {'base':>6} {'plan':>6} {'peak MiB':>9} {'deduplicated':>13}"
    )
    pool = list(random_proteins(NUM_DISTINCT, SHORT, seed=3))
    found: dict[str, Any] = {}
    for name in ("plain", "gzip", "1,000 sequences"):
        for num in (max(1, records // 100), max(1, records // 10), records):
            path = folder / ("memory.fasta.gz" if name == "gzip" else "memory.fasta")
            picks = np.random.default_rng(num).integers(0, NUM_DISTINCT, size=num)
            proteins = (
                (pool[pick] for pick in picks)
                if name == "1,000 sequences"
                else random_proteins(num, SHORT, seed=4)
            )
            write_fasta(path, proteins)
            size = path.stat().st_size / 1e6
            with tempfile.TemporaryDirectory(dir=folder) as output_dir:
                result = in_child("memory", path=str(path), output_dir=output_dir, width=width, expected=num)
            found.setdefault(name, {})[str(num)] = result
            print(
                f"  {name:22} {num:10,} {size:7.1f} {result['units']:6} {result['seconds']:8.1f} {num / result['seconds']:9,.0f} "
                f"{result['base_mib']:6.0f} {result['plan_peak_mib']:6.0f} {result['peak_mib']:9.0f} {result['deduplicated']:13,}",
                flush=True,
            )
            path.unlink()
    print()
    return found


def hardware() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "biopython", "torch")},
    }


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of the FASTA intake on this CPU; no model runs."
    )
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument(
        "--records", type=int, default=2_000_000, help="records of the largest file of `memory` (%(default)s)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=300, help="size of the file of `count` (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each measurement (%(default)s)")
    parser.add_argument(
        "--width", type=int, default=8, help="D of the stand-in model of `memory` (%(default)s)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where the generated files go; default: a new temporary directory"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](**json.loads(args.child[1]))))
        return
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(
            f"--only={args.only}: there is no {', '.join(sorted(unknown))}; use some of {', '.join(PARTS)}"
        )
    results: dict[str, Any] = {"hardware": hardware()}
    print(", ".join(f"{key} {value}" for key, value in results["hardware"].items()) + "\n", flush=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        for part in PARTS:
            if part not in wanted:
                continue
            if part == "tokens":
                results[part] = bench_tokens(args.repeats)
            elif part == "count":
                results[part] = bench_count(folder, args.megabytes, args.repeats)
            elif part == "read":
                results[part] = bench_read(folder, args.repeats)
            else:
                results[part] = bench_memory(folder, args.records, args.width)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
