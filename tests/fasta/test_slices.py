"""Files counted and cut into slices, plain and in block gzip."""

from __future__ import annotations

import gzip
import random
import struct
from itertools import pairwise

import pytest
from Bio import SeqIO, bgzf

from dist_esm.config import Config
from dist_esm.fasta import blocks
from dist_esm.fasta import slices as slices_module
from dist_esm.fasta.blocks import raw_blocks, whole_file
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.slices import count_records, cut_slice
from dist_esm.planning import units
from dist_esm.planning.assign import count_sequences
from dist_esm.types import LENGTH_EDGES, Count, LengthHistogram, Slice, Unit
from helpers.fasta import block_gzip, random_sequence, write
from helpers.intake import check_output, embed_beside_good, failure_of


def read_records(piece: Slice) -> list[tuple[str, bytes]]:
    unit = Unit(0, 0, piece, Count(), Count(), True)
    return [(protein.header, protein.residues) for protein in read_proteins(unit, Config())]


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_the_parser_wherever_blocks_end(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    lengths = [rng.choice([rng.randrange(40), rng.randrange(400)]) for _ in range(30)]
    records = [(f"r{i} >;x", random_sequence(length, i)) for i, length in enumerate(lengths)]
    end = rng.choice(["\n", "\r\n", "\r"])
    width = rng.choice([1, 7, 60])
    text = "".join(
        f">{name}{end}" + "".join(residues[i : i + width] + end for i in range(0, len(residues), width))
        for name, residues in records
    )
    path = write(tmp_path / "a.fasta", text.removesuffix(end) if seed % 2 else text)
    parsed = list(SeqIO.parse(open(path, newline=None), "fasta"))  # noqa: SIM115
    lengths = [len(record.seq) for record in parsed]
    num_lines = len(text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"))
    for block in (1, 2, 3, 5, 16, 61, 997, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK", block)
        for limit in (None, 1, 17):
            seen = [min(length, limit or length) for length in lengths]
            histogram = LengthHistogram()
            assert count_records(whole_file(path), limit, histogram=histogram) == Count(
                sequences=len(parsed),
                residues=sum(lengths),
                squares=sum(length**2 for length in seen),
                lines=num_lines,
                seen=sum(seen),
                num_long=sum(length > (limit or length) for length in lengths),
                headers=sum(len(f">{name}") for name, _ in records),
            )
            assert histogram.longest == max(lengths)
            edges = [0, *LENGTH_EDGES, 10**9]
            for bin_, (first, stop) in enumerate(pairwise(edges)):
                assert histogram.bins[bin_] == sum(first <= length < stop for length in lengths)
        assert count_sequences(path) == len(parsed)
        assert count_sequences(write(tmp_path / "a.fasta.gz", gzip.compress(path.read_bytes()))) == len(
            parsed
        )


def cut_text(seed: int, end: str) -> bytes:
    rng = random.Random(seed)
    records = [
        f">r{i} a>b{end}"
        + "".join(random_sequence(rng.randrange(30), i + k) + end for k in range(rng.randrange(3)))
        for i in range(25)
    ]
    records[7] = f">huge{end}" + "".join(random_sequence(60, k) + end for k in range(30))
    return f"{end};remark{end}{''.join(records)}{rng.choice(['', end, end * 3])}".encode()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["plain", "bom", "bgzf 4", "bgzf 37", "bgzf 5000"])
def test_slices_hold_exactly_the_records_of_the_file(tmp_path, kind, end):
    content = (b"\xef\xbb\xbf" if kind == "bom" else b"") + cut_text(len(kind), end)
    is_bgzf = kind.startswith("bgzf")
    path = write(tmp_path / "a.fasta", block_gzip(content, int(kind.split()[1])) if is_bgzf else content)
    all_of_it = whole_file(path)
    right, total = read_records(all_of_it), count_records(all_of_it)
    assert len(right) == 25
    for num_slices in (1, 2, 3, 4, 5, 7, 11, 18, 40, 200):
        slices = cut_slice(all_of_it, path.stat().st_size, num_slices)
        assert len(slices) <= num_slices
        assert num_slices == 1 or (slices[0].start, slices[-1].stop) == (0, len(content))
        assert all(a.stop == b.start and content[b.start : b.start + 1] == b">" for a, b in pairwise(slices))
        assert b"".join(block for piece in slices for block in raw_blocks(piece)) == content
        counts = [count_records(piece) for piece in slices]
        assert sum(counts, Count()) == total
        assert [record for piece in slices for record in read_records(piece)] == right
        again = [smaller for piece in slices for smaller in cut_slice(piece, 0, 3)]
        assert [record for piece in again for record in read_records(piece)] == right


def test_slices_are_of_about_equal_size_and_ordinary_gzip_is_not_cut(tmp_path):
    text = "".join(f">r{i}\n{random_sequence(80, i)}\n" for i in range(1000)).encode()
    plain, blocked = write(tmp_path / "a.fasta", text), write(tmp_path / "b.fasta.gz", block_gzip(text, 1000))
    for path in (plain, blocked):
        slices = cut_slice(whole_file(path), path.stat().st_size, 10)
        assert len(slices) == 10
        assert max((piece.stop or 0) - piece.start for piece in slices) < len(text) / 10 + 200
    ordinary = write(tmp_path / "c.fasta.gz", gzip.compress(text))
    assert cut_slice(whole_file(ordinary), ordinary.stat().st_size, 10) == [whole_file(ordinary)]


def test_finding_borders_reads_a_file_once_however_few_there_are(tmp_path, monkeypatch):
    path = write(tmp_path / "a.fasta", ">only\n" + "MK\n" * 100_000)
    read_bytes = 0
    original = slices_module.raw_blocks

    def counting(piece):
        nonlocal read_bytes
        for block in original(piece):
            read_bytes += len(block)
            yield block

    monkeypatch.setattr(slices_module, "raw_blocks", counting)
    assert len(cut_slice(whole_file(path), path.stat().st_size, 500)) == 1
    assert 0 < read_bytes <= path.stat().st_size


def test_block_gzip_of_empty_blocks_only_is_an_empty_gzip(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    empty = write(tmp_path / "a.fasta.gz", bgzf._bgzf_eof * 50)
    assert cut_slice(whole_file(empty), empty.stat().st_size, 5) == [whole_file(empty)]
    assert "decompresses to nothing" in failure_of(
        tmp_path, bgzf._bgzf_eof * 50, "a.fasta.gz", unit_share=0.1
    )
    tiny = write(tmp_path / "b.fasta.gz", bgzf._bgzf_eof * 50 + block_gzip(b">\n"))
    assert cut_slice(whole_file(tiny), tiny.stat().st_size, 9)[0].start == 0
    assert [record for piece in cut_slice(whole_file(tiny), 0, 9) for record in read_records(piece)] == [
        ("", b"")
    ]


def damage(content: bytes, field: str, block: int) -> bytes:
    """BGZF with one field of one block changed."""
    offset = 0
    for _ in range(block):
        offset += struct.unpack("<H", content[offset + 16 : offset + 18])[0] + 1
    end = offset + struct.unpack("<H", content[offset + 16 : offset + 18])[0] + 1
    place = {"block size": offset + 16, "data": offset + 22, "crc": end - 8, "text size": end - 4}[field]
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("field", ["block size", "data", "crc", "text size"])
def test_block_gzip_with_any_damage_fails_cut_or_not(tmp_path, monkeypatch, field):
    text = "".join(f">r{i}\n{random_sequence(20, i)}\n" for i in range(40)).encode()
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    for size in (len(text) // 40, 61):
        content = block_gzip(text, size)
        num_blocks = -(-len(text) // size)
        for number, block in enumerate({0, 1, num_blocks // 2, num_blocks - 2, num_blocks - 1}):
            for share in (1.0, 0.1):
                place = tmp_path / f"{size} {number} {share}"
                if (
                    field == "block size"
                ):  # gzip itself does not need it: no reason to fail, but every record must be there
                    done = embed_beside_good(
                        place, damage(content, field, block), "a.fasta.gz", unit_share=share
                    )
                    check_output(done.load("a_ESM"), [(f"r{i}", random_sequence(20, i)) for i in range(40)])
                else:
                    message = failure_of(place, damage(content, field, block), "a.fasta.gz", unit_share=share)
                    assert "damaged gzip" in message or "truncated gzip" in message


def test_a_failing_line_of_a_cut_file_is_counted_from_the_files_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 100)
    lines = [line for i in range(100) for line in (f">r{i}", random_sequence(30, i))]
    lines[151] = "MK\x01"
    for share in (1.0, 0.2, 0.01):
        message = failure_of(tmp_path / str(share), "\r\n".join(lines), unit_share=share)
        assert message.startswith("line 152 holds control characters")
