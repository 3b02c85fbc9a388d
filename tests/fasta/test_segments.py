"""Long proteins: truncated, windowed, skipped or refused."""

from __future__ import annotations

import numpy as np
import pytest

from dist_esm.config import Long
from dist_esm.fasta.segments import windows
from helpers.fasta import random_sequence
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import ALL_KINDS, expected

LONG = [
    ("short", random_sequence(30)),
    ("limit", random_sequence(50, 1)),
    ("long", random_sequence(51, 2)),
    ("longer", random_sequence(333, 3)),
]
LONG_TEXT = "".join(f">{name}\n{residues}\n" for name, residues in LONG)


def most_central(length: int, width: int, overlap: int) -> list[int]:
    """For each residue the start of the window that answers it, by trying all windows."""
    starts = []
    start = 0
    while start + width < length:
        starts.append(start)
        start += width - overlap
    starts.append(length - width)
    best = []
    for residue in range(length):
        inside = [start for start in starts if start <= residue < start + width]
        best.append(
            max(inside, key=lambda start: (min(residue - start, start + width - 1 - residue), -start))
        )
    return best


def test_windows_answer_each_residue_where_it_is_most_central():
    for width in (1, 2, 3, 8, 13):
        for overlap in range(width):
            for length in range(width + 1, 70):
                spans = windows(length, width, overlap)
                assert all(
                    stop - start == width and start <= first < last <= stop
                    for start, stop, first, last in spans[:-1]
                )
                assert [start for start, _, first, last in spans for _ in range(first, last)] == most_central(
                    length, width, overlap
                )
                assert [first for _, _, first, _ in spans] == [0, *(last for *_, last in spans[:-1])]
                assert spans[-1][3] == length


def test_truncate_embeds_the_first_residues_and_lists_the_records(tmp_path):
    done = embed_beside_good(
        tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.truncate, include=ALL_KINDS
    )
    check_output(done.load("a_ESM"), [(name, residues[:50]) for name, residues in LONG], has_all_kinds=True)
    assert done.report.records["truncated"] == done.report.files[0].truncated == 2
    assert [
        (note["id"], note["outcome"], note["residues"], note["embedded"]) for note in done.notes("a_ESM")
    ] == [
        ("long", "truncated", "51", "50"),
        ("longer", "truncated", "333", "50"),
    ]


def test_null_embeds_all_residues_of_any_length(tmp_path):
    done = embed_beside_good(tmp_path, LONG_TEXT, truncation_seq_length=None, include=ALL_KINDS)
    check_output(done.load("a_ESM"), LONG, has_all_kinds=True)


def test_skip_leaves_long_records_out_with_their_reason(tmp_path):
    done = embed_beside_good(tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.skip)
    check_output(done.load("a_ESM"), LONG[:2])
    assert done.report.records["skipped_by_reason"] == {"too long": 2}


def test_fail_fails_the_file_and_names_the_record(tmp_path):
    message = failure_of(tmp_path, LONG_TEXT, truncation_seq_length=50, long=Long.fail)
    assert "long has 51 residues, more than truncation_seq_length=50" in message


@pytest.mark.parametrize("overlap", [0, 1, 16, 25, 49])
def test_windows_are_stitched_from_the_right_windows_and_averaged_over_all_residues(tmp_path, overlap):
    done = embed_beside_good(
        tmp_path,
        LONG_TEXT,
        truncation_seq_length=50,
        long=Long.window,
        window_overlap=overlap,
        include=ALL_KINDS,
    )
    content = done.load("a_ESM")
    assert content["lengths"] == [len(residues) for _, residues in LONG]
    num_windows = []
    for i, (_, residues) in enumerate(LONG):
        spans: list[tuple[int, int, int, int]] = []
        for residue, start in enumerate(
            most_central(len(residues), 50, overlap) if len(residues) > 50 else []
        ):
            if spans and spans[-1][0] == start:
                spans[-1] = (*spans[-1][:3], residue + 1)
            else:
                spans.append((start, start + 50, residue, residue + 1))
        right = expected(residues, spans=spans)
        assert np.array_equal(content["representations"][1][i].numpy(), right.rows)
        assert np.array_equal(content["mean_representations"][1][i].numpy(), right.mean)
        assert np.array_equal(content["bos_representations"][1][i].numpy(), right.bos)
        num_windows.append(len(windows(len(residues), 50, overlap)) if len(residues) > 50 else 0)
    assert done.report.records["windowed"] == 2
    assert done.report.records["windows"] == sum(num_windows)
    assert [int(note["windows"]) for note in done.notes("a_ESM")] == num_windows[2:]
