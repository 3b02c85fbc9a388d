"""job=selfcheck: its figures, held to figures worked out apart, and the faults that it should find."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.data import Alphabet
from hypothesis import given
from hypothesis import strategies as st

from dist_esm import Embedder
from dist_esm.config import Config, Include, ModelConfig, SaveDtype, SelfcheckConfig
from dist_esm.distributed import World
from dist_esm.jobs.selfcheck.compare import Limits, RankCheck, compare, list_problems, make_table
from dist_esm.jobs.selfcheck.job import check_bits, compare_models, describe_protein, full_packs
from dist_esm.jobs.selfcheck.oracle import (
    embed_with_fair_esm,
    has_fair_esm_tokens,
    needed_bytes,
    refuse_what_does_not_fit,
)
from dist_esm.jobs.selfcheck.sample import (
    SampledProtein,
    Sampler,
    choose_sample,
    read_candidates,
    segments_of,
)
from dist_esm.jobs.setup import Setup
from dist_esm.model.engine import Engine
from dist_esm.model.esm2 import Architecture
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import load_model
from dist_esm.planning.inputs import find_files
from dist_esm.planning.units import cut_files, make_units
from dist_esm.types import Count, Pack
from helpers.checkpoints import A8M, fair_esm_model, random_state, write_checkpoint
from helpers.command import MODEL, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import read_sequences

CPU = torch.device("cpu")
SOURCES = ("large.fasta", "medium.faa", "viruses/small.fa.gz", "viruses/tiny.fas")


def selfcheck(inputs: Path, out: Path, *settings: str, num_ranks: int | None = None):
    result = run_ranks(num_ranks, f"input={inputs}", f"output_dir={out}", MODEL, "job=selfcheck", *settings)
    path = out / "selfcheck.json"
    return result, json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.distributed
def test_the_figures_of_two_ranks_are_those_worked_out_apart(tmp_path, checkpoint_8m):
    """In bf16, truncated: ours through the Python API, theirs through fair-esm's, distances by torch."""
    wanted = [
        "include=[bos,per_tok]",
        "dtype=bf16",
        "truncation_seq_length=100",
        "toks_per_batch=400",
        "selfcheck.proteins=4",
    ]
    result, found = selfcheck(PROTEINS, tmp_path, f"model.weights={checkpoint_8m}", *wanted, num_ranks=2)
    assert result.returncode == 0, result.stderr
    assert "all 2 ranks: the same bits" in result.stdout
    assert result.stdout.endswith("ok: within the limits\n")
    letters = {
        name: (source, text[:100])
        for source in SOURCES
        for name, text in read_sequences(PROTEINS / source).items()
    }
    lengths = [one["embedded"] for one in found["sample"]]
    assert (len(lengths), lengths[0], lengths[-1]) == (4, min(len(text) for _, text in letters.values()), 100)
    letters = {one["id"]: letters[one["id"]] for one in found["sample"]}
    assert [(one["source"], one["embedded"]) for one in found["sample"]] == [
        (source, len(text)) for source, text in letters.values()
    ]
    embedder = Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", dtype="bf16")
    texts = [text for _, text in letters.values()]
    ours = {
        "mean": embedder.embed(texts),
        "bos": embedder.embed(texts, include="bos"),
        "per_tok": embedder.embed(texts, include="per_tok"),
    }
    oracle = fair_esm_model(A8M, random_state(A8M))
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    with torch.inference_mode():
        hidden = [
            oracle(convert([("", text)])[2], repr_layers=[6])["representations"][6][0] for text in texts
        ]
    theirs = {
        "mean": [one[1:-1].mean(0) for one in hidden],
        "bos": [one[0] for one in hidden],
        "per_tok": [one[1:-1] for one in hidden],
    }
    for rank in found["ranks"]:
        assert [one["kind"] for one in rank["comparisons"]] == ["mean", "bos", "per_tok"]
        for one in rank["comparisons"]:
            kind = one["kind"]
            mine = [torch.from_numpy(np.atleast_2d(values)).double() for values in ours[kind]]
            others = [torch.atleast_2d(values).double() for values in theirs[kind]]
            centre = torch.cat(others).mean(0)
            spread = (torch.cat(others) - centre).pow(2).sum(1).mean().sqrt()
            pairs = list(zip(mine, others, strict=True))
            cosines = torch.cat([torch.cosine_similarity(a - centre, b - centre) for a, b in pairs])
            errors = [float((a - b).pow(2).sum(1).mean().sqrt() / spread) for a, b in pairs]
            assert max(errors) > 1e-3  # bf16 is not fp32
            assert one["spread"] == pytest.approx(float(spread), rel=1e-5)
            assert one["worst_error"] == pytest.approx(max(errors), rel=1e-3)
            assert one["worst_vector"] == pytest.approx(
                max(float(((a - b).norm(dim=1) / spread).max()) for a, b in pairs), rel=1e-3
            )
            assert one["shift"] == pytest.approx(
                float((torch.cat(mine) - torch.cat(others)).mean(0).norm() / spread), rel=1e-2
            )
            assert one["worst_cosine"] == pytest.approx(float(cosines.min()), abs=1e-6)
            assert one["median_cosine"] == pytest.approx(np.median(cosines.numpy()), abs=1e-6)
            assert one["largest_relative_error"] == pytest.approx(
                max(float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in pairs), rel=1e-3
            )
            assert one["largest_difference"] == pytest.approx(
                max(float((a - b).abs().max()) for a, b in pairs), rel=1e-3
            )
            name = list(letters)[errors.index(max(errors))]
            assert one["worst_protein"] == f"{name} ({letters[name][0]}, {len(letters[name][1])} residues)"
            assert one["limits"]["max_relative_error"] is None
            assert one["limits"]["max_spread_error"] == (0.09 if kind == "bos" else 0.03)
            assert (one["neighbours_kept"] is None) == (kind != "per_tok")
        assert "mean of layer 6: no neighbours were compared, which takes 21 vectors or more" in result.stdout
        assert rank["num_answers"] > 2 * len(letters)
        assert rank["other_bits"] == {}
    assert found["ranks"][0]["bits"] == found["ranks"][1]["bits"]


