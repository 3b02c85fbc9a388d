"""The rounding of a model's layers to e4m3, so that their outputs stay where they were.

A fixed set of proteins (`calibration.fasta`) goes through the model twice, side by side: through its layers
as they are, and through the same layers once they are rounded. From the two come the few numbers that each
rounded layer needs. So these depend on the weights and on the kind of device alone.

- The input of a product that follows a LayerNorm is standardized: the norm's own gain goes into the weights.
  From it the set's mean of each channel is subtracted: channels of ESM-2 that are far from 0 in every token
  would lose most to the rounding. What is left cannot exceed sqrt(D) and the largest mean, so it never
  saturates.
- The outputs of GELU and of attention are scaled so that e4m3 reaches `HEADROOM` times the largest that the
  set has in that layer. One that is larger all the same becomes NaN: its protein is embedded again in fp32,
  as all that is not finite.
- What attention's output has in every token is subtracted from the values: their weights add up to 1.
- Weights are scaled so that each output channel reaches 448, and rounded as `rounding` has it.
- Each bias is chosen so that the mean output over the set is that of the layer as it was, with its own input.
  So no error that all proteins share goes from a layer to the next.

Shape suffixes: T tokens of the set, D model width, F width of the feed-forward layer, K inputs of a layer.
"""

from __future__ import annotations

from itertools import accumulate
from math import sqrt
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_esm.fasta.tokens import tokenize
from dist_esm.model.esm2 import ESM2, Layer, LayerNorm, Linear
from dist_esm.model.kernels.attention import Seqlens
from dist_esm.model.kernels.linear import LinearOps
from dist_esm.model.kernels.quantized import E4M3, LARGEST, QuantizedLinear
from dist_esm.model.kernels.rounding import round_weights

PROTEINS = Path(__file__).with_name("calibration.fasta")
"""48 proteins of UniRef90 (UniProt, CC BY 4.0), of 60 to 600 residues, each on one line."""
HEADROOM = 8.0
"""So many times the set's largest number may be reached."""
SMALLEST = 2.0**-100
"""Stands for the largest number where there are none but zeros."""


@torch.inference_mode()
def quantize_(model: ESM2, products: frozenset[str]) -> None:
    """Replace layers of a model by such as multiply e4m3 numbers.

    Parameters
    ----------
    model
        On its device, with kernels that know `QuantizedLinear`.
    products
        Which layers of each block: all four, or fc1 and fc2.

    Raises
    ------
    ValueError
        If a layer cannot be rounded.
    """
    tokens_T, positions_T, seqlens = calibration_pack(model.device)
    ops = model.kernels.linear
    rotary = ops.rotary(positions_T, model.inv_freq)
    plain_TD = F.embedding(tokens_T, model.stream_table)
    rounded_TD = plain_TD.clone()
    for index, plain in enumerate(cast(list[Layer], list(model.layers))):
        qkv, out, fc1, fc2 = (cast(Linear, one) for one in (plain.qkv, plain.out, plain.fc1, plain.fc2))
        with torch.device("meta"):
            rounded = Layer(model.arch)
        for name, module in plain.named_children():
            setattr(rounded, name, module)
        with_attention = "qkv" in products
        if with_attention:
            rounded.attention_norm, rounded.qkv = after_norm(
                ops, plain.attention_norm, qkv, plain_TD, rounded_TD
            )
        attended_TD = model.attended(plain, ops.norm(plain_TD, plain.attention_norm), rotary, seqlens)
        scale = None
        if with_attention:
            mean_D = attended_TD.float().mean(0)
            rounded.qkv.bias[:, -len(mean_D) :] -= mean_D  # of the values, whose weights add up to 1
            scale = scale_for(attended_TD - mean_D)
        normalized_TD = ops.norm(rounded_TD, rounded.attention_norm)
        rounded_attended_TD = model.attended(rounded, normalized_TD, rotary, seqlens, scale)
        if scale is None:
            rounded.out = shifted(out, attended_TD, rounded_attended_TD)
        else:
            weight_DD = out.weight.float()
            rounded.out = rounded_layer(ops, weight_DD, out, attended_TD, rounded_attended_TD, scale)
        plain_TD, _ = ops.residual(plain_TD, attended_TD, out, None)
        rounded_TD, _ = ops.residual(rounded_TD, rounded_attended_TD, rounded.out, None)
        rounded.ffn_norm, rounded.fc1 = after_norm(ops, plain.ffn_norm, fc1, plain_TD, rounded_TD)
        plain_TF = ops.gelu(ops.norm(plain_TD, plain.ffn_norm), fc1)
        scale = scale_for(plain_TF)
        rounded.fc1.half_gain.fill_(scale / 2)
        rounded_TF = ops.gelu(ops.norm(rounded_TD, rounded.ffn_norm), rounded.fc1)
        weight_DF = fc2.weight.float()
        rounded.fc2 = rounded_layer(ops, weight_DF, fc2, plain_TF, rounded_TF, scale)
        plain_TD, _ = ops.residual(plain_TD, plain_TF, fc2, None)
        rounded_TD, _ = ops.residual(rounded_TD, rounded_TF, rounded.fc2, None)
        model.layers[index] = rounded


