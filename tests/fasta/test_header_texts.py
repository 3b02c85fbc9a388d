"""Room for ids and headers: known from the scan, and files cut into parts that fit."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from dist_esm import load
from dist_esm.config import Format
from dist_esm.fasta import blocks
from dist_esm.fasta.blocks import FastaError, whole_file
from dist_esm.fasta.header_texts import HeaderTexts
from dist_esm.fasta.slices import count_records
from dist_esm.outputs.formats import safetensors
from dist_esm.outputs.formats.registry import FORMATS
from helpers.fasta import block_gzip, write
from helpers.standin import embed_directory


def scanned(path) -> HeaderTexts:
    texts = HeaderTexts()
    count_records(whole_file(path), None, texts)
    return texts


def in_json(header: str, number: int) -> int:
    """Bytes of a record in the header of a safetensors file."""
    word = header.split()[0] if header.split() else f"unnamed_{number}"
    lists = [json.dumps([text, "x"], ensure_ascii=False) for text in (word, header, 10**7, 10**7)]
    return len(json.dumps(lists, ensure_ascii=False).encode()) - len(json.dumps(['["x"]'] * 4))


def headers(num: int, seed: int) -> list[str]:
    """Headers of all lengths and letters, some with a word alone."""
    rng = random.Random(seed)
    letters = 'ab c"\\\x01\x1f\x7f\té蛋🧬|'
    return ["".join(rng.choices(letters, k=rng.choice([0, 1, 5, 40, 300]))).strip() for _ in range(num)]


@pytest.mark.parametrize("block", [7, 64, 1000, 1 << 20])
def test_no_part_has_more_text_than_it_may(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    for seed in range(3):
        named = headers(150, seed)
        text = "".join(f">{header}\r\nMKV\n\n;comment\nMK\n" for header in named)
        path = write(tmp_path / "a.fa", text)
        texts = scanned(path)
        sizes = [in_json(header, number) for number, header in enumerate(named, start=1)]
        assert sum(sizes) <= texts.num_bytes <= 15 * sum(len(header) for header in named) + 150 * 72
        for limit in (texts.num_bytes, texts.num_bytes // 2, texts.num_bytes // 5):
            size = texts.part_size(100, limit)
            for first in range(0, 150, size):
                assert sum(sizes[first : first + size]) <= limit
        assert texts.part_size(1000, texts.num_bytes) == 1000
        with pytest.raises(FastaError, match="use format=parquet"):
            texts.part_size(100, 200)


def test_a_file_without_records_has_no_text(tmp_path):
    assert scanned(write(tmp_path / "a.fa", "")).num_bytes == 0
    assert scanned(write(tmp_path / "a.fa", "")).part_size(10, 10) == 10
    assert scanned(write(tmp_path / "a.fa", ">")).num_bytes > 0
    assert scanned(write(tmp_path / "a.fa", ";x\n")).num_bytes == 0


LIMIT = 20_000


@pytest.fixture
def small_limit(monkeypatch):
    """safetensors' limit, for small files; the rest of its header takes less than 2,000 bytes."""
    monkeypatch.setitem(FORMATS, "safetensors", replace(FORMATS["safetensors"], max_text=LIMIT))
    monkeypatch.setattr(safetensors, "MAX_HEADER", LIMIT + 2000)
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 2000)


@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz", "cut.fa", "cut.fa.gz"])
def test_a_file_with_long_headers_is_cut_into_parts_that_can_be_read(tmp_path, small_limit, name):
    rng = random.Random(name)
    text = "".join(f">p{i} {'m' + chr(1) * rng.randrange(60)}\nMKV\n" for i in range(300))
    path = write(tmp_path / name, block_gzip(text.encode()) if name.endswith(".gz") else text)
    share = 0.2 if name.startswith("cut") else 1.0
    done = embed_directory(path, tmp_path / "out", format=Format.safetensors, unit_share=share)
    assert done.report.status == "complete"
    (entry,) = done.report.files
    assert len(entry.outputs) > 3
    assert entry.outputs == sorted(entry.outputs)
    assert (entry.units > 1) == (share < 1)
    assert load(tmp_path / "out").ids == [f"p{i}" for i in range(300)]
    again = embed_directory(path, tmp_path / "out", format=Format.safetensors, unit_share=share)
    assert [entry.resumed for entry in again.report.files] == [True]
    other = embed_directory(path, tmp_path / "pt", unit_share=share)
    assert len(other.report.files[0].outputs) == 1


def test_a_file_whose_headers_fit_is_not_cut(tmp_path, small_limit):
    path = write(tmp_path / "a.fa", "".join(f">p{i} {'m' * 10}\nMKV\n" for i in range(150)))
    done = embed_directory(path, tmp_path / "out", format=Format.safetensors)
    assert done.report.files[0].outputs == ["a_ESM.safetensors"]


def test_headers_that_no_part_can_hold_fail_their_file_before_any_work(tmp_path, small_limit):
    write(tmp_path / "in/a.fa", f">p{'m' * LIMIT}\nMKTAYIAKQR\n")
    write(tmp_path / "in/b.fa", ">q\nMKV\n")
    done = embed_directory(tmp_path / "in", tmp_path / "out", format=Format.safetensors)
    assert done.report.status == "partial"
    assert "use format=parquet in another output_dir" in done.failure("a.fa")
    assert done.engine.num_tokens == 5
    other = embed_directory(tmp_path / "in", tmp_path / "other", format=Format.parquet)
    assert other.report.status == "complete"
