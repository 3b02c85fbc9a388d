"""Products of e4m3 numbers: their numbers against fair-esm's, and what keeps them right."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from dist_esm import Embedder
from dist_esm.config import Attention, Dtype, Fp8, Include, LinearKind
from dist_esm.fasta.tokens import tokenize
from dist_esm.model import quantize, weights
from dist_esm.model.engine import Engine
from dist_esm.model.esm2 import ESM2, Architecture
from dist_esm.model.kernels.attention import TILE, Seqlens
from dist_esm.model.kernels.choose import (
    choose_dtype,
    choose_for_quantized,
    choose_kernels,
    quantized_products,
)
from dist_esm.model.kernels.linear import TorchLinear
from dist_esm.model.kernels.quantized import E4M3, LARGEST, QuantizedLinear, to_e4m3
from dist_esm.model.kernels.rounding import round_block, round_weights
from dist_esm.model.quantize import calibration_pack, quantize_, rounded_layer
from dist_esm.types import Pack
from helpers.checkpoints import A3B_SHAPED, A650M_SHAPED, fair_esm_model, random_state, write_checkpoint
from helpers.compare import assert_within
from helpers.data import real_proteins
from helpers.layers import fair_esm_layers, segment_of

CPU = torch.device("cpu")
NARROW = Architecture(4, 160, 8)


def make_model(arch, state, device: torch.device, linear: LinearKind, fp8: Fp8 | None) -> ESM2:
    """Our model with these parameters; in bf16 throughout without `fp8`."""
    products = frozenset() if fp8 is None else quantized_products(Dtype.fp8, fp8)
    kernels = choose_kernels(Attention.auto, linear, device, torch.bfloat16, arch.head_dim, products)
    with torch.device("meta"):
        model = ESM2(arch, kernels)
    weights.fill_parameters(model, state.__getitem__, device, torch.bfloat16)
    if products:
        quantize_(model, products)
    return model.eval()


@cache
def hard_narrow_model(fp8: Fp8 | None) -> ESM2:
    """One that is hard to round, made once: nobody changes it."""
    state = random_state(NARROW, seed=1, hard=True)
    return make_model(NARROW, state, CPU, LinearKind.torch, fp8)


def means(engine: Engine, proteins: list[bytes]) -> list[np.ndarray]:
    """The mean of each protein, embedded in one pack."""
    pack = Pack(tuple(segment_of(protein, i) for i, protein in enumerate(proteins)))
    (layer,) = engine.layers
    return [one.sums[layer] / len(protein) for one, protein in zip(engine.run(pack), proteins, strict=True)]


def fair_esm_means(arch, state, proteins: list[bytes]) -> list[np.ndarray]:
    oracle = fair_esm_model(arch, state)
    return [fair_esm_layers(oracle, one)[arch.num_layers][1:-1].mean(0).numpy() for one in proteins]


def test_8_bit_products_keep_within_their_limits_of_fair_esm_and_ffn_is_closer():
    state = random_state(NARROW, seed=1, hard=True)
    proteins = real_proteins()
    theirs = fair_esm_means(NARROW, state, proteins)
    errors = {}
    for fp8 in (None, *Fp8):
        with Engine(hard_narrow_model(fp8), [NARROW.num_layers], wants_rows=False) as engine:
            errors[fp8] = assert_within(Include.mean, E4M3, means(engine, proteins), theirs).median_error
    assert errors[None] < errors[Fp8.ffn] < errors[Fp8.all]


def test_each_rounded_layer_keeps_its_mean_output_over_the_calibration_set():
    outputs = {}
    for fp8 in (None, Fp8.all):
        with torch.inference_mode():
            hidden = hard_narrow_model(fp8)(*calibration_pack(CPU), range(NARROW.num_layers + 1))
        outputs[fp8] = [
            hidden[layer].mean(0) for layer in range(NARROW.num_layers)
        ]  # before the last LayerNorm
    spread = hidden[NARROW.num_layers - 1].std(0).norm()
    for plain_D, rounded_D in zip(outputs[None], outputs[Fp8.all], strict=True):
        assert (plain_D - rounded_D).norm() < 0.002 * spread
    assert not torch.equal(outputs[None][-1], outputs[Fp8.all][-1])


def make_rounded(plain: torch.nn.Linear, inputs_TK: torch.Tensor, scale: float):
    """A rounded layer for these inputs, and its own rounded inputs."""
    rounded_TK = to_e4m3(inputs_TK * scale)
    with torch.inference_mode():
        weight_CK = plain.weight.clone()
        return rounded_layer(TorchLinear(), weight_CK, plain, inputs_TK, rounded_TK, scale), rounded_TK


def test_a_bias_makes_up_for_what_rounding_does_to_the_mean():
    plain, inputs_TK = torch.nn.Linear(64, 32), 3 + torch.randn(100, 64)
    rounded, rounded_TK = make_rounded(plain, inputs_TK, 8.0)
    with torch.inference_mode():
        wanted_C = plain(inputs_TK).mean(0)
        got_TC = rounded_TK.float() @ rounded.weight.float().T * rounded.factor + rounded.bias
        without_TC = rounded_TK.float() / 8 @ to_e4m3(plain.weight).float().T + plain.bias
    assert (got_TC.mean(0) - wanted_C).abs().max() < 1e-4
    assert (without_TC.mean(0) - wanted_C).abs().max() > 0.01


def test_weights_that_make_up_for_each_other_err_less_than_the_nearest_where_inputs_go_together():
    draws = torch.Generator().manual_seed(0)
    few_TR, mixes_RK = torch.randn(500, 8, generator=draws), torch.randn(8, 300, generator=draws)
    inputs_TK = to_e4m3(few_TR @ mixes_RK + 0.1 * torch.randn(500, 300, generator=draws))
    weight_CK = torch.randn(40, 300, generator=draws) * 100
    rounded_CK = round_weights(weight_CK, inputs_TK, TorchLinear().round_block)
    nearest_CK = weight_CK.clamp(-LARGEST, LARGEST).to(E4M3)

    def error(other_CK: torch.Tensor) -> float:
        centred_TK = inputs_TK.float() - inputs_TK.float().mean(0)
        return float((centred_TK @ (other_CK.float() - weight_CK).T).square().mean().sqrt())

    assert error(rounded_CK) < 0.3 * error(nearest_CK)
    assert (rounded_CK.float() - weight_CK).abs().max() < 0.5 * weight_CK.abs().max()


def test_what_is_too_large_for_e4m3_becomes_nan_and_what_is_not_keeps_its_sign():
    too_large = torch.tensor([448.1, -449.0, 1e9, torch.inf, -torch.inf, torch.nan])
    assert to_e4m3(too_large).float().isnan().all()
    assert to_e4m3(torch.tensor([LARGEST, -LARGEST, 0.0, -1.0])).tolist() == [448.0, -448.0, 0.0, -1.0]


def test_a_channel_of_zeros_stays_so():
    plain = torch.nn.Linear(8, 4)
    plain.weight.data[2] = 0
    rounded, rounded_TK = make_rounded(plain, torch.randn(20, 8), 8.0)
    assert (rounded.weight[2].float() == 0).all()
    assert torch.allclose(rounded(rounded_TK)[:, 2].float(), plain.bias[2].expand(20), rtol=0.01)


@pytest.mark.parametrize("fp8", list(Fp8))
@pytest.mark.parametrize("linear", ["auto", "quack", "triton", "cublas"])
def test_8_bit_products_run_or_say_what_they_need(linear, fp8):
    products = quantized_products(Dtype.fp8, fp8)
    needed = r"dtype=fp8 needs a Hopper GPU \(compute capability 9.0\), this is cpu"
    message = f"^{needed}: use dtype=auto, and leave fp8 out$"
    with pytest.raises(ValueError, match=message):
        choose_kernels(Attention.auto, LinearKind[linear], CPU, choose_dtype(Dtype.fp8, CPU), 64, products)


@pytest.mark.parametrize("linear", ["triton", "cublas"])
def test_where_8_bit_products_run_others_are_refused_by_name(linear):
    message = f"linear={linear} has no products of 8-bit numbers for dtype=fp8: use linear=auto"
    with pytest.raises(ValueError, match=message):
        choose_for_quantized(LinearKind[linear], None)
    assert choose_for_quantized(LinearKind.auto, None) == "quack"


def test_a_protein_that_saturates_is_embedded_again_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_checkpoint(tmp_path / "narrow.pt", NARROW, random_state(NARROW, seed=1))
    proteins = [protein.decode() for protein in real_proteins()[:3]]
    eight_bits, fp32 = (
        Embedder("auto", weights=path, device="cpu", linear="torch", dtype=dtype) for dtype in ("fp8", "fp32")
    )
    assert not np.array_equal(eight_bits.embed(proteins), fp32.embed(proteins))
    with torch.inference_mode():
        eight_bits.engine.model.layers[1].fc1.half_gain.mul_(1000)
    assert np.array_equal(eight_bits.embed(proteins), fp32.embed(proteins))


def test_a_model_that_cannot_be_rounded_is_refused(monkeypatch):
    monkeypatch.setattr(quantize, "HEADROOM", 0.05)  # e4m3 ends far below what the set reaches
    state = random_state(NARROW, seed=1)
    with pytest.raises(ValueError, match=r"dtype=fp8: this model leaves the range .*: use dtype=fp32"):
        make_model(NARROW, state, CPU, LinearKind.torch, Fp8.all)


def test_calibration_proteins_begin_and_end_as_fair_esm_has_it():
    tokens_T, positions_T, seqlens = calibration_pack(CPU)
    begins = tokenize(b"M")[0]
    for start, stop in pairwise(seqlens.bounds):
        assert tokens_T[start] == begins
        assert positions_T[start:stop].tolist() == list(range(stop - start))
    assert seqlens.bounds[-1] == len(tokens_T) > 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [A3B_SHAPED, A650M_SHAPED], ids=["3B-shaped", "650M-shaped"])
@pytest.mark.parametrize("fp8", list(Fp8))
def test_on_a_gpu_8_bit_products_have_the_same_bits_in_any_company_and_fair_esms_numbers(arch, fp8):
    device = torch.device("cuda", 0)
    proteins = real_proteins()
    for hard in (False, True):
        state = random_state(arch, seed=1, hard=hard)
        theirs = fair_esm_means(arch, state, proteins)
        model = make_model(arch, state, device, LinearKind.quack, fp8)
        engine = Engine(model, [arch.num_layers], wants_rows=True, toks_per_batch=25344)
        together = means(engine, proteins[::-1])[::-1]
        alone = [means(engine, [protein])[0] for protein in proteins]
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
        assert_within(Include.mean, E4M3, together, theirs)
        again = make_model(arch, state, device, LinearKind.quack, fp8)
        assert all(
            torch.equal(one, other)
            for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )


@pytest.mark.gpu
def test_on_a_gpu_a_product_has_the_numbers_that_its_layer_computes_and_what_saturates_is_nan():
    from dist_esm.model.kernels.linear_quack import QuackLinear

    device, draws = torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=draws, device=device)  # noqa: E731
    ops, width = QuackLinear(), 1280
    inputs_TK = to_e4m3(new(300, width) * 8)
    factor_F = torch.full((4 * width,), width**-0.5 / 512, device=device)
    fc1 = QuantizedLinear(to_e4m3(new(4 * width, width) * 64), factor_F, new(4 * width), 8.0)
    fc1.half_gain.fill_(LARGEST / 4.0 / 2)  # reaches 4
    wanted_TF = torch.nn.functional.gelu(inputs_TK.float() @ fc1.weight.float().T * fc1.factor + fc1.bias)
    got_TF = ops.gelu(inputs_TK, fc1).float() * (4.0 / LARGEST)
    is_too_large = wanted_TF > 4.0
    assert is_too_large.any()
    assert got_TF[wanted_TF > 4.02].isnan().all()
    fits = wanted_TF < 3.98
    assert not got_TF[fits].isnan().any()
    # e4m3 rounds by up to a 16th; the sum in front of it is off by up to 0.03, as tensor cores add.
    assert ((got_TF - wanted_TF)[fits].abs() <= wanted_TF[fits].abs() / 16 + 0.03).all()
    rounded_TF = to_e4m3(wanted_TF * (LARGEST / 4.0)).float() * (4.0 / LARGEST)
    assert (got_TF == rounded_TF)[fits].float().mean() > 0.8
    factor_D = torch.full((width,), (4 * width) ** -0.5 / 512, device=device)
    fc2 = QuantizedLinear(to_e4m3(new(width, 4 * width) * 64), factor_D, new(width), 8.0)
    stream_TD = (new(300, width) / 64).half()
    inputs_TF = to_e4m3(new(300, 4 * width) * 8)
    wanted_TD = stream_TD.float() * 64 + inputs_TF.float() @ fc2.weight.float().T * fc2.factor + fc2.bias
    ops.residual(stream_TD, inputs_TF, fc2, None)
    errors_TD = (stream_TD.float() * 64 - wanted_TD).abs()  # tensor cores sum with few bits
    assert errors_TD.max() < 0.1
    assert errors_TD.mean() < 0.01


@pytest.mark.gpu
def test_on_a_gpu_weights_are_rounded_as_torch_rounds_them():
    from dist_esm.model.kernels import triton_ops

    draws = torch.Generator("cuda").manual_seed(0)
    inputs_TK = to_e4m3(torch.randn(500, 300, generator=draws, device="cuda") * 8)
    weight_CK = torch.randn(70, 300, generator=draws, device="cuda") * 100
    ours, theirs = (
        round_weights(weight_CK, inputs_TK, way).float() for way in (triton_ops.round_block, round_block)
    )
    assert (ours == theirs).float().mean() > 0.9  # one that falls to the other side moves those after it
    centred_TK = inputs_TK.float() - inputs_TK.float().mean(0)
    errors = [float((centred_TK @ (one - weight_CK).T).square().mean().sqrt()) for one in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.gpu
def test_on_a_gpu_attention_in_8_bits_is_attention_rounded():
    from dist_esm.model.kernels import triton_ops

    draws = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(3, 500, 20, 64, generator=draws, device="cuda").bfloat16()
    seqlens = Seqlens.of([0, 1, 70, 500], qkv.device)
    wide = triton_ops.attend(*qkv, seqlens.tiles, TILE).float()
    got = triton_ops.attend(*qkv, seqlens.tiles, TILE, 200.0)
    assert got.dtype is E4M3
    is_too_large = wide.abs() > 448 / 200 * 1.01
    assert is_too_large.any()
    assert got.float()[is_too_large].isnan().all()
    fits = wide.abs() < 448 / 200 * 0.99
    assert ((got.float() / 200 - wide)[fits].abs() <= wide[fits].abs() / 14 + 1e-4).all()
