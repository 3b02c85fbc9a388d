"""One output in the format that was asked for.

`write_output` is what the rest of the package knows; each format is one function behind it, given whole `OutputTable` and a path, in a
module of its own beside what reads it back. `reader` is the way back for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_esm.atomic import Output, atomically
from dist_esm.config import Format
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.fair_esm import write_fair_esm
from dist_esm.outputs.formats.h5 import write_h5
from dist_esm.outputs.formats.parquet import write_parquet
from dist_esm.outputs.formats.pt import write_pt
from dist_esm.outputs.formats.safetensors import write_safetensors
from dist_esm.types import NOTE_COLUMNS

Writer = Callable[[OutputTable, Path], str | None]
"""Writes an output to a path; returns its sha256 if that was taken on the way."""

WRITERS: dict[Format, tuple[str, Writer]] = {
    Format.pt: (".pt", write_pt),
    Format.fair_esm: ("", write_fair_esm),
    Format.h5: (".h5", write_h5),
    Format.parquet: (".parquet", write_parquet),
    Format.safetensors: (".safetensors", write_safetensors),
}
"""Suffix and function of each format; without a suffix it is a folder."""


def write_output(kind, embeddings, stem, scratch=None):
    """Write one output, after ``<stem>.records.tsv`` beside it if any of its records deserves a note.

    Parameters
    ----------
    kind
        What to write.
    embeddings
        What to write of.
    stem
        The output's path without suffix.

    Returns
    -------
    Output
        Its path, and its checksum if that was taken on the way.
    """
    notes = stem.with_name(stem.name + ".records.tsv")
    if embeddings.tsv_lines:
        with atomically(notes) as beside:
            beside.write_text("\n".join(["\t".join(NOTE_COLUMNS), *embeddings.tsv_lines, ""]), encoding="utf-8")
    else:
        notes.unlink(missing_ok=True)
    suffix, writer = WRITERS[kind]
    path = stem.with_name(stem.name + suffix)
    from dist_esm.atomic import Staged
    return Staged(path, writer(embeddings, path))
