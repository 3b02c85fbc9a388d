"""Implementations of a block: their choice, their layout of weights, and on a GPU their numbers and bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_esm.config import Attention, DeviceKind, Dtype, Include, LinearKind
from dist_esm.model import weights
from dist_esm.model.engine import Engine
from dist_esm.model.esm2 import ESM2
from dist_esm.model.kernels import choose
from dist_esm.model.kernels.attention import sdpa
from dist_esm.model.kernels.choose import (
    Kernels,
    choose_device,
    choose_dtype,
    choose_kernels,
    runs_on,
    what_would_be_faster,
)
from dist_esm.model.kernels.linear import TorchLinear, angles
from dist_esm.types import Pack
from helpers.checkpoints import A3B_SHAPED, A8M, A35M, A650M_SHAPED, fair_esm_model, random_state
from helpers.compare import assert_within, relative_error
from helpers.fasta import varied_proteins
from helpers.layers import SEQUENCES, fair_esm_layers, packed_layers, segment_of

CPU = torch.device("cpu")
LINEAR = {
    "torch": TorchLinear(),
    "triton": SimpleNamespace(name="triton"),
    "cublas": SimpleNamespace(name="cublas"),
}
"""What the name of an implementation stands for where its package is not at hand."""


@pytest.mark.parametrize(
    ("attention", "linear", "message"),
    [
        (
            "triton",
            "auto",
            "attention=triton needs a CUDA GPU of compute capability 8.0 or newer, this is cpu: "
            "use attention=auto",
        ),
        (
            "auto",
            "quack",
            "linear=quack needs a Hopper GPU (compute capability 9.0), this is cpu: use linear=auto",
        ),
        (
            "auto",
            "triton",
            "linear=triton needs a CUDA GPU of compute capability 8.0 or newer, this is cpu: use linear=auto",
        ),
    ],
)
def test_what_is_named_runs_or_says_what_it_needs(attention, linear, message):
    with pytest.raises(ValueError, match="needs") as error:
        choose_kernels(Attention[attention], LinearKind[linear], CPU, torch.float32, 64)
    assert str(error.value) == message


def test_heads_that_triton_cannot_load_at_once_are_refused_or_left_to_cublas(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(choose, "is_installed", lambda package: package == "triton")
    monkeypatch.setattr(choose, "load_triton", lambda: sdpa)
    monkeypatch.setattr(choose, "load_linear", lambda name, dtype: LINEAR[name])
    device = torch.device("cuda", 0)
    chosen = choose_kernels(Attention.auto, LinearKind.auto, device, torch.bfloat16, 20)
    assert str(chosen) == "attention=triton linear=cublas"
    message = "linear=triton needs attention heads of a multiple of 8 channels, this model's have 20: use"
    with pytest.raises(ValueError, match=message):
        choose_kernels(Attention.auto, LinearKind.triton, device, torch.bfloat16, 20)


def test_auto_is_what_runs_anywhere_on_a_cpu():
    assert (
        str(choose_kernels(Attention.auto, LinearKind.auto, CPU, torch.bfloat16, 64))
        == "attention=sdpa linear=torch"
    )


class Neighbours(TorchLinear):
    """torch's operations over the layout that the products with a rotation inside want.

    Numbers that are rotated against each other lie side by side.
    """

    interleaves = True

    def rotary(self, positions_T, inv_freq):
        return angles(positions_T, inv_freq).unsqueeze(1)

    def qkv(self, h_TD, linear, rotary, num_heads):
        def turn(x_TNH):
            pairs = torch.view_as_complex(x_TNH.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(rotary), rotary)).flatten(-2)

        q_TNH, k_TNH, v_TNH = linear(h_TD).view(len(h_TD), 3, num_heads, -1).unbind(1)
        return turn(q_TNH), turn(k_TNH), v_TNH


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("compute_120", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_120", (12, 0), True),
        ("sm_50", (12, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(architecture, capability, runs):
    assert runs_on(architecture, *capability) is runs


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            {"device_count": 4, "is_available": True, "built_for": ["sm_50", "sm_75"]},
            r"has no kernels for Some GPU \(compute capability 9\.0; it is built for sm_50 sm_75\): install",
        ),
        (
            {"device_count": 4, "is_available": False},
            r"h has 4 GPU\(s\) that torch .* cannot use: update the",
        ),
        (
            {"device_count": 1, "is_available": True, "built_for": ["sm_90"]},
            r"2 ranks were started on h, which has 1 visible GPU\(s\)",
        ),
        ({"device_count": 0, "is_available": False}, r"device=cuda: .*use device=cpu"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line(facts, line, monkeypatch):
    """What torch would say of the machine is arranged; there is no such machine to test on."""
    said = {
        "device_count": facts["device_count"],
        "is_available": facts["is_available"],
        "get_arch_list": facts.get("built_for"),
        "get_device_capability": (9, 0),
        "get_device_name": "Some GPU",
        "set_device": None,
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(ValueError, match=line) as caught:
        choose_device(DeviceKind.cuda, 1, 2, "h")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("card", "capability", "dtype", "kernels"),
    [
        ("P100", (6, 0), torch.float32, "attention=sdpa linear=torch"),
        ("V100", (7, 0), torch.float16, "attention=sdpa linear=torch"),
        ("T4", (7, 5), torch.float16, "attention=sdpa linear=torch"),
        ("A100", (8, 0), torch.bfloat16, "attention=triton linear=cublas"),
        ("L40S", (8, 9), torch.bfloat16, "attention=triton linear=cublas"),
        ("H100", (9, 0), torch.bfloat16, "attention=triton linear=triton"),
        ("B200", (10, 0), torch.bfloat16, "attention=triton linear=cublas"),
        ("RTX 5090", (12, 0), torch.bfloat16, "attention=triton linear=cublas"),
    ],
)
def test_auto_takes_the_precision_that_a_card_has_tensor_cores_for(
    card, capability, dtype, kernels, monkeypatch
):
    """What torch would say of the card is arranged; a card of each kind is not at hand."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    monkeypatch.setattr(choose, "is_installed", lambda package: package == "triton")
    monkeypatch.setattr(choose, "load_triton", lambda: sdpa)
    monkeypatch.setattr(choose, "load_linear", lambda name, dtype: LINEAR[name])
    device = torch.device("cuda", 0)
    assert choose_dtype(Dtype.auto, device) is dtype
    assert str(choose_kernels(Attention.auto, LinearKind.auto, device, dtype, 64)) == kernels
    is_advised = what_would_be_faster(LinearKind.auto, device, dtype, 64) != ""
    assert is_advised is (card == "H100")


