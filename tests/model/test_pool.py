"""What comes off a GPU, and the memory that it comes to."""

from __future__ import annotations

import pytest
import torch

from dist_esm.model.pool import to_host

WIDTH = 64


@pytest.mark.gpu
def test_rows_of_a_smaller_pack_come_to_memory_that_is_there_unless_they_are_few():
    stream = torch.cuda.Stream()
    x = torch.arange(1000 * WIDTH, dtype=torch.float32, device="cuda").view(1000, WIDTH)
    stream.wait_stream(torch.cuda.current_stream())

    def copied(num_rows: int, room: int) -> torch.Tensor:
        with torch.cuda.stream(stream):
            found = to_host(x[:num_rows], stream, room)
        torch.cuda.synchronize()
        assert torch.equal(found, x[:num_rows].cpu())
        return found

    full = copied(1000, 0)
    place = full.data_ptr()
    del full
    smaller = copied(300, 1000)
    assert smaller.is_pinned()
    assert smaller.data_ptr() == place
    few = copied(100, 1000)
    assert few.untyped_storage().nbytes() == 100 * WIDTH * 4
