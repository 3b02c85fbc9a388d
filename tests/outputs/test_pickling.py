"""Archives as torch.save writes them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

from dist_esm.outputs.pickling import torch_save


def same(one, other) -> bool:
    """Return True if two contents are alike to the last bit, type and stride."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.stride(), one.storage_offset()) == (
            other.dtype,
            other.stride(),
            other.storage_offset(),
        ) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "how", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}]
)
def test_archives_hold_what_torch_would_have_put_there(tmp_path, how):
    rows = torch.arange(6000, dtype=torch.float32).view(1000, 6)
    content = {
        "ids": ["a", "é" * 300, "\ud800"],
        "data": list(rows.unbind(0)),
        33: rows,
        "parts": {33: list(rows.split([3, 7, *range(40), 210])), 34: []},
        "half": rows.half()[:, 2:4],
        "none": [rows[:0], torch.empty(0, 6)],
        "others": [None, True, -5, 1 << 40, 2.5, ("a", 1), {}, [[]]],
    }
    torch.save(content, tmp_path / "theirs.pt")
    with open(tmp_path / "ours.pt", "wb") as file:
        torch_save(content, file)
    theirs, ours = (torch.load(tmp_path / name, **how) for name in ("theirs.pt", "ours.pt"))
    assert same(ours, theirs)
    assert ours["data"][7].untyped_storage().data_ptr() == ours[33].untyped_storage().data_ptr()
    records = [
        {i.filename.partition("/")[2]: i.CRC for i in zipfile.ZipFile(tmp_path / name).infolist()}
        for name in ("theirs.pt", "ours.pt")
    ]
    assert [name for name in records[0] if records[0][name] != records[1].get(name)] == [
        "data.pkl",
        ".data/serialization_id",
    ]


@pytest.mark.parametrize("span", [slice(0, 1000), slice(5, 17), slice(3, 4), slice(0, 0)])
def test_rows_of_a_matrix_share_its_storage_and_come_back_in_order(span):
    matrix = torch.arange(6000, dtype=torch.float32).view(1000, 6)[span]
    archive = io.BytesIO()
    torch_save({"data": list(matrix.unbind()), "again": {1: matrix}}, archive)
    content = torch.load(io.BytesIO(archive.getvalue()), weights_only=True)
    assert same(content["data"], list(content["again"][1].unbind()))
    assert torch.equal(content["again"][1], matrix)
    assert {row.untyped_storage()._cdata for row in content["data"]} <= {
        content["again"][1].untyped_storage()._cdata
    }


@pytest.mark.parametrize(
    "stranger",
    [
        np.float32(1),
        {1},
        torch.ones(1, requires_grad=True),
        torch.nn.Parameter(torch.ones(1)),
        (torch.ones(1),),
    ],
)
def test_what_readers_would_refuse_is_refused_when_it_is_written(stranger):
    with pytest.raises(TypeError, match="has no place in an output"):
        torch_save({"content": stranger}, io.BytesIO())
