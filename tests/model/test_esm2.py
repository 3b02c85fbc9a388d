"""The forward held to fair-esm's own, in fp32 with the same parameters, layer by layer, packed and alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from esm.data import Alphabet

from dist_esm.config import Attention, Config, Include, LinearKind, ModelConfig
from dist_esm.model import weights
from dist_esm.model.engine import Engine, build_engine
from dist_esm.model.esm2 import ESM2, Architecture
from dist_esm.model.kernels.choose import PLAIN, choose_kernels
from dist_esm.model.weights import load_model
from dist_esm.pipeline.retry import embed_pack
from dist_esm.types import Pack, RankResult, SegmentEmbedding
from helpers.checkpoints import A3B_SHAPED, A8M, A35M, fair_esm_model, random_state, write_checkpoint
from helpers.command import run_ranks
from helpers.compare import assert_within, relative_error
from helpers.data import DATA
from helpers.fasta import varied_proteins
from helpers.layers import CPU, SEQUENCES, fair_esm_layers, packed_layers, segment_of

MODELS = [
    pytest.param((A8M, False), id="8M"),
    pytest.param((A8M, True), id="8M-hard"),
    pytest.param((A35M, False), id="35M"),
    pytest.param((A3B_SHAPED, False), id="3B-shaped"),
]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Our model, loaded from a checkpoint file, and fair-esm's with the same parameters."""
    arch, hard = request.param
    state = random_state(arch, seed=1, hard=hard)
    path = write_checkpoint(tmp_path_factory.mktemp("pair") / "model.pt", arch, state)
    config = ModelConfig("tested", arch.num_layers, arch.embed_dim, arch.attention_heads, str(path))
    return load_model(config, CPU, torch.float32, PLAIN), fair_esm_model(arch, state)


def test_every_layer_of_a_pack_is_fair_esms(pair):
    model, oracle = pair
    for sequence, mine in zip(SEQUENCES, packed_layers(model, SEQUENCES), strict=True):
        expected = fair_esm_layers(oracle, sequence)
        assert mine.keys() == expected.keys()
        for layer, tensor in expected.items():
            assert relative_error(mine[layer], tensor) <= 1e-5, (layer, len(sequence))


def test_packed_equals_alone(pair):
    model, _ = pair
    for sequence, packed in zip(SEQUENCES, packed_layers(model, SEQUENCES), strict=True):
        for layer, tensor in packed_layers(model, [sequence])[0].items():
            assert relative_error(packed[layer], tensor) <= 1e-5, (layer, len(sequence))


def test_mean_bos_and_rows_are_fair_esms(pair):
    model, oracle = pair
    layers = [0, 1, model.arch.num_layers]
    engine = Engine(model, layers, wants_rows=True, num_threads=2)
    answers = engine.run(Pack(tuple(segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES))))
    engine.close()
    for sequence, answer in zip(SEQUENCES, answers, strict=True):
        expected = fair_esm_layers(oracle, sequence)
        for layer in layers:
            rows = expected[layer][1 : len(sequence) + 1]
            assert relative_error(torch.from_numpy(answer.rows[layer]), rows) <= 1e-5
            assert relative_error(torch.from_numpy(answer.sums[layer] / len(sequence)), rows.mean(0)) <= 1e-5
            assert relative_error(torch.from_numpy(answer.bos[layer]), expected[layer][0]) <= 1e-5


