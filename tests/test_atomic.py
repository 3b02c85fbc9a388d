"""Files that are summed while they are written and come to their names together."""

from __future__ import annotations

import hashlib
import io
import resource
from functools import partial
from itertools import accumulate

import numpy as np
import pytest

from dist_esm.atomic import SMALL_BYTES, SummedFile, atomically, together


def test_a_checksum_is_that_of_what_was_written_small_and_large(tmp_path):
    numbers = np.random.default_rng(0).bytes(3 * SMALL_BYTES + 5)
    sizes = [3, SMALL_BYTES, 0, SMALL_BYTES + 1, 7, 2 * SMALL_BYTES - 6]
    with SummedFile(tmp_path / "a") as file:
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            file.write(numbers[start : start + size])
    written = (tmp_path / "a").read_bytes()
    assert written == numbers[: sum(sizes)]
    assert file.sha256() == hashlib.sha256(written).hexdigest()


def test_a_large_write_for_which_there_is_no_room_raises(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SMALL_BYTES + 100, before[1]))
    try:
        file = SummedFile(tmp_path / "a")
        with pytest.raises(OSError, match="File too large"):
            file.write(bytes(3 * SMALL_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.close()


def test_what_was_summed_cannot_be_written_over(tmp_path):
    with SummedFile(tmp_path / "a") as file:
        file.write(b"abc")
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    assert file.sha256() == hashlib.sha256(b"abc").hexdigest()


def test_of_files_written_together_one_that_fails_takes_no_other_along(tmp_path):
    def write(name: str, error: Exception | None):
        with atomically(tmp_path / name / "file") as beside:
            beside.write_text(name)
        with atomically(tmp_path / name / "second") as beside:
            beside.write_text(name)
            if error is not None:
                raise error
        assert not (tmp_path / name / "file").exists()
        return name

    error = OSError("full")
    assert together([partial(write, "a", None), partial(write, "b", error), partial(write, "c", None)]) == [
        "a",
        error,
        "c",
    ]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "a/file",
        "a/second",
        "c/file",
        "c/second",
    ]