@pytest.mark.parametrize(
    ("card", "capability", "kernels"),
    [
        ("T4", (7, 5), "attention=sdpa linear=torch"),
        ("A100", (8, 0), "attention=triton linear=triton"),
        ("RTX 4090", (8, 9), "attention=triton linear=torch"),
        ("H100", (9, 0), "attention=triton linear=triton"),
        ("B200", (10, 0), "attention=triton linear=triton"),
        ("RTX 5090", (12, 0), "attention=triton linear=torch"),
    ],
)
def test_auto_multiplies_fp32_as_pairs_where_tensor_cores_are_fast_enough(
    card, capability, kernels, monkeypatch
):
    """What torch would say of the card is arranged."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(choose, "is_installed", lambda package: package == "triton")
    monkeypatch.setattr(choose, "load_triton", lambda: sdpa)
    monkeypatch.setattr(choose, "load_linear", lambda name, dtype: LINEAR[name])
    device = torch.device("cuda", 0)
    assert str(choose_kernels(Attention.auto, LinearKind.auto, device, torch.float32, 64)) == kernels


def test_what_would_be_faster_is_said_where_it_would_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    advice = what_would_be_faster(LinearKind.auto, device, bf16, 64)
    assert advice.startswith("pip install 'dist_esm[hopper]' makes this card up to 1.2 times as fast")
    assert what_would_be_faster(LinearKind.triton, device, bf16, 64) == ""
    assert what_would_be_faster(LinearKind.auto, device, torch.float32, 64) == ""
    assert what_would_be_faster(LinearKind.auto, device, bf16, 20) == ""
    assert what_would_be_faster(LinearKind.auto, CPU, bf16, 64) == ""
    monkeypatch.setattr(choose, "is_installed", lambda package: True)
    assert what_would_be_faster(LinearKind.auto, device, bf16, 64) == ""


@pytest.mark.parametrize("hard", [False, True])
def test_queries_and_keys_side_by_side_give_fair_esms_numbers(hard):
    state = random_state(A8M, seed=1, hard=hard)
    with torch.device("meta"):
        model = ESM2(A8M, Kernels("sdpa", sdpa, Neighbours()))
    weights.fill_parameters(model, state.__getitem__, CPU, torch.float32)
    oracle = fair_esm_model(A8M, state)
    for sequence, mine in zip(SEQUENCES, packed_layers(model.eval(), SEQUENCES), strict=True):
        for layer, tensor in fair_esm_layers(oracle, sequence).items():
            assert relative_error(mine[layer], tensor) <= 1e-5, (layer, len(sequence))


def same(one, other) -> bool:
    """Return True if two answers have the same bits."""
    parts = ((getattr(one, kind), getattr(other, kind)) for kind in ("sums", "bos", "rows"))
    return all(np.array_equal(a[layer], b[layer]) for a, b in parts for layer in a)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "arch", [A3B_SHAPED, A650M_SHAPED, A35M, A8M], ids=["3B-shaped", "650M-shaped", "35M", "8M"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("attention", "linear"),
    [("auto", "auto"), ("triton", "triton"), ("triton", "cublas"), ("triton", "torch"), ("sdpa", "triton")],
)
def test_on_a_gpu_every_implementation_has_the_same_bits_in_any_company_and_fair_esms_numbers(
    arch, dtype, attention, linear
):
    device = torch.device("cuda", 0)
    if linear == "cublas" and dtype is torch.float32:
        with pytest.raises(ValueError, match=r"linear=cublas needs dtype=bf16 or fp16, this is float32"):
            choose_kernels(Attention[attention], LinearKind[linear], device, dtype, arch.head_dim)
        return
    kernels = choose_kernels(Attention[attention], LinearKind[linear], device, dtype, arch.head_dim)
    last = arch.num_layers
    proteins = [*SEQUENCES, *varied_proteins(24)]
    for hard in (False, True):
        state = random_state(arch, seed=1, hard=hard)
        with torch.device("meta"):
            model = ESM2(arch, kernels)
        weights.fill_parameters(model, state.__getitem__, device, dtype)
        engine = Engine(model.eval(), [1, last], wants_rows=True, toks_per_batch=2304)
        oracle = fair_esm_model(arch, state)
        segments = [segment_of(sequence, i) for i, sequence in enumerate(proteins)]
        alone = [engine.run(Pack((one,)))[0] for one in segments]
        together = engine.run(Pack(tuple(reversed(segments))))[::-1]
        assert kernels.linear.any_rows == (kernels.linear.name in ("quack", "triton"))
        assert (engine.num_rows(Pack((segments[0],))) < 2304) == kernels.linear.any_rows
        all_rows = [engine.run(Pack((one,)), num_rows=2304)[0] for one in segments]
        for one, other, third in zip(alone, together, all_rows, strict=True):
            assert same(one, other)
            assert same(one, third)
        ours = [one.sums[last] / len(sequence) for one, sequence in zip(alone, proteins, strict=True)]
        theirs = [fair_esm_layers(oracle, one)[last][1:-1].mean(0).numpy() for one in proteins]
        assert_within(Include.mean, dtype, ours, theirs)


def step_in_fp64(epilogue, product_TC, out_TC, turn_TH, heads):
    """Apply the step after a product as torch does it."""
    if epilogue == "gelu":
        return torch.nn.functional.gelu(product_TC)
    if epilogue == "residual":
        return out_TC + product_TC
    qkv_T3NH = product_TC.unflatten(1, (3, heads, -1))
    turned = torch.view_as_complex(
        qkv_T3NH[:, :2].unflatten(-1, (-1, 2)).contiguous()
    ) * torch.view_as_complex(turn_TH.double().unflatten(-1, (-1, 2)).contiguous()).view(
        len(turn_TH), 1, 1, -1
    )
    return torch.cat((torch.view_as_real(turned).flatten(-2), qkv_T3NH[:, 2:]), 1).flatten(1)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_and_head", [(20, 16), (20, 24), (20, 64), (8, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("epilogue", ["gelu", "residual", "rotation"])
def test_on_a_gpu_a_product_and_its_step_have_the_numbers_of_fp64_and_the_same_bits_for_a_row_alone(
    epilogue, dtype, heads_and_head
):
    from dist_esm.model.kernels import triton_ops, triton_pairs
    from dist_esm.model.kernels.triton_products import product

    heads, head = heads_and_head
    device, width, num_rows = torch.device("cuda", 0), heads * head, 1000
    inner = 4 * width if epilogue == "residual" else width
    columns = {"gelu": 4, "residual": 1, "rotation": 3}[epilogue] * width
    draw = torch.Generator(device).manual_seed(0)
    a, weight, bias, stream = (
        torch.randn(shape, generator=draw, device=device)
        for shape in ((num_rows, inner), (columns, inner), (columns,), (num_rows, columns))
    )
    a[:, 3] *= 30  # an outlier channel
    weight *= torch.exp(2 * torch.randn(columns, 1, generator=draw, device=device)) / inner**0.5
    angles_TH = 6 * torch.rand(num_rows, head // 2, generator=draw, device=device)
    turn = torch.stack((angles_TH.cos(), angles_TH.sin()), -1).flatten(1) if epilogue == "rotation" else None
    if dtype is torch.float32:
        rounded_a, rounded_weight = a, weight
        a = triton_pairs.to_pairs(a)
        weight, gain = triton_pairs.weight_pairs(weight)
        parameters, factor, scale = torch.stack((bias, gain)), 1e-6, 1.0
        out = stream.clone() if epilogue == "residual" else None
        shape, kind = (num_rows, columns), torch.float32
        if epilogue == "gelu":
            shape, kind = (num_rows, 2 * columns), torch.float16
    else:
        a, weight = a.to(dtype), weight.to(dtype)
        rounded_a, rounded_weight, parameters = a, weight, bias
        factor, scale = (4e-3 if dtype is torch.bfloat16 else 5e-4), 1.0
        out, shape, kind = None, (num_rows, columns), dtype
        if epilogue == "residual":
            out, scale, factor = triton_ops.to_stream(stream), 1 / triton_ops.SCALE, 5e-4
    out = torch.empty(shape, dtype=kind, device=device) if out is None else out
    before = out.clone()
    exact = step_in_fp64(
        epilogue,
        rounded_a.double() @ rounded_weight.double().T + bias.double(),
        before.double() * scale if epilogue == "residual" else None,
        turn,
        heads,
    )
    product(epilogue, a, weight, parameters, out, turn)
    ours = out.double() * scale
    if dtype is torch.float32 and epilogue == "gelu":
        ours = (ours[:, :columns] + ours[:, columns:]) / triton_pairs.PAIR_SCALE.value
    assert relative_error(ours, exact) <= factor
    for first, stop in ((0, 1), (5, 133), (999, 1000), (200, 1000)):
        alone = before[first:stop].clone()
        rows = slice(first, stop)
        product(
            epilogue, a[rows].contiguous(), weight, parameters, alone, None if turn is None else turn[rows]
        )
        assert torch.equal(alone, out[rows])


@pytest.mark.gpu
def test_on_a_gpu_a_number_that_fits_no_pair_is_not_finite_and_spoils_its_row_alone():
    from dist_esm.model.kernels import triton_pairs
    from dist_esm.model.kernels.triton_products import product

    device = torch.device("cuda", 0)
    draw = torch.Generator(device).manual_seed(0)
    a, weight = (torch.randn(shape, generator=draw, device=device) for shape in ((300, 320), (640, 320)))
    a[7, 5] = 20_000
    pairs, gain = triton_pairs.weight_pairs(weight)
    parameters = torch.stack((torch.zeros_like(gain), gain))
    out = torch.zeros(300, 640, device=device)
    product("residual", triton_pairs.to_pairs(a), pairs, parameters, out)
    is_finite = out.isfinite().all(1)
    assert is_finite.logical_not().nonzero().flatten().tolist() == [7]
    assert relative_error(out[is_finite].double(), (a.double() @ weight.double().T)[is_finite]) <= 1e-6


LAUNCH = """
import hashlib, logging, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import torch
from dist_esm.config import Attention, LinearKind
from dist_esm.model import weights
from dist_esm.model.engine import Engine
from dist_esm.model.esm2 import ESM2
from dist_esm.model.kernels.choose import choose_kernels
from dist_esm.types import Pack
from helpers.checkpoints import A650M_SHAPED, random_state
from helpers.layers import SEQUENCES, segment_of

