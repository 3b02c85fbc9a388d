"""The command line: what is refused, in one line that names key, value and remedy."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from dist_esm.__main__ import main
from dist_esm.commandline.cli import compose_config, config_text
from dist_esm.config import Config, Dtype, Include, check, conf_dir, plain_values
from dist_esm.keys import key_types

REFUSED = {
    "input=x dtype=foo": r"dtype=foo is no choice: use one of auto, fp32, bf16, fp16, fp8",
    "input=x model=esm3": r"model=esm3 is not an ESM-2.* use one of .*esm2_t33_650M_UR50D",
    "input=x toks_per_batch=abc": r"toks_per_batch=abc is not a whole number: for example toks_per_batch=",
    "input=x toks_per_batch=1": r"toks_per_batch=1 is too small: use 3 or more",
    "input=x toks_per_batch=1,2": r"toks_per_batch=1,2",
    "input=x include=[meen]": r"include=meen is no choice: did you mean mean\? use one of mean, bos, per_tok",
    "input=x include=[]": r"include must name each wanted representation once",
    "input=x repr_layers=[99]": r"repr_layers: esm2_t36_3B_UR50D has no layer 99: use -37 to 36",
    "input=x repr_layers=[-1,36]": r"names a layer twice",
    "input=x model.weight=random": r"'model.weight' is no key: did you mean model.weights\?",
    "output_dir=x": r"input is required",
    "input=[]": r"neither a path, a glob nor a list",
    "input=x long=window truncation_seq_length=null": r"long=window needs a window",
    "input=x long=window window_overlap=1022": r"window_overlap=1022 must be smaller than the window",
    "input=x unit_share=0": r"unit_share=0.0 is not a share",
    "input=x progress_seconds=0": r"progress_seconds=0 is no time .*: use 0.5 seconds or more, or verbosity",
    "input=x progress_seconds=nan": r"progress_seconds=nan is no time",
    "input=x verbosity=silent": r"verbosity=silent is no choice: use one of quiet, normal, debug",
    "input=x selfcheck.proteins=0": r"selfcheck.proteins=0 is too small: use 1 or more",
    "input=x selfcheck.min_cosine=0.99": r"'selfcheck.min_cosine' is no key any more: write "
    r"selfcheck.max_spread_error=0.03, since",
    "input=x selfcheck.max_spread_error=3%": r"max_spread_error=3% is not a number: for example "
    r"selfcheck.max_spread_error=0.03, or selfcheck.max_spread_error=null",
    "input=x selfcheck.min_neighbours_kept=most": r"for example selfcheck.min_neighbours_kept=0.99, or ",
    "input=x fp8=ffn": r"fp8=ffn is not for dtype=auto: use dtype=fp8 with it, or leave it out",
    "input=x fp8=ffn dtype=bf16": r"fp8=ffn is not for dtype=bf16: use dtype=fp8 with it, or leave it out",
    "input=x selfcheck.max_spread_error=-1": r"selfcheck.max_spread_error=-1.0 is no limit: use 0 or more",
    "input=x selfcheck.max_spread_error=nan": r"selfcheck.max_spread_error=nan is no limit: use 0 or more",
    "input=x selfcheck.min_neighbours_kept=99": r"min_neighbours_kept=99.0 is no share: use 0 to 1, for",
    "input=x selfcheck.max_relative_error=-1": r"selfcheck.max_relative_error=-1.0 is no limit: use 0",
    "input=x selfcheck.protein=3": r"'selfcheck.protein' is no key: did you mean selfcheck.proteins\?",
    "inputs": r"'inputs' is not key=value",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_one_line_with_the_remedy(line):
    with pytest.raises(ValueError, match=REFUSED[line]) as caught:
        check(compose_config(line.split()))
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_the_contract():
    config = compose_config(["input=x"])
    check(config)
    assert (
        config.truncation_seq_length,
        config.repr_layers,
        config.include,
        config.max_consecutive_failures,
    ) == (1022, [-1], [Include.mean], 3)
    assert (config.model.name, config.model.weights, config.toks_per_batch, config.dtype) == (
        "esm2_t36_3B_UR50D",
        None,
        None,
        Dtype.auto,
    )
    assert config.resolved_layers() == [36]


def test_yaml_and_schema_name_the_same_keys_and_defaults():
    """Hydra reads the yaml, everything else the schema: they must not drift apart."""
    yaml = OmegaConf.load(conf_dir() / "config.yaml")
    assert set(yaml) - {"defaults"} == {field.name for field in fields(Config)} - {"model"}
    merged = compose_config(["input=x"])
    plain = Config(input="x", model=merged.model)
    assert merged == plain


def test_a_users_own_config_file_starts_from_ours(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, {override model: esm2_t6_8M_UR50D}, _self_]\n"
        "input: proteins/\ntoks_per_batch: 512\n"
    )
    config = compose_config(["dtype=fp32"], str(tmp_path), "mine")
    assert (config.model.name, config.toks_per_batch, config.dtype, config.input) == (
        "esm2_t6_8M_UR50D",
        512,
        Dtype.fp32,
        "proteins/",
    )


def test_the_configuration_that_would_run_is_printed_as_plain_yaml(capsys):
    assert main(["input=x", "output_dir=here", "include=[mean,bos]", "--cfg"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.output_dir, printed.include, printed.model.num_layers) == ("here", ["mean", "bos"], 36)


def test_plain_values_are_what_was_given():
    """Names of enum members, paths as text, the input as it was written, whatever its letters."""
    config = compose_config(
        ["input=[a.fa,b.fa]", "output_dir=out/x", "include=[bos]", "residues.gaps=unknown"]
    )
    values = plain_values(config)
    assert (values["input"], values["output_dir"], values["include"]) == (["a.fa", "b.fa"], "out/x", ["bos"])
    assert values["residues"] == {
        "lower_case": "fix",
        "trailing_stop": "fix",
        "gaps": "unknown",
        "blanks": "fix",
        "unknown": "replace",
    }
    assert values["selfcheck"] == {
        "proteins": 200,
        "max_spread_error": None,
        "min_neighbours_kept": None,
        "max_relative_error": None,
    }
    assert (values["model"]["embed_dim"], values["unit_share"], values["job"]) == (2560, 0.01, "embed")
    config.input = "a${b.fa"
    assert plain_values(config)["input"] == "a${b.fa"
    assert OmegaConf.create(config_text(config)).input == "a${b.fa"


def test_the_help_names_every_key_with_its_default_choices_and_meaning(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    keys = text.partition("input and outputs:")[2]
    shown = dict(re.findall(r"^  ([\w.]+)=(\S+)", keys, re.MULTILINE))
    of_the_model = {"model.name", "model.num_layers", "model.embed_dim", "model.attention_heads"}
    groups = {"residues", "selfcheck"}
    assert set(key_types()) - of_the_model - groups <= set(shown)
    for key in set(shown) - {"input", "job", "model"}:
        assert compose_config(["input=x", f"{key}={shown[key]}"]) == compose_config(["input=x"]), key
    assert shown["model"] == compose_config(["input=x"]).model.name
    words = " ".join(text.split())
    assert "File format of the outputs. One of pt, fair_esm, h5, parquet, safetensors, npy." in words
    assert "One of esm2_t6_8M_UR50D, esm2_t12_35M_UR50D," in words