def test_residues_come_in_the_dtype_to_save_and_sums_in_fp32(pair):
    model, _ = pair
    last = model.arch.num_layers
    pack = Pack(tuple(segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES)))
    wide, half = (
        Engine(model, [last], wants_rows=True, num_threads=1, rows_dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    for one, other in zip(wide.run(pack), half.run(pack), strict=True):
        assert other.rows[last].dtype == np.float16
        np.testing.assert_array_equal(other.rows[last], one.rows[last].astype(np.float16))
        np.testing.assert_array_equal(other.sums[last], one.sums[last])
    wide.close()
    half.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_residue_that_float16_cannot_hold_is_told_of_its_protein_alone(device):
    """One channel of the last LayerNorm is so large that it is too large in about half of the proteins."""
    device = torch.device(device)
    pack = Pack(tuple(segment_of(one, i) for i, one in enumerate(varied_proteins(40))))
    last, state = A8M.num_layers, random_state(A8M, seed=1)
    norm = {name: state[f"emb_layer_norm_after.{name}"] for name in ("weight", "bias")}

    def rows_of(dtype: torch.dtype) -> list[SegmentEmbedding]:
        with torch.device("meta"):
            model = ESM2(
                A8M, choose_kernels(Attention.auto, LinearKind.auto, device, torch.float32, A8M.head_dim)
            )
        weights.fill_parameters(model, state.__getitem__, device, torch.float32)
        with Engine(model.eval(), [last], wants_rows=True, num_threads=1, rows_dtype=dtype) as engine:
            return engine.run(pack)

    norm["weight"][5], norm["bias"][5] = 1.0, 0.0
    largest = [np.abs(one.rows[last][:, 5]).max() for one in rows_of(torch.float32)]
    norm["weight"][5] = 65504 / float(np.median(largest))
    with np.errstate(over="ignore"):
        fit = [bool(np.isfinite(one.rows[last].astype(np.float16)).all()) for one in rows_of(torch.float32)]
    assert 10 < sum(fit) < 30
    assert [bool(one.rows_fit) for one in rows_of(torch.float16)] == fit
    assert all(one.rows_fit for one in rows_of(torch.float32))


def test_a_lower_layer_stops_the_forward_early_with_the_same_numbers(pair):
    model, _ = pair
    full = packed_layers(model, SEQUENCES[1:2])[0]
    seen = []
    hooks = [
        layer.fc1.register_forward_hook(lambda *_, n=n: seen.append(n))
        for n, layer in enumerate(model.layers, start=1)
    ]
    engine = Engine(model, [1], wants_rows=True, num_threads=1)
    answer = engine.run(Pack((segment_of(SEQUENCES[1], 0),)))[0]
    engine.close()
    for hook in hooks:
        hook.remove()
    assert seen == [1]
    assert relative_error(torch.from_numpy(answer.rows[1]), full[1][1:-1]) <= 1e-5


def test_rows_without_a_protein_change_nothing(pair):
    """A GPU fills a pack up to a fixed number of rows.

    The same forward on a CPU shows that they stay out of the answers.
    """
    model, _ = pair
    segments = [segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES)]
    engine = Engine(model, [model.arch.num_layers], wants_rows=True, num_threads=1)
    filled = engine._on_cpu(segments, num_rows=640)
    alone = [engine.run(Pack((one,)))[0] for one in segments]
    engine.close()
    for one, other in zip(filled, alone, strict=True):
        for layer in one.rows:
            assert one.rows[layer].shape == other.rows[layer].shape
            assert (
                relative_error(torch.from_numpy(one.rows[layer]), torch.from_numpy(other.rows[layer])) <= 1e-5
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_bits_are_the_same_in_any_company_and_the_numbers_fair_esms(dtype):
    device = torch.device("cuda", 0)
    state = random_state(A3B_SHAPED, seed=1)
    with torch.device("meta"):
        model = ESM2(
            A3B_SHAPED, choose_kernels(Attention.auto, LinearKind.auto, device, dtype, A3B_SHAPED.head_dim)
        )
    weights.fill_parameters(model, state.__getitem__, device, dtype)
    oracle = fair_esm_model(A3B_SHAPED, state)
    engine = Engine(model.eval(), [2], wants_rows=True, toks_per_batch=1024)
    segments = [segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES)]
    alone = [engine.run(Pack((one,)))[0] for one in segments]
    together = engine.run(Pack(tuple(reversed(segments))))[::-1]
    for sequence, one, other in zip(SEQUENCES, alone, together, strict=True):
        np.testing.assert_array_equal(one.rows[2], other.rows[2])
        np.testing.assert_array_equal(one.sums[2], other.sums[2])
        expected = fair_esm_layers(oracle, sequence)[2][1 : len(sequence) + 1]
        if dtype is torch.float32:
            assert relative_error(torch.from_numpy(one.rows[2]), expected) <= 1e-5
        assert torch.cosine_similarity(torch.from_numpy(one.sums[2]), expected.sum(0), dim=0) >= 0.9999


def test_what_is_not_finite_in_half_precision_is_computed_again_in_fp32(tmp_path):
    """Products of these weights leave fp16's range; fair-esm's fp32 model has no trouble with them."""
    state = random_state(A8M, seed=3)
    state["layers.2.fc2.weight"] *= 1e6
    path = write_checkpoint(tmp_path / "large.pt", A8M, state)
    config = Config(
        model=ModelConfig("large", A8M.num_layers, A8M.embed_dim, A8M.attention_heads, str(path)),
        include=[Include.mean, Include.per_tok],
    )
    engine = build_engine(config, CPU, torch.float16, PLAIN, num_threads=2)
    segments = tuple(segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES))
    assert not all(np.isfinite(answer.sums[6]).all() for answer in engine.run(Pack(segments)))
    result = RankResult()
    answers = embed_pack(engine, Pack(segments), result)
    engine.close()
    assert result.num_recomputed > 0
    oracle = fair_esm_model(A8M, state)
    for sequence, answer in zip(SEQUENCES, answers, strict=True):
        expected = fair_esm_layers(oracle, sequence)[6][1 : len(sequence) + 1]
        assert relative_error(torch.from_numpy(answer.rows[6]), expected) <= 1e-5