device = torch.device("cuda", 0)
kernels = choose_kernels(Attention.auto, LinearKind.quack, device, torch.bfloat16, A650M_SHAPED.head_dim)
with torch.device("meta"):
    model = ESM2(A650M_SHAPED, kernels)
weights.fill_parameters(model, random_state(A650M_SHAPED, seed=1).__getitem__, device, torch.bfloat16)
engine = Engine(model.eval(), [2], wants_rows=True, toks_per_batch=2304)
(answer,) = engine.run(Pack((segment_of(SEQUENCES[-1], 0),)))
print(hashlib.sha256(answer.rows[2].tobytes()).hexdigest(), "quack" in sys.modules)
"""


@pytest.mark.gpu
def test_on_a_gpu_a_second_launch_does_not_import_the_compiler_and_has_the_same_bits(tmp_path):
    choose_kernels(Attention.auto, LinearKind.quack, torch.device("cuda", 0), torch.bfloat16, 64)
    (tmp_path / "a file").touch()

    def launch(cache):
        command = [sys.executable, "-W", "ignore", "-c", LAUNCH, str(Path(__file__).parents[1])]
        done = subprocess.run(
            command,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / cache)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        *messages, result = done.stdout.splitlines()
        return messages, result.split()

    messages, (bits, has_compiled) = launch("cache")
    assert (messages, has_compiled) == ([], "True")
    assert launch("cache") == ([], [bits, "False"])
    messages, result = launch("a file")
    assert result == [bits, "True"]
    assert len(messages) == 3
    assert all("cannot be kept, every launch compiles it anew" in message for message in messages)
