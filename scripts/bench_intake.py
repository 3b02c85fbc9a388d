#!/usr/bin/env python3
"""Measures how fast FASTA becomes packs of tokens on this CPU, and in how much memory; no model runs.

tokens
    `dist_esm.fasta.tokens.tokenize` and fair-esm's `Alphabet.encode` with BOS and EOS put around it, on
    random proteins of 350 residues. The tokens are compared first. Aim: 100 times fair-esm on one core.
count
    `dist_esm.fasta.slices.count_records`, which counts records, residues, the attention's work and lines, and
    Biopython's two parsers, which sum up records and residues, on one generated plain FASTA file (lines of
    60, headers like UniRef's). Reading the file and doing nothing is the bound. All of them must find the
    same counts. Aim: 10 times `SeqIO.parse`.
read
    `read_proteins`, then `tokenize`, then `Packer`: what has to be done for each residue before a device
    can have it. Then the same as a rank does it: in the `Reader` thread, with its announcements and the
    digests for identical sequences. One GPU takes about 400,000 tokens a second of a model of 650M
    parameters.
memory
    The whole run (cutting, counting, plan, reader, packer, collector, writers, report) with an engine that
    answers at once with D numbers, over generated files of N records, N/10 and N/100: distinct sequences in
    plain text; the same in ordinary gzip, which is streamed and not cut; and records drawn from 1,000
    sequences, so that identical ones are embedded once. What grows from N/10 to N grows with the file.
    Every record must come out, or the measurement fails.

Each measurement is a process of its own, on one thread where it is a timing. Files are generated first,
untimed, in a temporary directory, and are in the page cache when they are read. Timings are medians of
repeated runs after one that is thrown away. Memory is the process's peak resident set (VmHWM); `base` is
what it was after the imports. MB are 10^6 bytes, MiB 2^20. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.fasta import random_proteins, with_uniref_headers, write_fasta
from benchmarks.harness import Table, begin, end, in_child, make_parser, parse_options, peak_mib, timed

LENGTH = 350
"""Mean residues of a protein where speed is measured."""
SHORT = 60
"""Mean residues of a protein where memory is measured."""
NUM_DISTINCT = 1000
GPU_TOKENS_PER_SECOND = 400_000
TOKS_PER_BATCH = 16384
LAYER = 6


# What the child processes do. Each imports only what it needs, so that its memory is its own.


def measure_tokens(repeats: int) -> dict[str, Any]:
    """Both tokenizers on the same proteins."""
    from esm.data import Alphabet

    from dist_esm.fasta.tokens import tokenize

    alphabet = Alphabet.from_architecture("ESM-1b")
    proteins = list(random_proteins(20_000, LENGTH, LENGTH, seed=0))
    texts = [protein.decode() for protein in proteins[:300]]

    def fair_esm(text: str) -> list[int]:
        return [alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx]

    for text in texts[:100]:
        assert tokenize(text.encode()).tolist() == fair_esm(text), text
    ours = timed(lambda: exhaust(map(tokenize, proteins)), repeats)
    theirs = timed(lambda: exhaust(map(fair_esm, texts)), repeats)
    rate, fair_esm_rate = len(proteins) / ours.median_s, len(texts) / theirs.median_s
    return {"dist_esm_per_s": rate, "fair_esm_per_s": fair_esm_rate, "ratio": rate / fair_esm_rate}


def exhaust(iterator: Iterator[object]) -> None:
    """Run an iterator to its end, and keep nothing."""
    deque(iterator, maxlen=0)


def count_nothing(path: str) -> None:
    """Read the file, and do nothing."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def count_ours(path: str) -> tuple[int, int]:
    """Count records and residues with this tool's scan."""
    from dist_esm.fasta.blocks import whole_file
    from dist_esm.fasta.slices import count_records

    counted = count_records(whole_file(Path(path)), 1022)
    return counted.sequences, counted.residues


