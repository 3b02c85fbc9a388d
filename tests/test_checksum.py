"""Checksums of files, put together of those of blocks."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_esm import checksum as checksum_module
from dist_esm.checksum import (
    BLOCK_BYTES,
    BlockSums,
    checksum_of_blocks,
    read_again,
    read_back,
    summed,
    whole_blocks,
)
from dist_esm.types import WrittenFile

BLOCK = 16


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksum_module, "BLOCK_BYTES", BLOCK)


def checksum_of(content: bytes, block: int) -> str:
    """As the docs have it, in other words than the code."""
    digests = [hashlib.sha256(content[at : at + block]).digest() for at in range(0, len(content), block)]
    if len(digests) < 2:
        return hashlib.sha256(content).hexdigest()
    return f"blocks:{hashlib.sha256(b''.join(digests)).hexdigest()}"


@given(st.binary(max_size=100), st.lists(st.integers(0, 100)), st.integers(0, 100))
def test_whoever_has_a_part_of_a_file_has_the_sums_of_the_blocks_in_it(content, borders, first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum_module, "BLOCK_BYTES", BLOCK)
        first = min(first, len(content))
        cuts = [first, *sorted(min(max(border, first), len(content)) for border in borders), len(content)]
        sums = BlockSums(first)
        for begin, end in pairwise(cuts):
            sums.add(content[begin:end])
        found = whole_blocks(first, len(content), sums.digests())
        assert found == {
            number: hashlib.sha256(content[number * BLOCK : (number + 1) * BLOCK]).digest()
            for number in range(-(-first // BLOCK), len(content) // BLOCK)
        }
        if first == 0:
            assert checksum_of_blocks(sums.digests()) == checksum_of(content, BLOCK)


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 70 * BLOCK_BYTES - 3])
def test_a_file_is_read_back_as_it_was_written(tmp_path, num_bytes):
    content = bytes(range(251)) * (num_bytes // 251 + 1)
    (tmp_path / "a").write_bytes(content[:num_bytes])
    found = read_back(tmp_path, Path("a"))
    assert found == WrittenFile("a", num_bytes, checksum_of(content[:num_bytes], BLOCK_BYTES))
    assert read_again(tmp_path, found) == found
    earlier = WrittenFile("a", num_bytes, hashlib.sha256(content[:num_bytes]).hexdigest())
    assert read_again(tmp_path, earlier) == earlier
    if num_bytes:
        (tmp_path / "a").write_bytes(b"?" + content[1:num_bytes])
        assert read_again(tmp_path, found) != found
        assert read_again(tmp_path, earlier) != earlier


def test_only_blocks_that_are_not_known_are_read(tmp_path, small_blocks):
    content = bytes(range(100))
    (tmp_path / "a").write_bytes(content[:32] + b"?" * 16 + content[48:])
    known = {2: hashlib.sha256(content[32:48]).digest()}
    assert summed(tmp_path / "a", "a", known).sha256 == checksum_of(content, BLOCK)
    assert summed(tmp_path / "a", "a", {}).sha256 != checksum_of(content, BLOCK)


def test_a_folder_that_an_earlier_version_summed_is_known_again(tmp_path, small_blocks):
    (tmp_path / "out").mkdir()
    for name, num_bytes in (("small", 3), ("large", 50)):
        (tmp_path / "out" / name).write_bytes(b"x" * num_bytes)
    earlier, now = (read_back(tmp_path, Path("out"), is_plain) for is_plain in (True, False))
    assert now.sha256.startswith("blocks:")
    assert not earlier.sha256.startswith("blocks:")
    for written in (earlier, now):
        assert read_again(tmp_path, written) == written
    (tmp_path / "out" / "large").write_bytes(b"x" * 49 + b"y")
    for written in (earlier, now):
        assert read_again(tmp_path, written) != written
