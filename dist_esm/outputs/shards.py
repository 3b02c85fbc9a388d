"""Shards: what the units of a file that was cut contribute to its one output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_esm.atomic import Staged, discard, temporary_path
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.pickling import save
from dist_esm.outputs.row_buffer import Memory, RowBuffer
from dist_esm.types import Row


def write_shard(embeddings: OutputTable, path: Path, scratch: Path) -> Staged:
    """Write what one unit of a cut file contributes, for `join`, under a temporary name.

    Its rows are one text: torch's unpickler takes microseconds for each string.
    """
    per_tok = {layer: rows[0 : rows.shape[0]] for layer, rows in embeddings.per_tok.items()}
    content = {**vars(embeddings), "rows": json.dumps(embeddings.rows), "per_tok": per_tok}
    temporary = temporary_path(scratch)
    try:
        return Staged(path, save(content, temporary), [(temporary, path)])
    except BaseException:
        discard(temporary)
        raise


def read_shard(path: Path) -> OutputTable:
    """What `write_shard` wrote; numbers are mapped."""
    content = torch.load(path, weights_only=True, mmap=True)
    per_tok = {layer: ChunkedTensor([tensor]) for layer, tensor in content["per_tok"].items()}
    return OutputTable(
        **{**content, "rows": list(map(Row._make, json.loads(content["rows"]))), "per_tok": per_tok}
    )


@contextmanager
def join_shards(paths: Sequence[Path], directory: Path) -> Iterator[OutputTable]:
    """The pieces of a file as one, in the order given. Residues stay where they are, vectors are copied through buffers: memory grows with neither."""
    pieces = [read_shard(path) for path in paths]
    buffers: list[RowBuffer] = []
    memory = Memory()

    def joined(parts: list[Tensor]) -> Tensor:
        buffers.append(
            RowBuffer(
                parts[0].shape[1],
                parts[0][:0].numpy().dtype,
                directory,
                memory,
                expected=sum(map(len, parts)),
            )
        )
        first = 0
        for chunk in (chunk for part in parts for chunk in torch.split(part, 1 << 12)):
            buffers[-1].write(first, chunk.numpy())
            first += len(chunk)
        return buffers[-1].tensor()

    try:
        whole: dict[str, Any] = {
            "rows": [row for piece in pieces for row in piece.rows],
            "tsv_lines": [line for piece in pieces for line in piece.tsv_lines],
        }
        for kind in ("mean", "bos"):
            whole[kind] = {
                layer: joined([getattr(piece, kind)[layer] for piece in pieces])
                for layer in getattr(pieces[0], kind)
            }
        whole["per_tok"] = {
            layer: ChunkedTensor([chunk for piece in pieces for chunk in piece.per_tok[layer].chunks])
            for layer in pieces[0].per_tok
        }
        yield replace(pieces[0], **whole)
    finally:
        for buffer in buffers:
            buffer.close()