def test_over_the_limits_is_exit_code_1_and_nothing_of_an_embedding_is_touched(tmp_path):
    """Random weights, windows, a file that is no FASTA, and a directory that holds something else."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.fasta").write_text(
        ">short\nmk\n>long\n" + "MKTAYIAKQRQISFVKSHFSRQ" * 4 + "\n>empty\n"
    )
    (tmp_path / "in" / "b.fasta").write_text("no header\n")
    there = {
        "a_ESM.pt": "an output",
        "report.json": "{}",
        ".dist_esm/journal.jsonl": "a journal",
        ".dist_esm/settings.json": "settings",
    }
    for name, text in there.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    windows = "long=window", "truncation_seq_length=40", "window_overlap=10", "toks_per_batch=100"
    result, found = selfcheck(
        tmp_path / "in",
        tmp_path / "out",
        "model.weights=random",
        "selfcheck.max_relative_error=0",
        "repr_layers=[0,-1]",
        *windows,
    )
    assert result.returncode == 1, result.stderr
    assert (
        "over: rank 0: mean of layer 6 is over the limit "
        "(error <= 0.03, kept >= 0.99, relative <= 0): error " in result.stdout
    )
    assert "b.fasta: line 1 has text before the first '>'" in result.stdout
    assert "WEIGHTS ARE RANDOM" in result.stdout
    assert "Traceback" not in result.stderr
    assert (found["status"], found["proteins_seen"], len(found["not_read"])) == ("over", 2, 1)
    assert [(one["id"], one["embedded"], one["segments"]) for one in found["sample"]] == [
        ("short", 2, 1),
        ("long", 88, 3),
    ]
    (rank,) = found["ranks"]
    assert [one["layer"] for one in rank["comparisons"]] == [0, 6]
    assert 0 < rank["comparisons"][1]["largest_relative_error"] <= 1e-5
    assert not rank["comparisons"][1]["is_within"]
    content = {
        str(path.relative_to(tmp_path / "out")): path.read_text()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert content.pop("selfcheck.json")
    assert content == there


def test_numbers_are_judged_as_they_are_saved(tmp_path):
    """In fp32 half precision is all that they lose, of every kind alike, and no fault."""
    weights = write_checkpoint(tmp_path / "hard.pt", A8M, random_state(A8M, hard=True))
    settings = ("dtype=fp32", "save_dtype=float16", "include=[mean,bos,per_tok]", "toks_per_batch=600")
    few = ("selfcheck.proteins=24", "truncation_seq_length=40", f"model.weights={weights}", "device=cpu")
    result, found = selfcheck(PROTEINS, tmp_path / "out", *settings, *few)
    assert result.returncode == 0, result.stdout + result.stderr
    for comparison in found["ranks"][0]["comparisons"]:
        assert 1e-4 < comparison["largest_relative_error"] < 2**-11
    assert found["limits"]["mean"]["max_relative_error"] == pytest.approx(1e-5 + 2**-11)


@pytest.mark.distributed
def test_what_is_over_a_limit_says_what_is_closer_and_that_is_so(tmp_path):
    arch = Architecture(2, 64, 4)
    weights = write_checkpoint(tmp_path / "narrow.pt", arch, random_state(arch, seed=1, hard=True))
    settings = ("model=auto", f"model.weights={weights}", "device=cpu", "toks_per_batch=1000")
    settings += ("selfcheck.max_spread_error=0.03", "selfcheck.min_neighbours_kept=0", "linear=torch")
    errors = {}
    for dtype, closer in (
        (("dtype=fp8",), "fp8=ffn, or dtype=bf16"),
        (("dtype=fp8", "fp8=ffn"), "dtype=bf16"),
        (("dtype=bf16",), None),
    ):
        line = [f"input={PROTEINS}", f"output_dir={tmp_path / 'out'}", "job=selfcheck", *settings, *dtype]
        result = run_ranks(None, *line, XDG_CACHE_HOME=str(tmp_path))
        assert (result.returncode == 0) is (closer is None), result.stdout + result.stderr
        said = [row for row in result.stdout.splitlines() if row.startswith("closer")]
        assert said == ([] if closer is None else [f"closer to fair-esm's numbers: {closer}"])
        found = json.loads((tmp_path / "out" / "selfcheck.json").read_text())
        errors[dtype] = found["ranks"][0]["comparisons"][0]["worst_error"]
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


def test_an_input_without_a_protein_is_refused(tmp_path):
    (tmp_path / "a.fasta").write_text(">empty\n")
    result, found = selfcheck(tmp_path / "a.fasta", tmp_path / "out", "model.weights=random")
    assert (result.returncode, found) == (1, None)
    assert (
        "dist_esm: error: input has no protein to check: all records are empty or left out" in result.stderr
    )
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A configuration with a half-precision checkpoint, its sample, and the answers of fair-esm's model.

    The checkpoints of 3B and 15B are in half precision, too.
    """
    state = {name: tensor.half() for name, tensor in random_state(A8M, seed=3).items()}
    path = write_checkpoint(tmp_path_factory.mktemp("parts") / "half.pt", A8M, state)
    model = ModelConfig("esm2_t6_8M_UR50D", A8M.num_layers, A8M.embed_dim, A8M.attention_heads, str(path))
    config = Config(
        input=str(PROTEINS),
        model=model,
        selfcheck=SelfcheckConfig(proteins=4),
        include=[Include.mean, Include.bos],
    )
    files = find_files([str(PROTEINS)])
    units = make_units(
        [(number, piece, Count(), problem) for number, piece, problem in cut_files(files, 1)], 10**6
    )
    sampler, _ = read_candidates(units, files, config)
    proteins = choose_sample(sampler.candidates(), 4)
    world = World(None, 0, 1, 0, 1)
    return config, world, proteins, embed_with_fair_esm(config, CPU, proteins, world, None)


