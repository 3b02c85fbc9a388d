"""One output in the format that was asked for.

`write_output` is what the rest of the package knows; each format is one function behind it, given whole `Embeddings` and a path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dist_esm.config import Format
from dist_esm.records import NOTE_COLUMNS
from dist_esm.spool import Embeddings, atomically, save

Writer = Callable[[Embeddings, Path], None]


def write_output(kind: Format, embeddings: Embeddings, stem: Path) -> Path:
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
    Path
        The output's path.
    """
    notes = stem.with_name(stem.name + ".records.tsv")
    if embeddings.notes:
        with atomically(notes) as beside:
            beside.write_text("\n".join(["\t".join(NOTE_COLUMNS), *embeddings.notes, ""]), encoding="utf-8")
    else:
        notes.unlink(missing_ok=True)
    suffix, writer = WRITERS[kind]
    path = stem.with_name(stem.name + suffix)
    writer(embeddings, path)
    return path


def write_pt(embeddings: Embeddings, path: Path) -> None:
    """Write VirNucPro's layout, with every representation beside it under fair-esm's names.

    ``proteins`` and ``data`` are lists in file order, ``data`` of the mean of the last requested layer, shape (D,); further
    ``headers``, ``lengths`` (embedded residues), ``source`` and ``provenance``, and as included ``mean_representations[layer]`` and
    ``bos_representations[layer]``, shape (N, D), and ``representations[layer]``, a list of tensors of shape (L, D). Tensors of a kind
    and layer are views of one storage.
    """
    content: dict[str, object] = {
        "proteins": embeddings.ids,
        "data": list(embeddings.mean[embeddings.main_layer].unbind(0)),
        "headers": [row.header for row in embeddings.rows],
        "lengths": embeddings.lengths,
        "source": embeddings.source,
        "provenance": embeddings.provenance,
    }
    if "mean" in embeddings.include:
        content["mean_representations"] = embeddings.mean
    if "bos" in embeddings.include:
        content["bos_representations"] = embeddings.bos
    if "per_tok" in embeddings.include:
        content["representations"] = {layer: list(torch.split(rows, embeddings.lengths)) for layer, rows in embeddings.per_tok.items()}
    save(content, path)


WRITERS: dict[Format, tuple[str, Writer]] = {Format.pt: (".pt", write_pt)}
"""Suffix and function of each format."""
