"""The bookkeeping of embeddings, in any order in which records and embeddings can come."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_esm.config import Format, Include
from dist_esm.outputs.builder import OutputSettings
from dist_esm.outputs.row_buffer import Memory
from dist_esm.pipeline.assembly import Assembly
from dist_esm.types import (
    Count,
    FastaFile,
    Protein,
    RecordOutcome,
    RecordRead,
    Segment,
    SegmentEmbedding,
    Slice,
    Unit,
    WrittenFile,
)

LAYER, WIDTH = 3, 2
SETTINGS = OutputSettings(
    output_dir=Path("nowhere"),
    scratch=Path("nowhere"),
    format=Format.pt,
    include=[Include.mean, Include.per_tok],
    main_layer=LAYER,
    representations=[(Include.mean, LAYER), (Include.per_tok, LAYER)],
    width=WIDTH,
    dtype=np.dtype(np.float32),
    max_proteins_per_output=3,
    provenance={},
)
RESIDUES = [b"MK", b"MKT", b"MKTA", b"MKTAY", b"GAV"]

records = st.fixed_dictionaries(
    {
        "residues": st.sampled_from(range(len(RESIDUES))),
        "num_segments": st.integers(1, 2),
        "is_skipped": st.sampled_from([False, False, False, True]),
    }
)
units = st.lists(
    st.fixed_dictionaries({"records": st.lists(records, max_size=5), "is_parted": st.booleans()}),
    min_size=1,
    max_size=4,
)


def value_of(residues: int) -> float:
    """What the embedding of a sequence consists of."""
    return float(residues + 1)


def segment_embedding(residues: int, num_rows: int) -> SegmentEmbedding:
    rows = np.full((num_rows, WIDTH), value_of(residues), np.float32)
    return SegmentEmbedding({LAYER: rows.sum(0)}, {LAYER: rows[0]}, {LAYER: rows})


class Feed:
    """Announces the records of units as the reader does, and keeps the segments that are to be embedded."""

    def __init__(self, assembly: Assembly, dedupe: bool) -> None:
        self.assembly = assembly
        self.dedupe = dedupe
        self.waiting: list[tuple[Segment, int]] = []
        self.first_of: dict[tuple[int, int], int] = {}
        self.next_index = 0

    def announce(self, key: int, record: dict) -> None:
        index, residues = self.next_index, RESIDUES[record["residues"]]
        self.next_index += 1
        name = f"p{index}_{record['residues']}"
        if record["is_skipped"]:
            protein = Protein(name, name, b"", skipped="left out")
            skipped = RecordRead(index, key, protein, RecordOutcome.skipped, 0, 0)
            self.assembly.add_records([skipped])
            return
        num_segments = min(record["num_segments"], len(residues))
        duplicate_of = None
        if self.dedupe:
            duplicate_of = self.first_of.setdefault((record["residues"], num_segments), index)
        protein = Protein(name, name, residues)
        outcome = RecordOutcome.ok if num_segments == 1 else RecordOutcome.windowed
        read = RecordRead(index, key, protein, outcome, len(residues), num_segments, duplicate_of)
        self.assembly.add_records([read])
        if duplicate_of in (None, index):
            borders = [0, 1, len(residues)] if num_segments == 2 else [0, len(residues)]
            for part, (start, stop) in enumerate(pairwise(borders)):
                tokens = np.zeros(stop - start + 2, np.uint8)
                self.waiting.append((Segment(index, part, tokens, (0, stop - start)), record["residues"]))


@settings(max_examples=300, deadline=None)
@given(
    units=units,
    dedupe=st.booleans(),
    poison=st.one_of(st.none(), st.sampled_from(range(len(RESIDUES)))),
    data=st.data(),
)
def test_every_embedding_finds_its_place_in_any_order(units, dedupe, poison, data):
    """A failure ends the units that hold the sequence, and no others. Every unit has one outcome."""
    files = [FastaFile(Path(f"{key}.fasta"), Path(f"{key}_ESM"), 1, 1) for key in range(len(units))]
    assembly = Assembly(files, SETTINGS, rank=0, memory=Memory(left=1 << 20), clock=lambda: 0.0)
    feed = Feed(assembly, dedupe)
    outputs: dict[int, dict[int, list[tuple[str, float, list[float]]]]] = {}

    def write_some(all_of_them: bool) -> None:
        while assembly.to_write and (all_of_them or data.draw(st.booleans())):
            task = assembly.to_write.pop(0)
            rows = task.builder.rows
            means = task.builder.buffers[Include.mean, LAYER].tensor() if rows else []
            residues = task.builder.buffers[Include.per_tok, LAYER].tensor() if rows else []
            start, content = 0, []
            for row, mean in zip(rows, means, strict=True):
                content.append((row.id, mean.tolist(), residues[start : start + row.embedded].tolist()))
                start += row.embedded
            assert start == len(residues)
            if task.builder.is_wanted:
                outputs.setdefault(task.key, {})[task.builder.part] = content
            assembly.add_written(task, WrittenFile(f"{task.key}.{task.builder.part}", 1, ""))

    def embed_some(all_of_them: bool) -> None:
        while feed.waiting and (all_of_them or data.draw(st.booleans())):
            pick = 0 if all_of_them else data.draw(st.integers(0, len(feed.waiting) - 1))
            segment, residues = feed.waiting.pop(pick)
            if residues == poison:
                embedding: SegmentEmbedding | Exception = ValueError("poisoned")
            else:
                embedding = segment_embedding(residues, segment.keep[1])
            assembly.add_embeddings([segment], [embedding])
            write_some(all_of_them=False)

    for key, unit in enumerate(units):
        count = Count(sequences=len(unit["records"]))
        is_parted = unit["is_parted"]
        assembly.begin(
            key,
            Unit(key, 0, Slice(files[key].path), count, Count(), True, first_part=0 if is_parted else None),
        )
        for record in unit["records"]:
            feed.announce(key, record)
            embed_some(all_of_them=False)
        assembly.end(key, f"digest {key}")
    embed_some(all_of_them=True)
    write_some(all_of_them=True)

    failed = {key for key, _ in assembly.failures}
    done = {result.file: result for result in assembly.results}
    assert len(assembly.failures) == len(failed)
    assert len(assembly.results) == len(done)
    assert failed | set(done) == set(range(len(units)))
    assert not failed & set(done)
    index = 0
    for key, unit in enumerate(units):
        expected = []
        for record in unit["records"]:
            if not record["is_skipped"]:
                value, num_rows = value_of(record["residues"]), len(RESIDUES[record["residues"]])
                rows = [[value] * WIDTH] * num_rows
                expected.append((f"p{index}_{record['residues']}", [value] * WIDTH, rows))
            index += 1
        holds_poison = any(
            record["residues"] == poison and not record["is_skipped"] for record in unit["records"]
        )
        assert (key in failed) == holds_poison
        if key in done:
            parts = [outputs[key][part] for part in sorted(outputs[key])]
            assert [row for part in parts for row in part] == expected
            if unit["is_parted"]:
                assert all(len(part) <= SETTINGS.max_proteins_per_output for part in parts)
            else:
                assert len(parts) == 1
            tally = done[key].tally
            assert tally.sequences == len(unit["records"])
            assert tally.outcomes.get("skipped", 0) == sum(record["is_skipped"] for record in unit["records"])


def test_a_unit_that_was_abandoned_has_no_outcome_and_what_it_wrote_is_removed():
    files = [FastaFile(Path("a.fasta"), Path("a_ESM"), 1, 1)]
    assembly = Assembly(files, SETTINGS, rank=0, memory=Memory(left=1 << 20))
    feed = Feed(assembly, dedupe=False)
    assembly.begin(0, Unit(0, 0, Slice(Path("a.fasta")), Count(sequences=4), Count(), True, first_part=0))
    for _ in range(4):  # one more than a part holds
        feed.announce(0, {"residues": 0, "num_segments": 1, "is_skipped": False})
    for segment, residues in feed.waiting:
        assembly.add_embeddings([segment], [segment_embedding(residues, segment.keep[1])])
    (task,) = assembly.to_write
    written = WrittenFile("a_ESM.part00001.pt", 1, "")
    assembly.add_written(task, written)
    assembly.abandon_all()
    assert (assembly.results, assembly.failures, assembly.to_remove) == ([], [], [written])
