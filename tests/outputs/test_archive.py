"""The container of .pt outputs, through torch and zipfile."""

from __future__ import annotations

import zipfile
import zlib

import numpy as np
import pytest
import torch

from dist_esm.atomic import write_at
from dist_esm.outputs.archive import ALIGNMENT, rest_of_archive, storage_members
from dist_esm.outputs.pickling import Storage


def write_archive(path, storages: dict[Storage, np.ndarray], content) -> None:
    members, crcs = storage_members(list(storages)), []
    for member, values in zip(members, storages.values(), strict=True):
        assert member.start % ALIGNMENT == 0
        crcs.append(zlib.crc32(values.tobytes()))
        write_at(path, member.offset, member.header())
        write_at(path, member.start, values.tobytes())
        write_at(path, member.start + member.num_bytes, member.descriptor(crcs[-1]))
    write_at(path, members[-1].stop if members else 0, rest_of_archive(members, crcs, content))


@pytest.mark.parametrize("how", [{}, {"mmap": True}, {"weights_only": False}], ids=str)
def test_torch_reads_views_of_storages_and_zipfile_finds_nothing_wrong(tmp_path, how):
    one = np.arange(60, dtype=np.float32).reshape(10, 6)
    other = np.arange(21, dtype=np.float16).reshape(7, 3)
    first, second = Storage("0", one.dtype, one.shape), Storage("1", other.dtype, other.shape)
    none = Storage("2", one.dtype, (0, 6))
    content = {
        "ids": ["a", "é", "\ud800"],
        "data": [first.row(i) for i in range(10)],
        "parts": {33: [second.rows(0, 3), second.rows(3, 7)], 34: []},
        "whole": {33: first.rows(0, 10), 34: none.rows(0, 0)},
    }
    path = tmp_path / "a.pt"
    write_archive(path, {first: one, second: other, none: one[:0]}, content)
    found = torch.load(path, **{"weights_only": True, **how})
    assert found["ids"] == ["a", "é", "\ud800"]
    assert np.array_equal(np.stack([row.numpy() for row in found["data"]]), one)
    assert [part.numpy().tolist() for part in found["parts"][33]] == [other[:3].tolist(), other[3:].tolist()]
    assert found["whole"][34].shape == (0, 6)
    assert found["data"][3].untyped_storage().data_ptr() == found["whole"][33].untyped_storage().data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = ["data/0", "data/1", "data/2", "data.pkl", "byteorder", "version"]
        assert archive.namelist() == [f"archive/{name}" for name in names]


def test_storages_and_offsets_beyond_four_gigabytes_are_read_back(tmp_path):
    """The numbers are a hole in the file."""
    rows = (1 << 32) // 4096 + 1
    large, behind = (
        Storage("0", np.dtype(np.float32), (rows, 1024)),
        Storage("1", np.dtype(np.float32), (2, 3)),
    )
    members = storage_members([large, behind])
    last, small = np.arange(1024, dtype=np.float32), np.arange(6, dtype=np.float32)
    crcs = [0, zlib.crc32(small.tobytes())]
    path = tmp_path / "a.pt"
    for member, crc, at, values in zip(
        members, crcs, (large.num_bytes - 4096, 0), (last, small), strict=True
    ):
        write_at(path, member.offset, member.header())
        write_at(path, member.start + at, values.tobytes())
        write_at(path, member.start + member.num_bytes, member.descriptor(crc))
    content = {"data": [large.row(rows - 1), large.rows(0, 2)], "small": behind.rows(0, 2)}
    write_at(path, members[-1].stop, rest_of_archive(members, crcs, content))
    found = torch.load(path, weights_only=True, mmap=True)
    assert np.array_equal(found["data"][0].numpy(), last)
    assert not found["data"][1].any()
    assert np.array_equal(found["small"].numpy().ravel(), small)
    with zipfile.ZipFile(path) as archive:
        assert [item.file_size for item in archive.infolist()][:2] == [large.num_bytes, behind.num_bytes]
        assert archive.read("archive/data/1") == small.tobytes()
