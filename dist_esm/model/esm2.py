"""ESM-2's forward over packed proteins: fair-esm's parameters, our own arithmetic.

A pack is whole proteins laid end to end, so there is no padding to multiply. This module leaves out what
embeddings do not need: the LM head, the contact head, and the layers after the last one wanted. It keeps
exactly: the token-dropout factor (1 - 0.15 * 0.8 on the embeddings, and more where tokens are masked), rotary
positions that start at 0 in each protein with the checkpoint's own ``inv_freq``, erf GELU, pre-norm blocks,
and the final LayerNorm on the last layer alone.

Precision: matrix products run in the dtype of their weights; LayerNorm, the rotation and the additions to the
residual stream run in fp32. How the stream is stored between them stands in `kernels.linear`.

Shape suffixes: T tokens of a pack, N heads, H head width, D model width.

Source: Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0 (the numerical oracle in the tests).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_esm.fasta.tokens import token_table
from dist_esm.model.kernels.attention import Seqlens
from dist_esm.model.kernels.choose import PLAIN, Kernels
from dist_esm.model.kernels.quantized import QuantizedLinear

TOKEN_DROPOUT_FACTOR = 1 - 0.15 * 0.8
"""fair-esm scales the embeddings by this where no token is masked: in training 12% are <mask>."""


@dataclass(frozen=True)
class Architecture:
    """The numbers that set ESM-2 models apart."""

    num_layers: int
    embed_dim: int
    attention_heads: int

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.embed_dim // self.attention_heads

    def __str__(self) -> str:
        return f"{self.num_layers} layers, width {self.embed_dim}, {self.attention_heads} heads"


class Linear(nn.Linear):
    """A linear layer that draws no parameters: `weights` puts the checkpoint's in their place."""

    def reset_parameters(self) -> None:
        """Draw nothing: on the meta device even that costs seconds of imports."""


class LayerNorm(nn.LayerNorm):
    """A LayerNorm that draws no parameters.

    Parameters
    ----------
    width
        Width of the rows.
    rounds_to
        Dtype of its outputs: that of the product which takes them. `weights` sets it.
    """

    def __init__(self, width: int, rounds_to: torch.dtype = torch.float32) -> None:
        super().__init__(width)
        self.rounds_to = rounds_to

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Embedding(nn.Embedding):
    """A token embedding that draws no parameters."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Layer(nn.Module):
    """The parameters of a pre-norm transformer block, with query, key and value in a single matrix."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.embed_dim
        self.attention_norm = LayerNorm(width)
        self.qkv: Linear | QuantizedLinear = Linear(width, 3 * width)
        self.out: Linear | QuantizedLinear = Linear(width, width)
        self.ffn_norm = LayerNorm(width)
        self.fc1: Linear | QuantizedLinear = Linear(width, 4 * width)
        self.fc2: Linear | QuantizedLinear = Linear(4 * width, width)


class ESM2(nn.Module):
    """ESM-2 for inference on packs.

    Parameters
    ----------
    arch
        Layers, width and heads.
    kernels
        Implementations to compute it with.
    """

    def __init__(self, arch: Architecture, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.arch = arch
        self.kernels = kernels
        self.embed_tokens = Embedding(token_table().num_tokens, arch.embed_dim)
        self.layers = nn.ModuleList(Layer(arch) for _ in range(arch.num_layers))
        self.final_norm = LayerNorm(arch.embed_dim)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(arch.head_dim // 2))
        self.stream_table: Tensor
        """The token embeddings in the form of the residual stream; shape (tokens of the alphabet, D)."""
        self.register_buffer("stream_table", torch.empty(token_table().num_tokens, arch.embed_dim))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.inv_freq.device

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        seqlens: Seqlens,
        repr_layers: Collection[int],
        kept_T: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Compute the hidden states of a pack.

        Parameters
        ----------
        tokens_T : int64 Tensor, shape (T,)
            fair-esm's tokens, BOS and EOS included. Rows past the last protein may hold anything.
        positions_T : int64 Tensor, shape (T,)
            Offset of each token in its own protein.
        seqlens
            Where the proteins begin and end.
        repr_layers
            Layers to return: 0 is the embedding, and the model's last layer carries the final LayerNorm.
        kept_T : fp32 Tensor, shape (T,)
            By what each token's embedding is divided, see `engine.token_dropout`; None: no token is masked.

        Returns
        -------
        dict of int to Tensor, shape (T, D), of the residual stream's dtype: fp32, or wider if matrix products
        are
        """
        ops = self.kernels.linear
        x_TD = drop_tokens(F.embedding(tokens_T, self.stream_table), kept_T)
        rotary = ops.rotary(positions_T, self.inv_freq)
        last = max(repr_layers)
        layers = cast(list[Layer], list(self.layers))
        hidden = {}
        if 0 in repr_layers:
            hidden[0] = drop_tokens(F.embedding(tokens_T, self.embed_tokens.weight), kept_T)
        h_TD = ops.norm(x_TD, layers[0].attention_norm)
        for depth, layer in enumerate(layers[:last], start=1):
            scale = layer.out.input_scale if isinstance(layer.out, QuantizedLinear) else None
            a_TD = self.attended(layer, h_TD, rotary, seqlens, scale)
            x_TD, h_TD = ops.residual(x_TD, a_TD, layer.out, layer.ffn_norm)
            following = layers[depth].attention_norm if depth < last else None
            x_TD, h_TD = ops.residual(x_TD, ops.gelu(h_TD, layer.fc1), layer.fc2, following)
            if depth in repr_layers:
                hidden[depth] = (
                    ops.norm(x_TD, self.final_norm)
                    if depth == self.arch.num_layers
                    else ops.from_stream(x_TD)
                )
        return hidden

    def attended(
        self, layer: Layer, h_TD: Tensor, rotary: Any, seqlens: Seqlens, scale: float | None = None
    ) -> Tensor:
        """Return what attention makes of a block's normalized input, times `scale` in e4m3; shape (T, D)."""
        q_TNH, k_TNH, v_TNH = self.kernels.linear.qkv(h_TD, layer.qkv, rotary, self.arch.attention_heads)
        return self.kernels.attend(q_TNH, k_TNH, v_TNH, seqlens, scale).flatten(1)


def drop_tokens(x_TD: Tensor, kept_T: Tensor | None) -> Tensor:
    """Return embeddings as fair-esm's token dropout has them: none of a mask, more of all others."""
    return x_TD if kept_T is None else (x_TD / kept_T[:, None]).to(x_TD.dtype)
