"""The one door to fair-esm: its alphabet, its tokens, and its own model, the yardstick of `job=selfcheck`.

Embeddings need only the alphabet of it, which `dist_esm.fasta.tokens` turns into a table.
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
    """Return the tokens that fair-esm's own batch converter makes of a sequence.

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
    """Build fair-esm's own ESM-2 in fp32, without the heads for contacts and masked residues.

    No embedding passes through these heads.

    Parameters
    ----------
    num_layers, embed_dim, attention_heads
        The architecture.
    tensors
        Every parameter and buffer under fair-esm's name. Each is copied to the device once, or not at all if
        it is there in fp32 already.
    device
        Where the model is to run.

    Raises
    ------
    torch.OutOfMemoryError
        If the model does not fit on the device.
    """
    with torch.device("meta"):
        model: nn.Module = ESM2(num_layers, embed_dim, attention_heads, ALPHABET, token_dropout=True)
    model.lm_head, model.contact_head = nn.Identity(), nn.Identity()
    model.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in tensors}, assign=True)
    return model.eval().requires_grad_(False)


def fair_esm_hidden(model: nn.Module, tokens: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """Return the hidden states of one sequence, given its tokens from `fair_esm_tokens`.

    Returns
    -------
    dict of layer to fp32 Tensor, shape (residues + 2, D)
    """
    representations = model(tokens, repr_layers=list(layers))["representations"]
    return {layer: representations[layer][0] for layer in layers}
