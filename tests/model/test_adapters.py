"""LoRA adapters that the real peft wrote, merged as they are loaded: peft's own numbers; other adapters are
named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_esm.config import ModelConfig, model_config
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.esm2 import Architecture
from dist_esm.model.kernels.attention import Seqlens
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import check_weights, complete, load_model
from helpers.checkpoints import fair_esm_model, random_state, write_checkpoint
from helpers.compare import relative_error

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from helpers.hugging_face import hidden_states, hugging_face_model  # noqa: E402 - it needs transformers, too

CPU = torch.device("cpu")
ARCH = Architecture(3, 96, 6)
TOKENS = torch.from_numpy(
    tokenize(b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAV").astype("int64")
)


def config_of(weights: Path, adapter: Path | None) -> ModelConfig:
    config = model_config("auto")
    config.weights, config.adapter = str(weights), None if adapter is None else str(adapter)
    complete(config)
    return config


def ours(config: ModelConfig) -> dict[int, torch.Tensor]:
    model = load_model(config, CPU, torch.float32, PLAIN)
    seqlens = Seqlens.of([0, len(TOKENS)], CPU)
    with torch.inference_mode():
        return model(TOKENS, torch.arange(len(TOKENS)), seqlens, range(ARCH.num_layers + 1))


def write_adapter(
    folder: Path, kind: str = "EsmModel", stored: torch.dtype = torch.float32, **options: object
):
    """Base and adapter in folders of their own, the adapter far from zero; returns the adapted model."""
    base = hugging_face_model(ARCH, random_state(ARCH), kind).to(stored)
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **options})
    torch.manual_seed(7)
    model = peft.get_peft_model(base.float(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "adapter")
    return model


MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
PLAIN_LORAS = {
    "query and value": {},
    "all linear layers": {"target_modules": MODULES},
    "rank-stabilized": {"use_rslora": True, "r": 9},
    "patterns": {
        "target_modules": MODULES,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"layer.1.*key": 32},
    },
    "token embedding": {"target_modules": ["word_embeddings", "key"]},
    "some layers": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["base of fp32", "base of fp16"])
@pytest.mark.parametrize("options", PLAIN_LORAS.values(), ids=PLAIN_LORAS)
def test_a_merged_adapter_gives_pefts_numbers(tmp_path, options, stored):
    model = write_adapter(tmp_path, stored=stored, **options)
    theirs = hidden_states(model.base_model.model, TOKENS)
    merged = ours(config_of(tmp_path / "base", tmp_path / "adapter"))
    plain = ours(config_of(tmp_path / "base", None))
    for layer, hidden in enumerate(theirs):
        assert relative_error(merged[layer], hidden) < 1e-5
    assert relative_error(plain[ARCH.num_layers], theirs[-1]) > 1e-2, "the adapter changes the numbers"


def test_a_classifier_that_was_trained_along_is_left_out_and_said(tmp_path):
    model = write_adapter(tmp_path, "EsmForSequenceClassification", task_type="SEQ_CLS")
    config = config_of(tmp_path / "base", tmp_path / "adapter")
    assert relative_error(ours(config)[3], hidden_states(model.base_model.model, TOKENS)[3]) < 1e-5
    assert check_weights(config).words == (
        "fine-tuned from Hugging Face EsmForSequenceClassification, 3 layers, "
        "its body alone (classifier left out) with LoRA "
        "adapter (rank 4, 6 matrices merged, classifier left out), "
        f"from {tmp_path}/base and {tmp_path}/adapter"
    )


def test_an_adapter_of_the_hub_fits_fair_esms_own_file_too(tmp_path):
    write_adapter(tmp_path)
    path = write_checkpoint(tmp_path / "fair.pt", ARCH, random_state(ARCH))
    theirs = ours(config_of(tmp_path / "base", tmp_path / "adapter"))
    assert torch.equal(ours(config_of(path, tmp_path / "adapter"))[3], theirs[3])


def test_an_adapter_on_fair_esms_own_module(tmp_path):
    state = random_state(ARCH)
    path = write_checkpoint(tmp_path / "fair.pt", ARCH, state)
    options = {"r": 4, "target_modules": ["k_proj", "fc1"], "bias": "none"}
    model = peft.get_peft_model(fair_esm_model(ARCH, state), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    with torch.inference_mode():
        theirs = merged(TOKENS[None], repr_layers=[3])["representations"][3][0]
    assert relative_error(ours(config_of(path, tmp_path / "adapter"))[3], theirs) < 1e-5


def test_the_fingerprint_is_of_base_and_adapter(tmp_path):
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b", target_modules=["query", "key"])
    places = [
        (tmp_path / base / "base", adapter)
        for base in "ab"
        for adapter in (None, tmp_path / "a" / "adapter", tmp_path / "b" / "adapter")
    ]
    first, again = ([check_weights(config_of(*place)).fingerprint for place in places] for _ in range(2))
    assert first == again
    assert len(set(first)) == 6


REFUSED = {
    "DoRA": ({"use_dora": True}, "is DoRA, only plain LoRA and rsLoRA are merged here"),
    "biases": ({"bias": "lora_only"}, "has trained biases (bias=lora_only)"),
    "a module of the body": (
        {"modules_to_save": ["LayerNorm"]},
        "(modules_to_save), only LoRA's products are merged",
    ),
    "a start that changes the base": (
        {"init_lora_weights": "pissa"},
        "was started by pissa, which changes the base's",
    ),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_another_lora_is_refused_by_its_name(tmp_path, options, words):
    write_adapter(tmp_path, **options)
    with pytest.raises(ValueError, match="merge_and_unload") as caught:
        config_of(tmp_path / "base", tmp_path / "adapter")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_kind_of_adapter_is_refused_by_its_name(tmp_path):
    base = hugging_face_model(ARCH, random_state(ARCH), "EsmModel")
    base.save_pretrained(tmp_path / "base")
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter of the kind IA3, only LoRA is merged here"):
        config_of(tmp_path / "base", tmp_path / "adapter")


def test_an_adapter_of_another_size_is_refused(tmp_path):
    write_adapter(tmp_path)
    other = write_checkpoint(
        tmp_path / "other.pt", Architecture(3, 48, 6), random_state(Architecture(3, 48, 6))
    )
    with pytest.raises(ValueError, match="by a matrix of 96 x 96, the base has 48 x 48"):
        config_of(other, tmp_path / "adapter")


def test_an_adapter_in_the_place_of_a_model_says_how_to_name_it(tmp_path):
    write_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"is an adapter and no model: name it with model\.adapter="):
        config_of(tmp_path / "adapter", None)
    with pytest.raises(ValueError, match=r"is no adapter: name a directory with adapter_config\.json"):
        config_of(tmp_path / "base", tmp_path / "base")
    text = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert text["peft_type"] == "LORA"


def test_a_model_with_its_adapter_unmerged_is_refused(tmp_path):
    model = write_adapter(tmp_path)
    torch.save(model.state_dict(), tmp_path / "unmerged.pt")
    with pytest.raises(ValueError, match="holds a model with an adapter in it that is not merged"):
        config_of(tmp_path / "unmerged.pt", None)