def check(parts, state=None, dtype=torch.float32, engine_type=Engine):
    """The check with another model in place of the configured one; a rank's findings."""
    config, world, proteins, theirs = parts
    model = config.model
    if state is not None:
        path = write_checkpoint(Path(model.weights).with_name("other.pt"), A8M, state)
        model = replace(model, weights=str(path))
    engine = engine_type(
        load_model(model, CPU, dtype, PLAIN),
        config.resolved_layers(),
        wants_rows=False,
        toks_per_batch=250,
        num_threads=2,
    )
    own = check_bits(engine, proteins)
    engine.close()
    return compare_models(config, Setup(CPU, dtype, PLAIN, {}, {}), proteins, own, theirs, world, 0.0)


def names_of(parts) -> list[str]:
    return [describe_protein(one) for one in parts[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_a_fault_has_no_problem(parts, dtype):
    assert list_problems([check(parts, dtype=dtype)], names_of(parts)) == []


def faulty(fault: str) -> dict[str, torch.Tensor]:
    state = {name: tensor.half().float() for name, tensor in random_state(A8M, seed=3).items()}
    if fault == "one matrix off by a thousandth":
        state["layers.4.fc1.weight"] *= 1.001
    elif fault == "one head's queries and keys exchanged":
        query, key = (state[f"layers.2.self_attn.{name}_proj.weight"] for name in ("q", "k"))
        query[:16], key[:16] = key[:16].clone(), query[:16].clone()
        query[:16] *= 1.1
    elif fault == "rotary frequencies off":
        for number in range(A8M.num_layers):
            state[f"layers.{number}.self_attn.rot_emb.inv_freq"] *= 1.01
    elif fault == "embedding not scaled":
        state["embed_tokens.weight"] /= 0.88
    elif fault == "not a number":
        state["layers.0.fc2.bias"][3] = float("nan")
    return state


@pytest.mark.parametrize(
    "fault",
    [
        "one matrix off by a thousandth",
        "one head's queries and keys exchanged",
        "rotary frequencies off",
        "embedding not scaled",
        "not a number",
    ],
)
def test_a_fault_in_the_forward_is_over_the_limit_in_fp32(parts, fault):
    found = list_problems([check(parts, faulty(fault))], names_of(parts))
    assert any(
        "mean of layer 6 is over the limit (error <= 0.03, kept >= 0.99, relative <= 1e-05)" in line
        for line in found
    ), found


def test_another_model_is_over_the_limit_in_bf16(parts):
    rank = check(parts, random_state(A8M, seed=4), torch.bfloat16)
    assert any(
        "mean of layer 6 is over the limit (error <= 0.03, kept >= 0.99):" in line
        for line in list_problems([rank], names_of(parts))
    )
    assert "OVER" in make_table([rank])


def leaving_fp16() -> dict[str, torch.Tensor]:
    """Weights with a product that fp16 cannot hold where a protein has a tryptophan."""
    state = random_state(A8M, seed=3)
    token = state["embed_tokens.weight"][Alphabet.from_architecture("ESM-1b").get_idx("W")]
    direction = (token - token.mean()) / (token - token.mean()).norm()
    state["layers.0.self_attn.out_proj.weight"] *= 0.01
    state["layers.0.final_layer_norm.weight"].fill_(1)
    state["layers.0.final_layer_norm.bias"].fill_(0)
    state["layers.0.fc1.weight"][5] = 5e3 * direction
    state["layers.0.fc2.weight"][:, 5] *= 1e-6
    return state


@pytest.mark.distributed
def test_what_leaves_the_range_of_a_dtype_is_computed_again_as_in_a_run_and_named(tmp_path):
    weights = write_checkpoint(tmp_path / "a.pt", A8M, leaving_fp16())
    (tmp_path / "a.fa").write_text(">a\nMKTAYIAKQR\n>b\nMKTAYIAKQRWISF\n>c\nGAVLIPFMK\n")
    settings = (f"model.weights={weights}", "dtype=fp16", "toks_per_batch=60", "device=cpu")
    result, found = selfcheck(tmp_path / "a.fa", tmp_path / "out", *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    again = "b (a.fa, 14 residues)"
    line = "rank 0: not finite in float16, so computed again in a wider dtype, as a run does: 1 proteins: "
    assert f"{line}{again}\n" in result.stdout
    assert found["ranks"][0]["recomputed"] == [again]
    (comparison,) = found["ranks"][0]["comparisons"]
    assert comparison["worst_error"] < 0.03
    assert comparison["worst_protein"] != again  # which is in fp32


class InCompany(Engine):
    """An engine whose answers depend on the company: the last bit of one number."""

    def run(self, pack):
        answers = super().run(pack)
        for answer in answers[1:2]:
            for sums in answer.sums.values():
                sums[7] = np.nextafter(sums[7], np.float32(np.inf))
        return answers


def test_one_other_bit_in_company_is_found(parts):
    rank = check(parts, engine_type=InCompany)
    (line,) = list_problems([rank], names_of(parts))
    assert line.startswith("rank 0: other bits in a pack than alone, by up to ")
    assert 0 < max(rank.other_bits.values()) < 1e-4
    assert "proteins" in make_table([rank])


def test_ranks_of_one_kind_must_agree_and_others_need_not(parts):
    names = names_of(parts)
    rank = check(parts)
    other = replace(rank, rank=1, bits=("0", *rank.bits[1:]))
    assert list_problems([rank, other], names) == [
        f"rank 1: other bits than rank 0 on the same kind of device ({rank.kind_of_device}) "
        f"for 1 proteins: {names[0]}"
    ]
    assert "all 2 ranks: OTHER BITS" in make_table([rank, other])
    assert list_problems([rank, replace(other, kind_of_device="another")], names) == []
    assert "all 2 ranks: the same bits within each of 2 kinds of device" in make_table(
        [rank, replace(other, kind_of_device="another")]
    )


def test_tokens_that_are_not_fair_esms_are_found(parts):
    one = parts[2][0]
    (segment,) = segments_of(0, one)
    assert has_fair_esm_tokens(one, segment)
    assert not has_fair_esm_tokens(one, replace(segment, tokens=segment.tokens[::-1]))
    assert not has_fair_esm_tokens(one, replace(segment, tokens=segment.tokens[:-1]))
    (line,) = list_problems([replace(check(parts), other_tokens=("a",))], names_of(parts))
    assert line == "rank 0: tokens are not fair-esm's for 1 proteins: a"


def test_masks_are_checked_whatever_is_included(tmp_path, checkpoint_8m):
    """In layer 0 fair-esm has zeros for a mask: so have we."""
    (tmp_path / "a.fa").write_text(">a\nKA<mask>ISQ\n>b\nMKTAYIAKQR\n>c\n<mask><mask>\n>d\nM<mask>\n")
    settings = (f"model.weights={checkpoint_8m}", "toks_per_batch=60", "special_tokens=mask", "device=cpu")
    result, found = selfcheck(
        tmp_path / "a.fa", tmp_path, *settings, "repr_layers=[0,6]", "include=[bos,per_tok]"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(found["sample"]) == 4
    assert {(one["kind"], one["layer"]) for one in found["ranks"][0]["comparisons"]} == {
        (kind, layer) for kind in ("mean", "bos", "per_tok") for layer in (0, 6)
    }


LIMITS = Limits.of(SelfcheckConfig(), torch.bfloat16, Include.mean)


def test_shapes_that_differ_are_named():
    vector, rows = np.ones(2, dtype=np.float32), np.ones((2, 2), dtype=np.float32)
    with pytest.raises(ValueError, match=r"mean of layer 1 of b has shape \(2,\), fair-esm's has \(2, 2\)"):
        compare(Include.mean, 1, ["a", "b"], [vector, vector], [vector, rows], LIMITS)


def test_limits_by_default_and_by_key():
    config = SelfcheckConfig()
    assert Limits.of(config, torch.float32, Include.mean) == Limits(1e-5, 0.03, 0.03, 0.99)
    assert Limits.of(config, torch.bfloat16, Include.mean) == Limits(None, 0.03, 0.03, 0.99)
    assert Limits.of(config, torch.float16, Include.bos) == Limits(None, 0.09, 0.09, 0.95)
    assert Limits.of(config, torch.float16, Include.per_tok) == Limits(None, 0.03, 0.3, 0.95)
    assert Limits.of(config, torch.float8_e4m3fn, Include.mean) == Limits(None, 0.1, 0.1, 0.98)
    assert Limits.of(config, torch.float8_e4m3fn, Include.per_tok) == Limits(None, 0.1, 1.0, 0.9)
    half = SaveDtype.float16
    assert Limits.of(config, torch.float32, Include.mean, half) == Limits(1e-5 + 2**-11, 0.03, 0.03, 0.99)
    assert Limits.of(config, torch.float32, Include.bos, half) == Limits(1e-4 + 2**-11, 0.09, 0.09, 0.95)
    assert Limits.of(config, torch.bfloat16, Include.mean, half) == Limits(None, 0.03, 0.03, 0.99)
    mine = SelfcheckConfig(max_spread_error=0.1, min_neighbours_kept=0.5, max_relative_error=0.01)
    assert Limits.of(mine, torch.bfloat16, Include.mean) == Limits(0.01, 0.1, 0.1, 0.5)
    assert Limits.of(mine, torch.float32, Include.mean, half) == Limits(0.01, 0.1, 0.1, 0.5)
    assert Limits.of(mine, torch.float8_e4m3fn, Include.mean) == Limits(0.01, 0.1, 0.1, 0.5)
    assert Limits.of(mine, torch.float32, Include.per_tok) == Limits(0.1, 0.1, 1.0, 0.0)


def like_real_means(num_proteins: int, num_rows: int | None = None) -> list[np.ndarray]:
    """Vectors as the real 3B gives them: one channel with nine tenths of the length, and a spread of 1.8."""
    numbers = np.random.default_rng(0)
    shape = (num_proteins, num_rows or 1, 2560)
    vectors = 0.035 * numbers.standard_normal(shape).astype(np.float32)
    vectors[..., 1542] += 13.64
    return list(vectors if num_rows else vectors[:, 0])


def plain_cosine(ours, theirs) -> float:
    """The least cosine of any vector, as one might judge by."""
    pairs = [(np.atleast_2d(a), np.atleast_2d(b)) for a, b in zip(ours, theirs, strict=True)]
    return min(
        float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
        for a, b in pairs
    )


def judge(include, ours, theirs):
    names = [f"protein {index}" for index in range(len(theirs))]
    limits = Limits.of(SelfcheckConfig(), torch.bfloat16, include)
    return compare(include, 36, names, ours, theirs, limits)


@pytest.mark.parametrize("include", [Include.mean, Include.per_tok])
def test_two_alike_proteins_exchanged_are_over_the_limit_though_their_cosine_is_high(include):
    theirs = like_real_means(40, 30 if include is Include.per_tok else None)
    theirs[7] = theirs[3] + 0.2 * (theirs[7] - theirs[3])
    ours = list(theirs)
    assert judge(include, ours, theirs).is_within
    ours[3], ours[7] = ours[7], ours[3]
    assert plain_cosine(ours, theirs) > 0.999
    found = judge(include, ours, theirs)
    assert not found.is_within
    assert found.worst_protein in ("protein 3", "protein 7")
    assert found.worst_error > 0.25


@pytest.mark.parametrize("include", [Include.mean, Include.per_tok])
def test_five_percent_of_the_spread_is_over_the_limit_and_one_is_not(include):
    theirs = like_real_means(40, 30 if include is Include.per_tok else None)
    spread = judge(include, theirs, theirs).spread
    assert spread == pytest.approx(0.035 * 2560**0.5, rel=0.05)
    direction = np.random.default_rng(1).standard_normal(2560)
    direction *= spread / np.linalg.norm(direction)
    for share, is_within in ((0.01, True), (0.05, False)):
        ours = [(vector + share * direction).astype(np.float32) for vector in theirs]
        assert plain_cosine(ours, theirs) > 0.999
        found = judge(include, ours, theirs)
        assert (found.is_within, found.worst_error) == (is_within, pytest.approx(share, rel=1e-3))
        assert found.shift == pytest.approx(share, rel=1e-3)  # all of it is shared
        assert found.neighbours_kept == 1  # so no neighbour sees it


def test_neighbours_lost_are_over_the_limit_by_themselves():
    """Proteins in tight families: an error that is small beside the spread exchanges who is nearest."""
    numbers = np.random.default_rng(2)
    families = np.repeat(like_real_means(4), 16, axis=0)
    theirs = list((families + 0.0002 * numbers.standard_normal(families.shape)).astype(np.float32))
    ours = [(v + 0.0002 * numbers.standard_normal(2560)).astype(np.float32) for v in theirs]
    found = judge(Include.mean, ours, theirs)
    assert found.worst_error < 0.03
    assert found.neighbours_kept < 0.9
    assert not found.is_within
    assert ", kept 0." in list_problems([replace(LINE, comparisons=(found,))], [])[0]


LINE = RankCheck(0, "host", "cpu", "cpu", "bfloat16", "", 64, "cpu", (), 0, 0, {}, (), (), 0.0)


def test_a_sample_too_small_or_all_alike_is_said_in_the_table():
    vectors = like_real_means(20)
    for theirs, said in (
        (vectors, "mean of layer 36: no neighbours were compared, which takes 21 vectors or more"),
        (vectors[:1], "mean of layer 36: fair-esm's vectors are all alike or there is one: errors are"),
        ([vectors[0]] * 30, "mean of layer 36: fair-esm's vectors are all alike or there is one: errors are"),
    ):
        for factor, is_within in ((1, True), (1.1, False)):
            found = judge(Include.mean, [v * np.float32(factor) for v in theirs], theirs)
            assert (found.is_within, found.neighbours_kept) == (is_within, None)
            table = make_table([replace(LINE, comparisons=(found,))])
            assert said in table
            assert "too few" in table
            assert (found.worst_cosine is None) == ("  none  " in table) == (found.spread == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_proteins", [1, 2, 30])
def test_a_number_that_is_not_finite_is_over_any_limit(bad, num_proteins):
    theirs = like_real_means(num_proteins)
    ours = [vector.copy() for vector in theirs]
    ours[-1][3] = bad
    found = judge(Include.mean, ours, theirs)
    assert (found.is_within, found.worst_protein) == (False, f"protein {num_proteins - 1}")
    assert found.worst_error == np.inf


def test_a_vector_of_zeros_is_right_where_fair_esm_has_zeros_and_nowhere_else():
    """In layer 0 fair-esm has zeros for a mask."""
    theirs = like_real_means(3)
    zeros = [np.zeros(2560, dtype=np.float32)]
    for ours, others in ((zeros, theirs[:1]), (theirs[:1], zeros), ([*zeros, *theirs[1:]], theirs)):
        assert not judge(Include.mean, ours, others).is_within
    for both in (zeros, [*zeros, *theirs]):
        found = judge(Include.mean, both, both)
        assert (found.is_within, found.worst_error, found.largest_relative_error) == (True, 0, 0)
        assert found.worst_cosine == (1 if found.spread else None)


def test_one_residue_far_off_is_over_the_limit_though_its_protein_is_not():
    theirs = like_real_means(4, 500)
    ours = [rows.copy() for rows in theirs]
    ours[2][77] = ours[2][77] + 0.5 * (ours[2][78] - ours[2][77])
    found = judge(Include.per_tok, ours, theirs)
    assert found.worst_error < 0.045
    assert 0.5 < found.worst_vector < 0.9
    assert (found.is_within, found.worst_protein) == (False, "protein 2")


def test_what_does_not_fit_is_refused_with_a_remedy():
    world = World(None, 0, 8, 0, 8)
    needed = needed_bytes(Architecture(48, 5120, 40), 1022)
    assert 60e9 < needed < 62e9
    with pytest.raises(
        ValueError,
        match=r"needs 61\.\d GB for each of 8 ranks with proteins of 1022 residues, "
        r".* has 256\.0 GB free: check with fewer ranks, a",
    ):
        refuse_what_does_not_fit(needed, 256_000_000_000, 1022, world)
    refuse_what_does_not_fit(needed, 512_000_000_000, 1022, world)
    refuse_what_does_not_fit(needed, None, 1022, world)


def candidate(residues: str, source: str = "a", number: int = 0) -> SampledProtein:
    letters = residues.encode()
    key = bytes([len(letters) * 37 % 251, *letters[-3:]])
    return SampledProtein(
        key,
        source,
        number,
        residues,
        len(letters),
        len(letters),
        letters,
        ((0, len(letters), 0, len(letters)),),
    )


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80),
    st.integers(1, 12),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_the_sample_is_the_same_for_any_number_of_ranks(lengths, size, num_ranks, source_of_order):
    proteins = [
        candidate("A" * (length - 1) + "CDEF"[length % 4], number=number)
        for number, length in enumerate(lengths)
    ]

    def sample(order, ranks):
        samplers = [Sampler(size) for _ in range(ranks)]
        for index, one in enumerate(order):
            samplers[index % ranks].add(one)
        return choose_sample([one for sampler in samplers for one in sampler.candidates()], size)

    found = sample(proteins, 1)
    assert len(found) == min(size, len(set(lengths)))
    assert found[-1].embedded == max(lengths)
    assert size == 1 or found[0].embedded == min(lengths)
    shuffled = source_of_order.sample(proteins, len(proteins))
    assert sample(shuffled, num_ranks) == found


def test_of_two_alike_the_first_is_taken_whichever_rank_saw_them():
    first, second = (candidate("A" * 241 + "E", number=number) for number in (1, 2))
    shorter = candidate("A" * 234 + "F")  # its digest is lower, so the bucket keeps neither of the two
    assert shorter.key < first.key
    for of_ranks in ([[shorter, first, second]], [[shorter, second], [first]], [[second, first], [shorter]]):
        samplers = [Sampler(1) for _ in of_ranks]
        for sampler, proteins in zip(samplers, of_ranks, strict=True):
            for protein in proteins:
                sampler.add(protein)
        assert choose_sample([one for sampler in samplers for one in sampler.candidates()], 1) == [first]


def test_the_sample_is_spread_over_lengths_and_keeps_little():
    sampler = Sampler(8)
    draws = random.Random(1)
    for number in range(20_000):
        length = draws.choice((60, 61, 62, 63)) if number % 100 else draws.randint(30, 1022)
        sampler.add(candidate("".join(draws.choices("ACDEFGHIKL", k=length)), number=number))
    assert sampler.num_seen == 20_000
    assert len(sampler.candidates()) < 700
    lengths = [one.embedded for one in choose_sample(sampler.candidates(), 8)]
    assert sum(60 <= length <= 63 for length in lengths) <= 1
    assert (lengths[0] < 40, lengths[-1] > 1000) == (True, True)
    assert all(later / earlier < 2.5 for earlier, later in pairwise(lengths))


def test_packs_are_filled_with_whole_copies(parts):
    segments = [segment for number, one in enumerate(parts[2]) for segment in segments_of(number, one)]
    smallest = min(len(segment.tokens) for segment in segments)
    packs = full_packs(segments, 600)
    assert {id(segment) for pack in packs for segment in pack.segments} == {
        id(segment) for segment in segments
    }
    for pack in packs:
        assert isinstance(pack, Pack)
        assert 600 - smallest < pack.num_tokens <= 600