def count_simple(path: str) -> tuple[int, int]:
    """Count records and residues with Biopython's fast parser."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with open(path) as file:
        return totals(len(residues) for _, residues in SimpleFastaParser(file))


def count_seqio(path: str) -> tuple[int, int]:
    """Count records and residues with Biopython's parser of records."""
    from Bio import SeqIO

    return totals(len(record) for record in SeqIO.parse(path, "fasta"))


def totals(lengths: Iterable[int]) -> tuple[int, int]:
    """Return how many lengths there are, and their sum."""
    sequences = residues = 0
    for length in lengths:
        sequences += 1
        residues += length
    return sequences, residues


COUNTERS: dict[str, Callable[[str], tuple[int, int] | None]] = {
    "read only": count_nothing,
    "dist_esm": count_ours,
    "SimpleFastaParser": count_simple,
    "SeqIO.parse": count_seqio,
}


def measure_count(path: str, counter: str, repeats: int) -> dict[str, Any]:
    """One way to count one file."""
    COUNTERS[counter](os.devnull)  # imports what it needs
    base = peak_mib()
    timing = timed(lambda: COUNTERS[counter](path), repeats)
    return {
        **timing.as_json(),
        "base_mib": base,
        "peak_mib": peak_mib(),
        "mb_per_s": os.path.getsize(path) / 1e6 / timing.median_s,
    }


