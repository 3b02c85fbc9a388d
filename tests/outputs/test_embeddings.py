"""Rows that lie in several tensors."""

from __future__ import annotations

import torch

from dist_esm.outputs.embeddings import ChunkedTensor


def test_rows_that_lie_in_several_tensors_are_as_one():
    whole = torch.arange(60).view(20, 3)
    for cuts in ([20], [0, 20], [7, 13], [1, 0, 4, 0, 0, 15, 0], [5] * 4):
        rows = ChunkedTensor(torch.split(whole, cuts))
        assert rows.shape == (20, 3)
        for start in range(21):
            for stop in range(start, 21):
                assert torch.equal(rows[start:stop], whole[start:stop]), (cuts, start, stop)
    assert ChunkedTensor([whole[:9], whole[9:]])[9:12].data_ptr() == whole[9:].data_ptr()
    assert ChunkedTensor([whole[:0]])[0:0].shape == (0, 3)
