"""One output written in any format, under temporary names, with its records.tsv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dist_esm.atomic import Staged, discard_staged, refuse_to_replace, temporary_path
from dist_esm.config import Format
from dist_esm.names import output_path
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.types import NOTE_COLUMNS


def write_output(
    output_format: Format,
    table: OutputTable,
    stem: Path,
    scratch: Path,
    part: str = "",
    is_compressed: bool = False,
) -> Staged:
    """Write one output under temporary names, with a ``<stem>.records.tsv`` if it has lines for one.

    Parameters
    ----------
    output_format
        The format to write.
    table
        What to write.
    stem, scratch, part
        As of `stage_output`.
    is_compressed
        Compress its numbers; for a format that can.

    Raises
    ------
    OSError
        If it cannot be written, or a folder that is not ours has its name already.
    """
    codec = FORMATS[output_format.name].codec
    write = codec.write_compressed if is_compressed else codec.write
    assert write is not None, f"{output_format.name} cannot compress: the configuration was not checked"
    return stage_output(output_format, table.tsv_lines, stem, scratch, partial(write, table), part)


def stage_output(
    output_format: Format,
    tsv_lines: Sequence[str],
    stem: Path,
    scratch: Path,
    write: Callable[[Path], str | None],
    part: str = "",
) -> Staged:
    """Have one output written under temporary names, with a ``<stem>.records.tsv`` if it has lines for one.

    Parameters
    ----------
    output_format
        Its format.
    tsv_lines
        Of its records.tsv.
    stem
        The output's path without suffix.
    scratch
        A folder of this process alone, on the same file system.
    write
        Writes it to exactly this path; returns its checksum if that was taken on the way.
    part
        What the names of a numbered part have behind the stem.

    Returns
    -------
    Staged
        For `dist_esm.atomic.commit_together`; records.tsv takes its name before the output does.

    Raises
    ------
    OSError
        If it cannot be written, or a folder that is not ours has its name already.
    """
    chosen = FORMATS[output_format.name]
    path = output_path(stem, part + chosen.suffix)
    records_tsv = output_path(stem, f"{part}.records.tsv")
    staged = Staged(path, None, [], marks=chosen.codec.marks)
    if chosen.is_folder:
        refuse_to_replace(path, staged.marks)
    with ExitStack() as undo:
        undo.callback(discard_staged, staged)
        if tsv_lines:
            staged.files.append((temporary_path(scratch), records_tsv))
            text = "\n".join(["\t".join(NOTE_COLUMNS), *tsv_lines, ""])
            staged.files[-1][0].write_text(text, encoding="utf-8")
        else:
            staged.obsolete.append(records_tsv)
        staged.files.append((temporary_path(scratch), path))
        staged.checksum = write(staged.files[-1][0])
        undo.pop_all()
    return staged