def measure_read(path: str, reader: str, repeats: int) -> dict[str, Any]:
    """One file to packs, by hand or in the reader thread."""
    from dist_esm.config import Config, ModelConfig
    from dist_esm.distributed import World
    from dist_esm.fasta.parser import read_proteins
    from dist_esm.fasta.tokens import tokenize
    from dist_esm.outputs.in_hand import InHand
    from dist_esm.pipeline.collector import Collector
    from dist_esm.pipeline.failures import Failures
    from dist_esm.pipeline.packer import Packer
    from dist_esm.pipeline.reader import Reader
    from dist_esm.planning.agree import agree_on_plan
    from dist_esm.planning.inputs import find_files
    from dist_esm.stop import Stop
    from dist_esm.types import Segment, TakenUnit

    class Nobody:
        """Takes every message and does nothing, as a collector and as notes of what is in hand."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    config = Config(input=path, model=ModelConfig("none", 33, 1280, 20), unit_share=1.0)
    plan = agree_on_plan(config, find_files([path]), [], World(None, 0, 1, 0, 1))
    (unit,) = plan.units

    def only_parse() -> int:
        return sum(len(protein.residues) for protein in read_proteins(unit, config))

    def by_hand() -> int:
        packer, num_tokens = Packer(TOKS_PER_BATCH), 0
        for protein_index, protein in enumerate(read_proteins(unit, config)):
            segment = Segment(protein_index, 0, tokenize(protein.residues), (0, len(protein.residues)))
            num_tokens += sum(pack.num_tokens for pack in packer.add(segment))
        num_tokens += sum(pack.num_tokens for pack in packer.flush())
        return num_tokens - 2 * unit.count.sequences

    def in_thread() -> int:
        stop, collector, in_hand = Stop(), cast(Collector, Nobody()), cast(InHand, Nobody())
        failures, units = Failures(1, 0, stop), map(TakenUnit, plan.units)
        toks, num_tokens = TOKS_PER_BATCH, 0
        with Reader(units, plan.files, config, toks, toks, collector, failures, in_hand, 0, stop) as thread:
            while (pack := thread.next_pack()) is not None:
                num_tokens += pack.num_tokens
        return num_tokens - 2 * unit.count.sequences

    base = peak_mib()
    work = {"read_proteins": only_parse, "to packs": by_hand, "Reader": in_thread}[reader]
    timing = timed(work, repeats)
    assert timing.answer == unit.count.residues, f"{timing.answer} of {unit.count.residues} residues"
    return {
        **timing.as_json(),
        "base_mib": base,
        "peak_mib": peak_mib(),
        "residues_per_s": unit.count.residues / timing.median_s,
    }


def measure_memory(path: str, output_dir: str, width: int, expected: int) -> dict[str, Any]:
    """The whole run over one file, in which each protein gets numbers of its own."""
    from benchmarks.stand_in import StandInEngine, run_without_model
    from dist_esm.config import Config, DeviceKind, ModelConfig
    from dist_esm.types import Segment, SegmentEmbedding

    bos = np.zeros(width, dtype=np.float32)

    def answer(segment: Segment) -> SegmentEmbedding:
        return SegmentEmbedding({LAYER: np.full(width, segment.protein, dtype=np.float32)}, {LAYER: bos}, {})

    model = ModelConfig("stand-in", LAYER, width, 1, "random")
    config = Config(input=path, output_dir=Path(output_dir), model=model, device=DeviceKind.cpu)
    engine = StandInEngine(answer, num_threads=2)
    base = peak_mib()
    cost = run_without_model(config, engine)
    num_ok, deduplicated = cost.report["records"]["ok"], cost.report["records"]["deduplicated"]
    assert num_ok == expected, f"{num_ok} records of {expected}"
    assert deduplicated + engine.num_segments == expected, (
        f"{deduplicated} deduplicated and {engine.num_segments} embedded of {expected}"
    )
    return {
        "seconds": cost.seconds,
        "base_mib": base,
        "peak_mib": cost.peak_mib,
        "plan_s": cost.plan_seconds,
        "plan_peak_mib": cost.plan_peak_mib,
        "units": sum(file["units"] for file in cost.report["files"]),
        "outputs": sum(len(file["outputs"]) for file in cost.report["files"]),
        "deduplicated": deduplicated,
    }


# The parent generates files, starts children and fills tables.


def bench_tokens(options: Namespace, folder: Path) -> tuple[dict[str, Any], Table]:
    """Compare the two tokenizers."""
    measured = in_child(measure_tokens, one_thread=True, repeats=options.repeats)
    table = Table(
        f"tokens: proteins of {LENGTH} residues, one core", ("", "sequences/s", "x fair-esm (aim 100)")
    )
    table.add("dist_esm tokenize", f"{measured['dist_esm_per_s']:,.0f}", f"{measured['ratio']:,.0f}")
    table.add("fair-esm Alphabet.encode", f"{measured['fair_esm_per_s']:,.0f}", "1")
    return measured, table


def bench_count(options: Namespace, folder: Path) -> tuple[dict[str, Any], Table]:
    """Compare ways to count."""
    path = folder / "count.fasta"
    num_proteins = options.megabytes * 1_000_000 // (LENGTH + 78)
    proteins = random_proteins(num_proteins, LENGTH // 2, LENGTH + LENGTH // 2, seed=1)
    num_bytes = write_fasta(path, with_uniref_headers(proteins))
    title = f"count: a plain FASTA file of {num_bytes / 1e6:.0f} MB, proteins of {LENGTH} residues on average"
    table = Table(title, ("", "MB/s", "dist_esm is x times as fast", "base MiB", "peak MiB"))
    measured: dict[str, Any] = {"bytes": num_bytes}
    rows: dict[str, dict[str, Any]] = {}
    for counter in ("dist_esm", "read only", "SimpleFastaParser", "SeqIO.parse"):
        is_fast = counter in ("read only", "dist_esm")
        repeats = options.repeats if is_fast else max(3, options.repeats // 2)
        row = rows[counter] = in_child(
            measure_count, one_thread=True, path=str(path), counter=counter, repeats=repeats
        )
        ratio = rows["dist_esm"]["mb_per_s"] / row["mb_per_s"]
        if not is_fast:
            measured[f"ratio to {counter}"] = ratio
        aim = " (aim 10)" if counter == "SeqIO.parse" else ""
        table.add(
            counter,
            f"{row['mb_per_s']:,.0f}",
            f"{ratio:.1f}{aim}",
            f"{row['base_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
        )
    answers = {json.dumps(row["answer"]) for counter, row in rows.items() if counter != "read only"}
    assert len(answers) == 1, f"the counts differ: {answers}"
    path.unlink()
    return {**measured, **rows}, table


def bench_read(options: Namespace, folder: Path) -> tuple[dict[str, Any], Table]:
    """Compare ways to packs."""
    path = folder / "read.fasta"
    proteins = random_proteins(60_000, LENGTH // 2, LENGTH + LENGTH // 2, seed=2)
    write_fasta(path, with_uniref_headers(proteins))
    title = f"read: plain FASTA, proteins of {LENGTH} residues on average, packs of {TOKS_PER_BATCH:,} tokens"
    table = Table(title, ("", "residues/s", "GPUs that it feeds"))
    measured: dict[str, Any] = {}
    for reader in ("read_proteins", "to packs", "Reader"):
        row = measured[reader] = in_child(
            measure_read, one_thread=True, path=str(path), reader=reader, repeats=options.repeats
        )
        rate = row["residues_per_s"]
        table.add(reader, f"{rate:,.0f}", f"{rate / GPU_TOKENS_PER_SECOND:.0f}")
    path.unlink()
    return measured, table


def bench_memory(options: Namespace, folder: Path) -> tuple[dict[str, Any], Table]:
    """Compare whole runs over files of three sizes."""
    headings = (
        "input",
        "records",
        "MB",
        "units",
        "seconds",
        "records/s",
        "base MiB",
        "plan MiB",
        "peak MiB",
        "deduplicated",
    )
    shape = f"proteins of {SHORT} residues on average, D = {options.width}"
    table = Table(f"memory: whole runs, {shape}, an engine that answers at once", headings)
    bounds = SHORT // 2, SHORT + SHORT // 2
    pool = list(random_proteins(NUM_DISTINCT, *bounds, seed=3))
    measured: dict[str, Any] = {}
    for source in ("plain", "gzip", "1,000 sequences"):
        for num in (max(1, options.records // 100), max(1, options.records // 10), options.records):
            path = folder / ("memory.fasta.gz" if source == "gzip" else "memory.fasta")
            if source == "1,000 sequences":
                picks = np.random.default_rng(num).integers(0, NUM_DISTINCT, size=num)
                records = with_uniref_headers(pool[pick] for pick in picks)
            else:
                records = with_uniref_headers(random_proteins(num, *bounds, seed=4))
            write_fasta(path, records)
            size = path.stat().st_size / 1e6
            with tempfile.TemporaryDirectory(dir=folder) as output_dir:
                row = in_child(
                    measure_memory,
                    one_thread=True,
                    path=str(path),
                    output_dir=output_dir,
                    width=options.width,
                    expected=num,
                )
            measured.setdefault(source, {})[str(num)] = row
            table.add(
                source,
                f"{num:,}",
                f"{size:.1f}",
                f"{row['units']}",
                f"{row['seconds']:.1f}",
                f"{num / row['seconds']:,.0f}",
                f"{row['base_mib']:.0f}",
                f"{row['plan_peak_mib']:.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['deduplicated']:,}",
            )
            path.unlink()
    return measured, table


PARTS: dict[str, Callable[[Namespace, Path], tuple[dict[str, Any], Table]]] = {
    "tokens": bench_tokens,
    "count": bench_count,
    "read": bench_read,
    "memory": bench_memory,
}


def main() -> None:
    """Measure what is asked for."""
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument(
        "--records", type=int, default=2_000_000, help="records of the largest file of `memory` (%(default)s)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=300, help="size of the file of `count` (%(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=8, help="D of the stand-in model of `memory` (%(default)s)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where the generated files go; default: a new temporary directory"
    )
    options = parse_options(parser, children=(measure_tokens, measure_count, measure_read, measure_memory))
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        names = ", ".join(sorted(unknown))
        parser.error(f"--only={options.only}: there is no {names}; use some of {', '.join(PARTS)}")
    results, tables = begin(), []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        for part in (part for part in PARTS if part in wanted):
            results[part], table = PARTS[part](options, Path(name))
            tables.append(table)
    end(results, tables, options)


if __name__ == "__main__":
    main()