@pytest.mark.parametrize("num_threads", [1, 2])
def test_same_bits_in_any_company(pair, num_threads):
    model, _ = pair
    segments = [segment_of(sequence, i) for i, sequence in enumerate(SEQUENCES)]
    engine = Engine(model, [model.arch.num_layers], wants_rows=True, num_threads=num_threads)
    alone = [engine.run(Pack((one,)))[0] for one in segments]
    together = engine.run(Pack(tuple(reversed(segments))))[::-1]
    engine.close()
    for one, other in zip(alone, together, strict=True):
        for kind in ("sums", "bos", "rows"):
            for layer, array in getattr(one, kind).items():
                np.testing.assert_array_equal(array, getattr(other, kind)[layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close_to_fair_esms_fp32(dtype):
    """By the yardstick of `job=selfcheck`, on means and on residues."""
    proteins = varied_proteins(24)
    for hard in (False, True):
        state = random_state(A8M, seed=2, hard=hard)
        oracle = fair_esm_model(A8M, state)
        engine = Engine(model_in(dtype, A8M, state), [A8M.num_layers], wants_rows=True, num_threads=2)
        answers = engine.run(Pack(tuple(segment_of(sequence, i) for i, sequence in enumerate(proteins))))
        engine.close()
        ours = [answer.rows[A8M.num_layers] for answer in answers]
        theirs = [fair_esm_layers(oracle, one)[A8M.num_layers][1:-1].numpy() for one in proteins]
        assert_within(Include.per_tok, dtype, ours, theirs)
        found = assert_within(
            Include.mean, dtype, [one.mean(0) for one in ours], [one.mean(0) for one in theirs]
        )
        assert found.worst_error > 0.0001  # it is not fp32
        if dtype is torch.float16:
            assert found.worst_error < 0.005  # three bits more than bf16


def test_a_hard_model_is_like_the_real_ones():
    """After the last LayerNorm as the real 3B: most of a vector's length is one channel, the same for all."""
    state = random_state(A8M, seed=2, hard=True)
    oracle = fair_esm_model(A8M, state)
    rows = torch.cat([fair_esm_layers(oracle, one)[A8M.num_layers][1:-1] for one in varied_proteins(8)])
    means, deviations = rows.mean(0), rows.std(0)
    constant = int(means.abs().argmax())
    assert float(means[constant]) == pytest.approx(13.64, abs=0.5)
    assert 0.01 < float(deviations[constant]) < 0.5
    shares = rows[:, constant].square() / rows.square().sum(1)
    assert 0.8 < float(shares.mean()) < 0.95
    assert float(torch.cosine_similarity(rows[:1], rows[1:]).min()) > 0.97


def model_in(dtype: torch.dtype, arch: Architecture, state) -> ESM2:
    with torch.device("meta"):
        model = ESM2(arch, PLAIN)
    weights.fill_parameters(model, state.__getitem__, CPU, dtype)
    return model.eval()


def test_truncation_is_fair_esms(checkpoint_8m, tmp_path):
    """The first 1,022 residues, as fair-esm's batch converter and its extract script take them."""
    header, *lines = (DATA / "long.fasta").read_text().splitlines()
    sequence = "".join(lines)
    assert len(sequence) > 1022
    result = run_ranks(
        None,
        f"input={DATA / 'long.fasta'}",
        f"output_dir={tmp_path}",
        "model=esm2_t6_8M_UR50D",
        f"model.weights={checkpoint_8m}",
    )
    assert result.returncode == 0, result.stderr
    oracle = fair_esm_model(A8M, random_state(A8M))
    _, _, tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter(1022)([("id", sequence)])
    with torch.inference_mode():
        expected = oracle(tokens, repr_layers=[6])["representations"][6][0, 1:1023].mean(0)
    output = torch.load(tmp_path / "long_ESM.pt", weights_only=True)
    assert output["proteins"] == [header[1:].split()[0]]
    assert relative_error(output["data"][0], expected) <= 1e-5
