"""ESM-2's forward over packed proteins: fair-esm's parameters, our own arithmetic.

A pack is whole proteins laid end to end, so there is no padding to multiply. What fair-esm's module computes and this one
does not: the LM head, the contact head, and the layers after the last one wanted. What is kept exactly: the token-dropout
factor (1 - 0.15 * 0.8 on the embeddings, since no token is masked), rotary positions that start at 0 in each protein with
the checkpoint's own ``inv_freq``, erf GELU, pre-norm blocks, and the final LayerNorm on the last layer alone.

Precision: matrix products run in ``dtype``; the residual stream, LayerNorm and the rotation run in fp32, so that bf16 costs
one rounding at each matrix product's border and none in the sum over layers.

Shape suffixes: T tokens of a pack, N heads, H head width, D model width.

Source: Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0 (the numerical oracle in the tests).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_esm.kernels import AttentionFunction, Seqlens, sdpa

TOKEN_DROPOUT_FACTOR = 1 - 0.15 * 0.8
NUM_TOKENS = 33


@dataclass(frozen=True)
class Architecture:
    """The numbers that tell one ESM-2 from another."""

    num_layers: int
    embed_dim: int
    attention_heads: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.attention_heads

    def __str__(self) -> str:
        return f"{self.num_layers} layers, width {self.embed_dim}, {self.attention_heads} heads"


class Linear(nn.Linear):
    """A linear layer whose parameters are left as they are created: `weights` puts the checkpoint's in their place."""

    def reset_parameters(self) -> None:
        """Draw nothing: on the meta device even that costs seconds of imports."""


class LayerNorm(nn.LayerNorm):
    """The same for LayerNorm."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Embedding(nn.Embedding):
    """The same for the token embedding."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Layer(nn.Module):
    """One pre-norm transformer block, with query, key and value in one matrix product."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.embed_dim
        self.heads = arch.attention_heads
        self.attention_norm = LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ffn_norm = LayerNorm(width)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x_TD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, seqlens: Seqlens, attention: AttentionFunction) -> Tensor:
        """x + attention, then x + feed-forward; `x_TD` is the residual stream."""
        dtype = self.qkv.weight.dtype
        h_TD = self.attention_norm(x_TD).to(dtype)
        q_TNH, k_TNH, v_TNH = self.qkv(h_TD).view(len(x_TD), 3, self.heads, -1).unbind(1)
        q_TNH, k_TNH = rotate(q_TNH, cos_T1H, sin_T1H), rotate(k_TNH, cos_T1H, sin_T1H)
        a_TD = attention(q_TNH, k_TNH, v_TNH, seqlens).reshape(len(x_TD), -1)
        x_TD = x_TD + self.out(a_TD)
        h_TD = self.ffn_norm(x_TD).to(dtype)
        h_TD = F.gelu(self.fc1(h_TD))
        added_TD: Tensor = self.fc2(h_TD)
        return x_TD + added_TD


def rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Apply rotary position embeddings in fp32: the first half of each head is turned against the second."""
    first, second = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((first, second), -1).mul(cos_T1H).addcmul_(torch.cat((-second, first), -1), sin_T1H).to(x_TNH.dtype)


class ESM2(nn.Module):
    """ESM-2 for inference on packs.

    Parameters
    ----------
    arch
        Layers, width and heads.
    attention
        The implementation of attention, from `kernels`.
    """

    def __init__(self, arch: Architecture, attention: AttentionFunction = sdpa) -> None:
        super().__init__()
        self.arch = arch
        self.attention = attention
        self.embed_tokens = Embedding(NUM_TOKENS, arch.embed_dim)
        self.layers = nn.ModuleList(Layer(arch) for _ in range(arch.num_layers))
        self.final_norm = LayerNorm(arch.embed_dim)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(arch.head_dim // 2))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.inv_freq.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return self.layers[0].qkv.weight.dtype  # type: ignore[return-value, union-attr]

    def forward(self, tokens_T: Tensor, positions_T: Tensor, seqlens: Seqlens, repr_layers: Collection[int]) -> dict[int, Tensor]:
        """Hidden states of a pack.

        Parameters
        ----------
        tokens_T : int64 Tensor, shape (T,)
            fair-esm's token of each position, BOS and EOS included. Rows past the last protein may hold anything.
        positions_T : int64 Tensor, shape (T,)
            Offset of each token in its own protein.
        seqlens
            Where the proteins begin and end.
        repr_layers
            Layers to return: 0 is the embedding, the highest layer of the model carries the final LayerNorm.

        Returns
        -------
        dict of int to fp32 Tensor, shape (T, D)
        """
        x_TD = F.embedding(tokens_T, self.embed_tokens.weight).float() * TOKEN_DROPOUT_FACTOR
        angles_TH = torch.outer(positions_T.float(), self.inv_freq).repeat(1, 2)
        cos_T1H, sin_T1H = angles_TH.cos().unsqueeze(1), angles_TH.sin().unsqueeze(1)
        hidden = {0: x_TD} if 0 in repr_layers else {}
        for number, layer in enumerate(self.layers[: max(repr_layers)], start=1):
            x_TD = layer(x_TD, cos_T1H, sin_T1H, seqlens, self.attention)
            if number in repr_layers:
                hidden[number] = self.final_norm(x_TD) if number == self.arch.num_layers else x_TD
        return hidden
