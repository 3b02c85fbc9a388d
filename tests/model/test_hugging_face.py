"""Models written by the real transformers: the same bits as from fair-esm's file, and transformers' own
numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dist_esm.config import ModelConfig, model_config
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.checkpoints.checkpoint import read_checkpoint
from dist_esm.model.esm2 import Architecture
from dist_esm.model.kernels.attention import Seqlens
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import check_weights, complete, load_model
from helpers.checkpoints import A8M, random_state, write_checkpoint
from helpers.compare import relative_error

pytest.importorskip("transformers", reason="transformers is not installed")
from helpers.hugging_face import hidden_states, hugging_face_config, hugging_face_model, transformers

CPU = torch.device("cpu")
ODD = Architecture(3, 96, 6)
"""A size that fair-esm has none of."""
RESIDUES = b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHM"


def auto(weights: Path, adapter: Path | None = None) -> ModelConfig:
    config = model_config("auto")
    config.weights, config.adapter = str(weights), None if adapter is None else str(adapter)
    complete(config)
    return config


def same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(name == other and a.dtype == b.dtype and torch.equal(a, b) for (name, a), (other, b) in pairs)


def forward(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    model = load_model(config, CPU, dtype, PLAIN)
    tokens = torch.from_numpy(tokenize(RESIDUES).astype("int64"))
    bounds = [0, len(tokens)]
    with torch.inference_mode():
        return model(
            tokens, torch.arange(len(tokens)), Seqlens.of(bounds, CPU), range(model.arch.num_layers + 1)
        )


FORMS = {
    "safetensors": {},
    "sharded": {"max_shard_size": "300KB"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["of fp32", "of fp16"])
@pytest.mark.parametrize("form", [*FORMS, "bin"])
def test_the_same_numbers_give_the_same_bits(tmp_path, form, stored, dtype):
    state = {name: tensor.to(stored) for name, tensor in random_state(ODD).items()}
    path = write_checkpoint(tmp_path / "fair.pt", ODD, state)
    model = hugging_face_model(ODD, state).to(stored)
    folder = tmp_path / "hf"
    model.save_pretrained(folder, **FORMS.get(form, {}))
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert (form == "sharded") == (folder / "model.safetensors.index.json").is_file()
    ours, theirs = (load_model(auto(place), CPU, dtype, PLAIN) for place in (folder, path))
    assert ours.arch == ODD
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("EsmModel", ""),
        ("EsmForMaskedLM", ""),
        ("EsmForSequenceClassification", ", its body alone (classifier left out)"),
        ("EsmForTokenClassification", ", its body alone (classifier left out)"),
    ],
)
def test_any_model_on_the_body_gives_transformers_numbers(tmp_path, kind, left_out):
    model = hugging_face_model(ODD, random_state(ODD, hard=True), kind)
    model.save_pretrained(tmp_path)
    config = auto(tmp_path)
    tokens = torch.from_numpy(tokenize(RESIDUES).astype("int64"))
    for layer, theirs in enumerate(hidden_states(model, tokens)):
        assert relative_error(forward(config)[layer], theirs) < 1e-5
    words = check_weights(config).words
    assert words == f"Hugging Face {kind}, 3 layers{left_out}, from {tmp_path}"
    assert config.name == "esm2_t3_d96_h6"


def test_a_truncated_stack_is_a_model_of_its_own(tmp_path):
    model = hugging_face_model(A8M, random_state(A8M))
    model.esm.encoder.layer = model.esm.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    config = auto(tmp_path)
    assert (config.name, config.num_layers, config.attention_heads) == ("esm2_t2_d320_h20", 2, 20)
    tokens = torch.from_numpy(tokenize(RESIDUES).astype("int64"))
    assert relative_error(forward(config)[2], hidden_states(model, tokens)[2]) < 1e-5


def test_a_file_without_its_configuration_tells_its_heads_by_its_frequencies_or_its_width(tmp_path):
    model = hugging_face_model(A8M, random_state(A8M))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert auto(tmp_path / "model.safetensors").name == "esm2_t6_8M_UR50D"


def test_another_model_of_the_same_shapes_is_told_by_its_configuration(tmp_path):
    hugging_face_model(ODD, random_state(ODD)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    for changes, words in (
        ({"position_embedding_type": "absolute"}, "holds an ESM-1b or ESM-1v"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "holds a Hugging Face BertForMaskedLM",
        ),
        ({"layer_norm_eps": 1e-12}, "has layer_norm_eps=1e-12"),
        ({"num_attention_heads": 4}, "has 4 attention heads, which does not fit"),
        ({"token_dropout": False}, "was trained without token dropout"),
    ):
        path.write_text(json.dumps({**given, **changes}))
        with pytest.raises(ValueError, match=words):
            read_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    hugging_face_model(ODD, random_state(ODD)).save_pretrained(tmp_path, max_shard_size="300KB")
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=rf"lacks {first.name} of \d files: fetch it again"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        (
            "BertForMaskedLM",
            "BertConfig",
            "holds a Hugging Face BertForMaskedLM (model_type bert) and no ESM-2",
        ),
        ("T5EncoderModel", "T5Config", "holds a Hugging Face T5EncoderModel (model_type t5) and no ESM-2"),
    ],
)
def test_a_protein_model_of_another_family_is_named(tmp_path, kind, config, words):
    small = {
        "BertConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    }
    other = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 28}
    model = getattr(transformers, kind)(getattr(transformers, config)(**small.get(config, other)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds a (BERT, as ProtBert|T5, as ProtT5)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("has_norm", [True, False], ids=["ESM-1b", "ESM-1v"])
def test_learned_positions_are_named(tmp_path, has_norm):
    config = hugging_face_config(ODD, position_embedding_type="absolute", emb_layer_norm_before=has_norm)
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an ESM-1b or ESM-1v"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds an ESM-1b or ESM-1v"):
        read_checkpoint(tmp_path)


def test_early_files_with_positions_that_nothing_reads_are_esm2(tmp_path):
    """facebook's own files of ESM-2 have them, and rotary frequencies once for each layer."""
    model = hugging_face_model(ODD, random_state(ODD))
    state = {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 96)
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    frequencies = random_state(ODD)["layers.0.self_attn.rot_emb.inv_freq"]
    for layer in range(3):
        state[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs = write_checkpoint(tmp_path / "fair.pt", ODD, random_state(ODD))
    ours = auto(tmp_path)
    assert same_bits(*(load_model(config, CPU, torch.float32, PLAIN) for config in (ours, auto(theirs))))
    assert "left out" not in check_weights(ours).words
