"""Regions of one file that several processes write at once."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_esm.checksum import BLOCK_BYTES
from dist_esm.outputs import region as region_module
from dist_esm.outputs.region import (
    PAGE_BYTES,
    STRETCH_BYTES,
    OutsideError,
    Region,
    WrittenRegion,
    joined_crc32,
)
from helpers.page_cache import skip_unless_pages_wait, wait_until_few_wait


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_crc_of_two_texts_is_known_from_those_of_each(one, other):
    assert joined_crc32(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(one + other)


@pytest.mark.parametrize("page", [1, 16, 64, 4096])
@pytest.mark.parametrize("borders", [(3, 40, 40, 77, 400), (0, 64, 128, 129, 640)])
def test_regions_fill_a_file_whoever_writes_them_in_whatever_pieces(tmp_path, monkeypatch, page, borders):
    """Before the ends are written, nobody has touched a page that is not all its own."""
    monkeypatch.setattr(region_module, "PAGE_BYTES", page)
    monkeypatch.setattr("dist_esm.checksum.BLOCK_BYTES", 50)
    path = tmp_path / "folder" / "a"
    content = np.random.default_rng(0).integers(1, 256, borders[-1], dtype=np.uint8).tobytes()
    written = []
    for start, stop in pairwise(borders):
        region = Region(path, start, stop)
        if start % 2:  # in any order, then read back
            pieces = [(at, min(at + 7, stop)) for at in range(start, stop, 7)]
            for begin, end in pieces[::-1]:
                region.write(begin - start, content[begin:end])
            written.append(region.read_back())
        else:
            written.append(region.write_all([np.frombuffer(content[start:stop], np.uint8)]))
        region.close()
        on_disk = path.read_bytes().ljust(borders[-1], b"\0") if path.exists() else bytes(borders[-1])
        for first in range(0, borders[-1], page):
            is_own = any(each.start <= first and first + page <= each.stop for each in written)
            assert (on_disk[first : first + page] == content[first : first + page]) == is_own
        assert written[-1].is_intact(path)
        assert written[-1].crc32 == zlib.crc32(content[start:stop])
    path.parent.mkdir(exist_ok=True)
    for each in written:
        each.write_ends(path)
    assert path.read_bytes()[borders[0] :] == content[borders[0] :]


@pytest.mark.parametrize("page", [1, 16, 4096])
@pytest.mark.parametrize(("start", "num_rows"), [(0, 20), (8, 20), (100, 1), (100, 0), (24, 3)])
def test_rows_are_read_back_as_they_were(tmp_path, monkeypatch, page, start, num_rows):
    monkeypatch.setattr(region_module, "PAGE_BYTES", page)
    rows = np.arange(6.0 * num_rows, dtype=np.float32).reshape(num_rows, 6)
    region = Region(tmp_path / "a", start, start + rows.nbytes)
    written = region.write_all([rows])
    region.close()
    for pieces in ([(0, num_rows)], [(0, 1)] * num_rows, [(0, num_rows // 2), (0, num_rows - num_rows // 2)]):
        assert np.array_equal(np.concatenate(written.rows(tmp_path / "a", rows.dtype, 6, pieces)), rows)
    behind = [(24, 1)] * (num_rows // 2)  # every second row is a header
    assert np.array_equal(
        np.concatenate(written.rows(tmp_path / "a", rows.dtype, 6, behind)), rows[1::2][: len(behind)]
    )


def test_a_byte_that_changed_is_noticed_and_one_outside_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(region_module, "PAGE_BYTES", 16)
    region = Region(tmp_path / "a", 5, 105)
    written = region.write_all([np.ones(100, np.uint8)])
    with pytest.raises(OutsideError):
        region.write(90, b"12345678901")
    region.close()
    assert written.is_intact(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.seek(50)
        file.write(b"\0")
    assert not written.is_intact(tmp_path / "a")
    (tmp_path / "a").unlink()
    assert not written.is_intact(tmp_path / "a")


@pytest.mark.parametrize("has_crc", [True, False])
def test_blocks_that_come_in_any_order_are_summed_when_they_are_full(tmp_path, monkeypatch, has_crc):
    """When all are there, what is left to read is at the ends."""
    monkeypatch.setattr(region_module, "PAGE_BYTES", 16)
    monkeypatch.setattr("dist_esm.checksum.BLOCK_BYTES", 64)
    content = np.random.default_rng(0).bytes(6400)
    region = Region(tmp_path / "a", 37, 6437, has_crc)
    borders = [*range(0, 6400, 23), 6400]
    for begin, end in np.random.default_rng(1).permutation(list(pairwise(borders))).tolist():
        region.write(begin, content[begin:end])
    read, num_read = WrittenRegion.read, []

    def counted(self, path, start, stop):
        num_read.append(stop - start)
        return read(self, path, start, stop)

    monkeypatch.setattr(WrittenRegion, "read", counted)
    written = region.read_back()
    region.close()
    assert sum(num_read) <= 2 * 64
    whole = Region(tmp_path / "b", 37, 6437, has_crc)
    assert whole.write_all([np.frombuffer(content, np.uint8)]) == written
    assert written.is_intact(tmp_path / "a")
    whole.close()


@pytest.mark.parametrize("has_crc", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_that_write_stretches_side_by_side_leave_what_one_leaves(
    tmp_path, monkeypatch, has_crc, threads
):
    """Stretches end within blocks that are given, some of which are empty or headers of a few bytes."""
    monkeypatch.setattr(region_module, "PAGE_BYTES", 16)
    monkeypatch.setattr("dist_esm.checksum.BLOCK_BYTES", 64)
    content = np.random.default_rng(0).bytes(6400)
    at_once = Region(tmp_path / "a", 37, 6437, has_crc)
    wanted = at_once.write_all([np.frombuffer(content, np.uint8)])
    monkeypatch.setattr(region_module, "STRETCH_BYTES", 192)
    monkeypatch.setattr(region_module, "STRETCH_THREADS", threads)
    borders = [0, 0, 3, 160, 900, 900, 905, 5000, 6400]
    region = Region(tmp_path / "b", 37, 6437, has_crc)
    blocks = (np.frombuffer(content[begin:end], np.uint8) for begin, end in pairwise(borders))
    assert region.write_all(blocks) == wanted
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (wanted.crc32 == zlib.crc32(content)) is has_crc
    at_once.close()
    region.close()


def test_a_region_is_neither_left_short_nor_written_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr(region_module, "PAGE_BYTES", 16)
    monkeypatch.setattr(region_module, "STRETCH_BYTES", 192)
    for size, error in ((2000, OutsideError), (900, ValueError)):
        region = Region(tmp_path / "a", 0, 1000)
        with pytest.raises(error):
            region.write_all([np.ones(size, np.uint8)])
        region.close()
        assert (tmp_path / "a").stat().st_size <= 1000


def test_what_is_written_is_on_its_way_to_the_disk_before_the_rest_comes(tmp_path):
    skip_unless_pages_wait(tmp_path)
    path, waiting = tmp_path / "in order", []

    def blocks():
        yield np.ones(3 * STRETCH_BYTES, np.uint8)
        waiting.append(wait_until_few_wait(path, 0))
        yield np.ones(100, np.uint8)

    region = Region(path, 0, 3 * STRETCH_BYTES + 100)
    region.write_all(blocks())
    region.close()
    assert waiting == [0]


def test_full_blocks_that_come_in_any_order_are_on_their_way_to_the_disk(tmp_path):
    skip_unless_pages_wait(tmp_path)
    path, data = tmp_path / "any order", bytes(BLOCK_BYTES)
    region = Region(path, 0, 9 * BLOCK_BYTES)
    for block in (7, 0, 3):
        region.write(block * BLOCK_BYTES, data)
    region.write(5 * BLOCK_BYTES, data[: 2 * PAGE_BYTES])  # more of this block is to come
    assert wait_until_few_wait(path, 2) <= 2
    region.close()
