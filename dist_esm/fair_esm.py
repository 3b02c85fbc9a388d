"""The one door to fair-esm: its alphabet, its tokens, and its own model, against which `job=selfcheck` measures ours.

Nothing of fair-esm is on the way of the embeddings but the alphabet, which `alphabet` turns into a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from torch import Tensor, nn

from dist_esm.types import MASK

ALPHABET = Alphabet.from_architecture("ESM-1b")
_convert = ALPHABET.get_batch_converter()


def fair_esm_tokens(residues: bytes) -> Tensor:
    """A sequence as fair-esm's own batch converter has it.

    Returns
    -------
    int64 Tensor, shape (1, residues + 2)
        BOS, one token for each residue, EOS.
    """
    tokens = _convert([("protein", residues.decode("ascii").replace(MASK.decode(), "<mask>"))])[2]
    assert isinstance(tokens, Tensor)
    return tokens


def fair_esm_model(
    num_layers: int,
    embed_dim: int,
    attention_heads: int,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
) -> nn.Module:
    """fair-esm's own ESM-2 in fp32, without the heads for contacts and masked residues, which no embedding passes through.

    Parameters
    ----------
    num_layers, embed_dim, attention_heads
        The architecture.
    tensors
        Every parameter and buffer under fair-esm's name; each is copied to the device once, or not at all if it is fp32 and there.
    device
        Where it is to run.

    Raises
    ------
    torch.OutOfMemoryError
        If it does not fit on the device.
    """
    with torch.device("meta"):
        model: nn.Module = ESM2(num_layers, embed_dim, attention_heads, ALPHABET, token_dropout=True)
    model.lm_head, model.contact_head = nn.Identity(), nn.Identity()
    model.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in tensors}, assign=True)
    return model.eval().requires_grad_(False)


def fair_esm_hidden(model: nn.Module, tokens: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """Hidden states of one sequence, tokens as `fair_esm_tokens` gives them; layer to fp32 Tensor, shape (residues + 2, D)."""
    found = model(tokens, repr_layers=list(layers))["representations"]
    return {layer: found[layer][0] for layer in layers}
