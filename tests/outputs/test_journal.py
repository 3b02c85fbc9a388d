"""Lines of the journal."""

from __future__ import annotations

from dataclasses import asdict, replace

from dist_esm.outputs.journal import Entry, encode, read
from dist_esm.outputs.lines import encode as encode_line
from dist_esm.types import Tally, WrittenFile


def test_every_torn_line_is_passed_over(tmp_path):
    (tmp_path / ".dist_esm" / "journal").mkdir(parents=True)
    entries = [
        Entry(
            f"{i}_ESM", f"{i}.fasta", [(0, None)], ["d"], [WrittenFile("a", 1, "s")], Tally({"ok": i}), 0, 1.0
        )
        for i in range(3)
    ]
    whole = b"".join(encode(entry) for entry in entries)
    path = tmp_path / ".dist_esm" / "journal" / "1.00000.jsonl"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read(tmp_path) == entries[: whole[: size + 1].count(b"\n")], size
    path.write_bytes(whole.replace(b'"ok":1', b'"ok":7'))
    assert read(tmp_path) == [entries[0], entries[2]]


def test_a_line_of_the_fourth_version_does_not_say_what_is_in_front(tmp_path):
    (tmp_path / ".dist_esm" / "journal").mkdir(parents=True)
    written = [WrittenFile("a", 1, "s")]
    entry = Entry("a_ESM", "a.fasta", [(7, 9)], ["d"], written, Tally(), 0, 1.0, before=3)
    content = {"format": 4, **asdict(entry)}
    del content["before"]
    (tmp_path / ".dist_esm" / "journal" / "1.00000.jsonl").write_bytes(encode_line(content) + encode(entry))
    assert read(tmp_path) == [replace(entry, before=None), entry]