def calibration_pack(device: torch.device) -> tuple[Tensor, Tensor, Seqlens]:
    """Return tokens and positions of the set's proteins, laid end to end, and where each begins."""
    lines = PROTEINS.read_bytes().splitlines()
    proteins = [torch.tensor(tokenize(line)) for line in lines if not line.startswith(b">")]
    lengths = [len(tokens) for tokens in proteins]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    bounds = [0, *accumulate(lengths)]
    return torch.cat(proteins).int().to(device), positions_T.to(device), Seqlens.of(bounds, device)


def after_norm(
    ops: LinearOps, norm: LayerNorm, linear: Linear, plain_TD: Tensor, rounded_TD: Tensor
) -> tuple[LayerNorm, QuantizedLinear]:
    """Return a LayerNorm and the layer that follows it, for e4m3 numbers between them.

    Parameters
    ----------
    ops
        Implementation to compute with.
    norm, linear
        As they were.
    plain_TD, rounded_TD
        The residual stream of the layers as they were, and of the rounded ones.
    """
    width = norm.weight.numel()
    mean_D = F.layer_norm(ops.from_stream(rounded_TD).float(), (width,), eps=norm.eps).mean(0)
    scale = LARGEST / (sqrt(width) + float(mean_D.abs().max()))
    with torch.device("meta"):
        rounded_norm = LayerNorm(width, E4M3)
    rounded_norm.weight = torch.nn.Parameter(torch.full_like(mean_D, scale), requires_grad=False)
    rounded_norm.bias = torch.nn.Parameter(-scale * mean_D, requires_grad=False)
    weight_CD = linear.weight.float() * norm.weight.float()
    plain_input_TD, rounded_input_TD = ops.norm(plain_TD, norm), ops.norm(rounded_TD, rounded_norm)
    return rounded_norm, rounded_layer(ops, weight_CD, linear, plain_input_TD, rounded_input_TD, scale)


def rounded_layer(
    ops: LinearOps, weight_CK: Tensor, plain: Linear, plain_TK: Tensor, rounded_TK: Tensor, scale: float
) -> QuantizedLinear:
    """Return a layer that multiplies e4m3 numbers and has the mean output of another.

    Parameters
    ----------
    ops
        Implementation to compute with.
    weight_CK
        Its weights in fp32.
    plain
        The layer as it was.
    plain_TK, rounded_TK
        The input of each.
    scale
        By what the input was multiplied before it was rounded.

    Raises
    ------
    ValueError
        If an input is not finite: then nothing could be embedded with this layer.
    """
    if not all(bool(one.float().isfinite().all()) for one in (plain_TK, rounded_TK)):
        raise ValueError(
            "dtype=fp8: this model leaves the range of bf16, or of 8-bit numbers once it is rounded: "
            "use dtype=fp32"
        )
    largest_C1 = weight_CK.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    rounded_CK = round_weights(weight_CK / largest_C1, rounded_TK, ops.round_block)
    factor_C = largest_C1.flatten() / scale
    mean_K, rounded_mean_K = plain_TK.float().mean(0), rounded_TK.float().mean(0)
    wanted_C = plain.weight.float() @ mean_K + plain.bias.float()
    bias_C = wanted_C - factor_C * (rounded_CK.float() @ rounded_mean_K)
    return QuantizedLinear(rounded_CK, factor_C, bias_C, scale)


def shifted(linear: Linear, plain_TK: Tensor, rounded_TK: Tensor) -> Linear:
    """Return a layer that is not rounded, with a bias that makes up for the mean change of its input."""
    with torch.device("meta"):
        other = Linear(linear.in_features, linear.out_features)
    other.weight = linear.weight
    change_K = plain_TK.float().mean(0) - rounded_TK.float().mean(0)
    bias_C = linear.bias + linear.weight.float() @ change_K
    other.bias = torch.nn.Parameter(bias_C.to(linear.bias.dtype), requires_grad=False)
    return other


def scale_for(values_TK: Tensor) -> float:
    """Return by what such numbers are multiplied before they are rounded to e4m3."""
    return LARGEST / (HEADROOM * max(float(values_TK.abs().amax()), SMALLEST))
