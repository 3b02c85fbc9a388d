"""One output in the format that was asked for.

`write_output` is what the rest of the package knows; each format is one function behind it, given whole `OutputTable` and a path, in a
module of its own beside what reads it back. `reader` is the way back for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_esm.atomic import Staged, discard_staged, refuse_to_replace, temporary_path
from dist_esm.config import Format
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.fair_esm import ABOUT, MAP, write_fair_esm
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


def write_output(kind: Format, embeddings: OutputTable, stem: Path, scratch: Path) -> Staged:
    """Write one output under temporary names, with a ``<stem>.records.tsv`` if any of its records deserves a note.

    Parameters
    ----------
    kind
        What to write.
    embeddings
        What to write of.
    stem
        The output's path without suffix.
    scratch
        A folder of this process alone, on the same file system.

    Returns
    -------
    Staged
        For `dist_esm.atomic.commit_together`; records.tsv takes its name before the output does.
    """
    suffix, writer = WRITERS[kind]
    path = stem.with_name(stem.name + suffix)
    records = stem.with_name(stem.name + ".records.tsv")
    staged = Staged(path, None, [], marks=() if suffix else (MAP, ABOUT))
    if staged.marks:
        refuse_to_replace(path, staged.marks)
    try:
        if embeddings.tsv_lines:
            staged.files.append((temporary_path(scratch), records))
            text = "\n".join(["\t".join(NOTE_COLUMNS), *embeddings.tsv_lines, ""])
            staged.files[-1][0].write_text(text, encoding="utf-8")
        else:
            staged.obsolete.append(records)
        staged.files.append((temporary_path(scratch), path))
        staged.sha256 = writer(embeddings, staged.files[-1][0])
    except BaseException:
        discard_staged(staged)
        raise
    return staged
