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
LINEAR = {"torch": TorchLinear(), "triton": SimpleNamespace(name="triton")}
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
        ("A100", (8, 0), torch.bfloat16, "attention=triton linear=triton"),
        ("L40S", (8, 9), torch.bfloat16, "attention=triton linear=triton"),
        ("H100", (9, 0), torch.bfloat16, "attention=triton linear=triton"),
        ("B200", (10, 0), torch.bfloat16, "attention=triton linear=triton"),
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
    monkeypatch.setattr(choose, "load_linear", lambda name: LINEAR[name])
    device = torch.device("cuda", 0)
    assert choose_dtype(Dtype.auto, device) is dtype
    assert str(choose_kernels(Attention.auto, LinearKind.auto, device, dtype, 64)) == kernels
    is_advised = what_would_be_faster(LinearKind.auto, device, dtype, 64) != ""
    assert is_advised is (card == "H100")


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("attention", "linear"), [("auto", "auto"), ("triton", "triton"), ("triton", "torch"), ("sdpa", "triton")]
)
def test_on_a_gpu_every_implementation_has_the_same_bits_in_any_company_and_fair_esms_numbers(
    arch, dtype, attention, linear
):
    device = torch.device("cuda", 0)
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
        assert kernels.linear.any_rows == (kernels.linear.name == "quack")
        assert (engine.num_rows(Pack((segments[0],))) < 2304) == kernels.linear.any_rows
        all_rows = [engine.run(Pack((one,)), num_rows=2304)[0] for one in segments]
        for one, other, third in zip(alone, together, all_rows, strict=True):
            assert same(one, other)
            assert same(one, third)
        ours = [one.sums[last] / len(sequence) for one, sequence in zip(alone, proteins, strict=True)]
        theirs = [fair_esm_layers(oracle, one)[last][1:-1].mean(0).numpy() for one in proteins]
        assert_within(Include.mean, dtype, ours, theirs)


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
