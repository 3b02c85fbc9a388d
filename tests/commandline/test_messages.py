"""What a new user gets wrong: taken where it is plain, else one line whose remedy is followed, and works."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dist_esm.__main__ import main
from dist_esm.commandline.arguments import read_options
from dist_esm.commandline.cli import compose_config
from dist_esm.config import Config, DeviceKind, Dtype, Format, Include, Job, SaveDtype, check
from dist_esm.planning.inputs import find_files
from helpers.command import run_ranks

FASTA = ">a\nMKTAYIAKQR\n"
NAMES = [
    "ü.fasta",
    "it's.fasta",
    'say "x".fasta',
    "a#b.fasta",
    "a(1).fasta",
    "a b.fasta",
    " a.fasta",
    "a=b.fasta",
    "a,b.fasta",
    "[a].fasta",
    "{a}.fasta",
    "a:b.fasta",
    "a\\b.fasta",
    "a${b.fasta",
    "${a}.fasta",
    "$HOME.fasta",
    "~a.fasta",
    "!a.fasta",
    "a;b&c|d.fasta",
    "a%20b.fasta",
    "a\nb.fasta",
    "名前.fasta",
    os.fsdecode(b"\xff.fasta"),
]
VALUES = [
    "20240501",
    "007",
    "1e3",
    "1.0",
    "true",
    "Off",
    "null",
    "None",
    "nan",
    "0x1f",
    "2024-05-01",
    "-1",
    "a,b",
    "???",
]
"""Names of folders that Hydra or YAML read as something else than text."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a few FASTA files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.fa", "b.fa", "c.fa"):
        Path(name).write_text(FASTA)
    return tmp_path


def composed(*words: str) -> Config:
    """The configuration of a command line, options included, as the command composes it."""
    options = read_options(words)
    config = compose_config(options.overrides, options.config_dir, options.config_name)
    check(config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_is_taken_as_it_stands(here, name):
    Path(name).write_text(FASTA)
    quote = '"' if "'" in name else "'"
    for word, paths in (
        (f"input={name}", [name]),
        (f"input=[{quote}{name}{quote},c.fa]", [name, "c.fa"]),
    ):
        config = composed(word, f"output_dir={name}", f"model.weights={name}")
        assert config.input_list() == paths
        assert {file.path.name for file in find_files(paths)} == set(paths)
        assert (config.model.weights, str(config.output_dir)) == (name, name)
    if "$" not in name:
        assert str(composed("input=a.fa", f"output_dir=not there {name}").output_dir) == f"not there {name}"


@pytest.mark.parametrize("name", VALUES)
def test_a_folder_whose_name_reads_as_a_value_is_a_folder(here, name):
    Path(name).mkdir()
    (Path(name) / "x.fa").write_text(FASTA)
    config = composed(f"input={name}", f"output_dir={name}", "input=a.fa")
    assert (config.input, str(config.output_dir)) == ([name, "a.fa"], name)
    assert {file.path.name for file in find_files(config.input_list())} == {"x.fa", "a.fa"}
    assert composed(f'input="{name}"').input == name
    assert composed(f"input=[{name},a.fa]").input in ([name, "a.fa"], [*name.split(","), "a.fa"])


TAKEN = {
    "include=mean": ("include", [Include.mean]),
    "include=mean,bos": ("include", [Include.mean, Include.bos]),
    "include=[per_tok]": ("include", [Include.per_tok]),
    "include=mean bos": ("include", [Include.mean, Include.bos]),
    "repr_layers=33": ("repr_layers", [33]),
    "repr_layers=-1": ("repr_layers", [-1]),
    "repr_layers=6,12": ("repr_layers", [6, 12]),
    "repr_layers=[6, 12]": ("repr_layers", [6, 12]),
    "repr_layers='[6]'": ("repr_layers", [6]),
    "truncation_seq_length=null": ("truncation_seq_length", None),
    'dtype="fp32"': ("dtype", Dtype.fp32),
    "resume=no": ("resume", False),
    "unit_share=1e-3": ("unit_share", 0.001),
    "input=a.fa": ("input", "a.fa"),
    "input=[a.fa, b.fa]": ("input", ["a.fa", "b.fa"]),
    "input=['a.fa',\"b.fa\"]": ("input", ["a.fa", "b.fa"]),
    "input=a.fa,b.fa": ("input", ["a.fa", "b.fa"]),
    "input=[ab]*.f[a]": ("input", "[ab]*.f[a]"),
    "input=[*.fa]": ("input", ["*.fa"]),
    r"input=a\ b\(1\).fa": ("input", "a b(1).fa"),
    "input='a b.fa'": ("input", "a b.fa"),
    "output_dir=runs/it's": ("output_dir", Path("runs/it's")),
    "output_dir=2024": ("output_dir", Path("2024")),
    "output_dir=~/runs": ("output_dir", Path("~/runs").expanduser()),
    "input=a.fa,": ("input", ["a.fa"]),
    "input=a.fa b.fa": ("input", ["a.fa", "b.fa"]),
    "output_dir=$WHERE/runs": ("output_dir", Path("/scratch/me/runs")),
    "output_dir=${WHERE}/runs": ("output_dir", Path("/scratch/me/runs")),
    "output_dir=${oc.env:WHERE}/runs": ("output_dir", Path("/scratch/me/runs")),
    "input=$WHERE/a.fa": ("input", "/scratch/me/a.fa"),
}


TORN_APART = {
    "input = a.fa dtype= fp32": {"input": "a.fa", "dtype": Dtype.fp32},
    "input =a.fa job = verify": {"input": "a.fa", "job": Job.verify},
    "input=[a.fa, b.fa] include=[mean, bos]": {
        "input": ["a.fa", "b.fa"],
        "include": [Include.mean, Include.bos],
    },
    "input=[a.fa, [x] y.fa] repr_layers=[-1 0]": {"input": ["a.fa", "[x] y.fa"], "repr_layers": [-1, 0]},
    "input=a.fa ranks=2": {"ranks": 2},
    "input=a.fa ranks=auto": {"ranks": "auto"},
}


@pytest.mark.parametrize("line", TORN_APART)
def test_what_the_shell_has_torn_apart_is_put_together(here, line):
    config = composed(*line.split())
    assert {key: getattr(config, key) for key in TORN_APART[line]} == TORN_APART[line]


@pytest.mark.parametrize("word", TAKEN)
def test_what_is_unambiguous_is_taken(here, monkeypatch, word):
    monkeypatch.setenv("WHERE", "/scratch/me")
    key, value = TAKEN[word]
    config = composed(word) if key == "input" else composed("input=a.fa", word)
    assert getattr(config, key) == value


def test_weights_take_a_home_and_a_variable(here, monkeypatch):
    from dist_esm.model.weights import locate

    monkeypatch.setenv("WHERE", "/scratch/me")
    assert composed("input=a.fa", "model.weights=$WHERE/a b.pt").model.weights == "/scratch/me/a b.pt"
    assert locate(composed("input=a.fa", "model.weights=~/x.pt").model) == Path("~/x.pt").expanduser()
    assert composed("input=a.fa", "model.weights=null").model.weights is None


def test_input_given_several_times_is_one_list(here):
    """`input=s/{a,b,c}.fa` in bash is three words."""
    assert composed("input=a.fa", "input=b.fa", "input=[c.fa,a.fa]").input == ["a.fa", "b.fa", "c.fa", "a.fa"]


def test_keys_and_options_come_in_any_order(here, capsys):
    for line in (["--cfg", "device=cpu", "input=a.fa"], ["input=a.fa", "--cfg", "device=cpu"]):
        assert main(line) == 0
        assert "device: cpu\n" in capsys.readouterr().out


REFUSED = [
    # words; what the line says; words that follow its remedy; a key and its value then
    (
        ["dtype=fp32", "dtype=bf16"],
        "dtype is given twice: dtype=fp32 and dtype=bf16: give it once",
        ["dtype=bf16"],
        "dtype",
        Dtype.bf16,
    ),
    (
        ["output_dir="],
        "output_dir is empty: write output_dir=PATH, or leave it out for its default",
        [],
        "output_dir",
        Path("embeddings"),
    ),
    (
        ["output_dir=null"],
        "output_dir=null names nothing: leave it out, or write output_dir=./null",
        ["output_dir=./null"],
        "output_dir",
        Path("null"),
    ),
    (
        ["model.weights="],
        "model.weights is empty: write model.weights=PATH, or leave it out for its default",
        [],
        "job",
        Job.embed,
    ),
    (
        ["model.weights=None"],
        "model.weights=None names nothing: write model.weights=null",
        ["model.weights=null"],
        "job",
        Job.embed,
    ),
    (
        ["+dtype=fp32"],
        "+dtype=fp32: dtype is a key already: write dtype=fp32",
        ["dtype=fp32"],
        "dtype",
        Dtype.fp32,
    ),
    (
        ["++dtype=fp32"],
        "++dtype=fp32: dtype is a key already: write dtype=fp32",
        ["dtype=fp32"],
        "dtype",
        Dtype.fp32,
    ),
    (["~dtype"], "'~dtype' is not key=value: leave dtype out for its default", [], "dtype", Dtype.auto),
    (
        ["~dtype=fp32"],
        "~dtype=fp32: a key cannot be taken out: leave it out for its default",
        [],
        "dtype",
        Dtype.auto,
    ),
    (
        ["+truncation_seq_lenght=5"],
        "'truncation_seq_lenght' is no key: did you mean truncation_seq_length?",
        ["truncation_seq_length=5"],
        "truncation_seq_length",
        5,
    ),
    (
        ["hydra.run.dir=x"],
        "hydra.run.dir=x does nothing here: leave it out; a run writes to output_dir alone",
        [],
        "job",
        Job.embed,
    ),
    (
        ["hydra/job_logging=none"],
        "hydra/job_logging=none does nothing here: leave it out",
        [],
        "job",
        Job.embed,
    ),
    (["fromat=h5"], "'fromat' is no key: did you mean format?", ["format=h5"], "format", Format.h5),
    (["Format=h5"], "'Format' is no key: did you mean format?", ["format=h5"], "format", Format.h5),
    (
        ["lower_case=unknown"],
        "'lower_case' is no key: did you mean residues.lower_case?",
        ["residues.lower_case=unknown"],
        "job",
        Job.embed,
    ),
    (["sequences=x"], "'sequences' is no key: see --help for the keys", [], "job", Job.embed),
    (["=x"], "'' is no key: see --help for the keys", [], "job", Job.embed),
    (
        ["format=hdf5"],
        "format=hdf5 is no choice: did you mean h5? use one of pt, fair_esm, h5, parquet, safetensors, npy",
        ["format=h5"],
        "format",
        Format.h5,
    ),
    (
        ["job=embde"],
        "job=embde is no choice: did you mean embed? use one of embed,",
        ["job=embed"],
        "job",
        Job.embed,
    ),
    (
        ["dtype=None"],
        "dtype=None is no choice: use one of auto, fp32, bf16, fp16, fp8",
        ["dtype=auto"],
        "dtype",
        Dtype.auto,
    ),
    (
        ["residues=fix"],
        "residues=fix: residues is a group of keys: write for example residues.lower_case=VALUE",
        ["residues.lower_case=fix"],
        "job",
        Job.embed,
    ),
    (
        ["truncation_seq_length=None"],
        "truncation_seq_length=None is no value: write truncation_seq_length=null",
        ["truncation_seq_length=null"],
        "truncation_seq_length",
        None,
    ),
    (
        ["truncation_seq_length=1e3"],
        "truncation_seq_length=1e3 is not a whole number: for example truncation_seq_length=1022, or ",
        ["truncation_seq_length=1022"],
        "truncation_seq_length",
        1022,
    ),
    (
        ["toks_per_batch=1,2"],
        "toks_per_batch=1,2 is not a whole number: for example toks_per_batch=8192",
        ["toks_per_batch=8192"],
        "toks_per_batch",
        8192,
    ),
    (
        ["repr_layers=last"],
        "repr_layers=last is not a whole number: for example repr_layers=-1",
        ["repr_layers=-1"],
        "repr_layers",
        [-1],
    ),
    (
        ["unit_share=half"],
        "unit_share=half is not a number: for example unit_share=0.01",
        ["unit_share=0.01"],
        "unit_share",
        0.01,
    ),
    (
        ["resume=maybe"],
        "resume=maybe is neither true nor false: write resume=true or resume=false",
        ["resume=true"],
        "resume",
        True,
    ),
    (
        ["include=meen"],
        "include=meen is no choice: did you mean mean? use one of mean, bos, per_tok",
        ["include=mean"],
        "include",
        [Include.mean],
    ),
    (
        ["b.fa"],
        "'b.fa' is not key=value: write input=[a.fa,b.fa]",
        ["input=[a.fa,b.fa]"],
        "input",
        ["a.fa", "b.fa"],
    ),
    (
        ["selfcheck"],
        "'selfcheck' is not key=value: write job=selfcheck",
        ["job=selfcheck"],
        "job",
        Job.selfcheck,
    ),
    (
        ["dtype"],
        "'dtype' is not key=value: write dtype=VALUE, and see --help",
        ["dtype=fp32"],
        "dtype",
        Dtype.fp32,
    ),
    (
        ["output_dir=$NOWHERE/x"],
        "output_dir=$NOWHERE/x: the variable NOWHERE is not set: set it, or write the path itself",
        ["output_dir=/x"],
        "output_dir",
        Path("/x"),
    ),
    (
        ["input=no.fa,a.fa"],
        "input=no.fa,a.fa does not exist: a list is written input=[no.fa,a.fa]",
        ["input=[no.fa,a.fa]"],
        "input",
        ["no.fa", "a.fa"],
    ),
    (
        ["--multirun"],
        "--multirun is no option: one call is one run; a list is written in brackets, as include=[mean,bos]",
        ["include=[mean,bos]"],
        "include",
        [Include.mean, Include.bos],
    ),
    (
        ["--include", "mean", "per_tok"],
        "--include mean per_tok is no option: write include=[mean,per_tok]",
        ["include=[mean,per_tok]"],
        "include",
        [Include.mean, Include.per_tok],
    ),
    (
        ["--include=mean"],
        "--include=mean is no option: write include=[mean]",
        ["include=[mean]"],
        "include",
        [Include.mean],
    ),
    (
        ["--repr_layers", "-1", "0"],
        "--repr_layers -1 0 is no option: write repr_layers=[-1,0]",
        ["repr_layers=[-1,0]"],
        "repr_layers",
        [-1, 0],
    ),
    (
        ["--toks_per_batch", "4096"],
        "--toks_per_batch 4096 is no option: write toks_per_batch=4096",
        ["toks_per_batch=4096"],
        "toks_per_batch",
        4096,
    ),
    (
        ["--toks-per-batch=4096"],
        "--toks-per-batch=4096 is no option: write toks_per_batch=4096",
        ["toks_per_batch=4096"],
        "toks_per_batch",
        4096,
    ),
    (
        ["--truncation_seq_length", "500"],
        "--truncation_seq_length 500 is no option: write truncation_seq_length=500",
        ["truncation_seq_length=500"],
        "truncation_seq_length",
        500,
    ),
    (["--nogpu"], "--nogpu is no option: write device=cpu", ["device=cpu"], "job", Job.embed),
    (
        ["--nproc_per_node=4"],
        "--nproc_per_node=4 is no option: it is torchrun's, write it before -m dist_esm",
        [],
        "job",
        Job.embed,
    ),
    (
        ["device=gpu"],
        "device=gpu is no choice: did you mean cuda? use one of auto, cuda, cpu",
        ["device=cuda"],
        "device",
        DeviceKind.cuda,
    ),
    (
        ["device=cuda:0"],
        "device=cuda:0 is no choice: did you mean cuda? use one of auto, cuda, cpu",
        ["device=cuda"],
        "device",
        DeviceKind.cuda,
    ),
    (
        ["save_dtype=fp16"],
        "save_dtype=fp16 is no choice: did you mean float16? use one of float32, float16",
        ["save_dtype=float16"],
        "save_dtype",
        SaveDtype.float16,
    ),
    (
        ["output_dir=~no_such_user/x"],
        "output_dir=~no_such_user/x: ~no_such_user is nobody's home: write output_dir=./~no_such_user/x",
        ["output_dir=./~no_such_user/x"],
        "output_dir",
        Path("~no_such_user/x"),
    ),
    (
        ["model=a.fa"],
        "model=a.fa is a file, not the name of a model: write model=NAME model.weights=a.fa",
        ["model=esm2_t6_8M_UR50D", "model.weights=a.fa"],
        "job",
        Job.embed,
    ),
    (["--config-path", "x"], "--config-path is no option: write --config-dir DIR", [], "job", Job.embed),
    (["--verison"], "--verison is no option: did you mean --version?", [], "job", Job.embed),
    (["--config-dir"], "argument --config-dir: expected one argument", [], "job", Job.embed),
    (
        ["model=esm2_t33_650M"],
        "model=esm2_t33_650M is no model: did you mean esm2_t33_650M_UR50D? use one of esm2_t6_8M_UR50D,",
        ["model=esm2_t33_650M_UR50D"],
        "repr_layers",
        [-1],
    ),
    (
        ["model=esm1b_t33_650M_UR50S"],
        "model=esm1b_t33_650M_UR50S is not an ESM-2, and no other model is embedded here: use one of",
        ["model=esm2_t33_650M_UR50D"],
        "job",
        Job.embed,
    ),
    (
        ["model=esmc_300m"],
        "model=esmc_300m is not an ESM-2, and no other model is embedded here: use one of",
        ["model=esm2_t30_150M_UR50D"],
        "job",
        Job.embed,
    ),
    *(
        (
            [f"{synonym}={value}"],
            f"'{synonym}' is no key: did you mean {key}?",
            [f"{key}={value}"],
            key,
            taken,
        )
        for synonym, key, value, taken in [
            ("gpus", "ranks", "2", 2),
            ("nproc_per_node", "ranks", "2", 2),
            ("batch_size", "toks_per_batch", "64", 64),
            ("output", "output_dir", "x", Path("x")),
            ("max_len", "truncation_seq_length", "64", 64),
            ("precision", "dtype", "fp32", Dtype.fp32),
            ("layers", "repr_layers", "3", [3]),
        ]
    ),
    (
        ["ranks=0"],
        "ranks=0 is no number of ranks: write ranks=auto or ranks=2",
        ["ranks=auto"],
        "ranks",
        "auto",
    ),
    (
        ["ranks=two"],
        "ranks=two is neither auto nor a whole number: write ranks=auto or ranks=2",
        ["ranks=2"],
        "ranks",
        2,
    ),
    (
        ["output_dir", "runs"],
        "'output_dir' is not key=value: write output_dir=runs",
        ["output_dir=runs"],
        "output_dir",
        Path("runs"),
    ),
    (["-o", "runs"], "-o is no option: write output_dir=PATH", ["output_dir=x"], "output_dir", Path("x")),
    (
        ["--config-dir", "nowhere"],
        "--config-dir nowhere is not a directory: name the one that holds config.yaml",
        [],
        "job",
        Job.embed,
    ),
]


@pytest.mark.parametrize(
    ("words", "line", "remedied", "key", "value"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED]
)
def test_a_refusal_is_one_line_whose_remedy_works(here, words, line, remedied, key, value):
    words, remedied = (
        given if any(word.startswith("input=") for word in given) else ["input=a.fa", *given]
        for given in (words, remedied)
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole below
        composed(*words)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert getattr(composed(*remedied), key) == value


ESM_EXTRACT = (
    "esm2_t6_8M_UR50D a.fa out --repr_layers 0 6 --include mean per_tok --toks_per_batch 4096 --nogpu"
)


def test_a_line_of_esm_extract_is_answered_with_the_line_that_does_the_same(here):
    Path("w").mkdir()
    for line in (ESM_EXTRACT, ESM_EXTRACT.replace("esm2_t6", "w/esm2_t6").replace("50D", "50D.pt")):
        with pytest.raises(
            ValueError, match=r"^these are the words of esm-extract: write dist-esm "
        ) as caught:
            composed(*line.split())
        config = composed(*str(caught.value).partition("write dist-esm ")[2].split())
        assert (config.input, config.output_dir, config.model.name) == (
            "a.fa",
            Path("out"),
            "esm2_t6_8M_UR50D",
        )
        assert (config.repr_layers, config.include) == ([0, 6], [Include.mean, Include.per_tok])
        assert (config.toks_per_batch, config.device) == (4096, DeviceKind.cpu)
        assert config.model.weights == ("w/esm2_t6_8M_UR50D.pt" if "w/" in line else None)


def test_a_path_that_the_shell_tore_apart_at_a_blank_is_shown_in_quotes(here):
    Path("my proteins (1).fa").write_text(FASTA)
    with pytest.raises(ValueError, match=r"quoted: write 'input=my proteins \(1\)\.fa'$"):
        composed("input=my", "proteins", "(1).fa")


START = "defaults: [config, _self_]\ninput: a.fa\n"
YAML = {
    # a user's configuration; what the line says behind the file; the same, mended
    "input: [a\ndtype: fp32\n": (
        ", line 2: this is no YAML: expected ',' or ']', but got ':'",
        "dtype: fp32\n",
    ),
    START + "\tdtype: fp32\n": (", line 3: this is no YAML: found character '\\t'", START + "dtype: fp32\n"),
    START + "dtype: fp31\n": (
        ", line 3: dtype: fp31 is no choice: did you mean fp32? use one of auto, fp32",
        START + "dtype: fp32\n",
    ),
    START + "dtipe: fp32\n": (", line 3: 'dtipe' is no key: did you mean dtype?", START + "dtype: fp32\n"),
    START + "residues:\n  gaps: fox\n": (
        ", line 4: residues.gaps: fox is no choice: did you mean fix? use one of fix, unknown",
        START + "residues:\n  gaps: fix\n",
    ),
    START + "include: mean\n": (
        ", line 3: include: write a list, as include: [mean]",
        START + "include: [mean]\n",
    ),
    START + "toks_per_batch: None\n": (
        ", line 3: toks_per_batch: None is no value: write toks_per_batch: null",
        START + "toks_per_batch: null\n",
    ),
    START + "resume: 3x\n": (
        ", line 3: resume: 3x is neither true nor false: write resume: true or resume: false",
        START + "resume: true\n",
    ),
    START + "output_dir: 2024\n": (
        ', line 3: output_dir: 2024 is read as a number or a truth value: write output_dir: "2024"',
        START + 'output_dir: "2024"\n',
    ),
    START + "output_dir: [a]\n": (
        ", line 3: output_dir: ['a'] is a list: write output_dir: PATH",
        START + "output_dir: a\n",
    ),
    START + 'output_dir: ""\n': (
        ", line 3: output_dir is empty: write output_dir: PATH, or leave it out for its default",
        START + "output_dir: out\n",
    ),
    START + "output_dir: ' '\n": (", line 3: output_dir is empty: write output_dir: PATH", START),
    START + "output_dir:\n": (", line 3: output_dir is empty: write output_dir: PATH", START),
    START + "output_dir: ${oc.env:EMPTY}\n": (", line 3: output_dir is empty: write output_dir: PATH", START),
    START + "hydra:\n  run:\n    dir: x\n": (
        ", line 4: hydra.run does nothing here: leave it out",
        START,
    ),
    START + "model: esm2_t6_8M_UR50D\n": (
        ", line 3: model: esm2_t6_8M_UR50D is chosen in the defaults list: "
        "write 'override model: esm2_t6_8M_UR50D' there",
        "defaults: [config, {override model: esm2_t6_8M_UR50D}, _self_]\ninput: a.fa\n",
    ),
    START + "residues: fix\n": (
        ", line 3: residues: fix: residues is a group of keys: write them below it, indented",
        START + "residues:\n  lower_case: fix\n",
    ),
    START + "dtype: fp32\ndtype: bf16\n": (
        ", line 4: this is no YAML: found duplicate key dtype",
        START + "dtype: bf16\n",
    ),
    START + "input: ${nope}\n": (", line 3: this is no YAML: found duplicate key input", START),
    START + "toks_per_batch: ${nope}\n": (": toks_per_batch: Interpolation key 'nope' not found", START),
    "- a\n": (": primary config 'mine' must be a DictConfig, got ListConfig", START),
    "input: a.fa\n": (
        " does not start from the defaults: write 'defaults: [config, _self_]' at its beginning",
        START,
    ),
    "defaults: [confg, _self_]\ninput: a.fa\n": (
        " names confg, of which there is no file: correct its defaults list",
        START,
    ),
}


@pytest.mark.parametrize("text", YAML)
def test_an_error_in_a_configuration_file_is_one_line_that_names_file_and_line(here, monkeypatch, text):
    line, mended = YAML[text]
    monkeypatch.setenv("EMPTY", "")
    Path("mine.yaml").write_text(text)
    options = ["--config-dir", ".", "--config-name", "mine"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole below
        composed(*options)
    assert str(caught.value).startswith(f"{here / 'mine.yaml'}{line}")
    assert "\n" not in str(caught.value)
    Path("mine.yaml").write_text(mended if "defaults" in mended else START + mended)
    composed(*options)


@pytest.mark.parametrize("key", ["weights", "adapter"])
def test_a_configuration_file_with_an_empty_path_of_weights_is_refused(here, key):
    Path("mine.yaml").write_text(START + f"model:\n  {key}: ' '\n")
    with pytest.raises(ValueError, match=rf"^model.{key} is empty: name a path, or write null"):
        composed("--config-dir", ".", "--config-name", "mine")


def test_a_configuration_file_may_name_a_model_of_its_own_and_say_so_when_it_is_not_there(here):
    Path("model").mkdir()
    Path("model/small.yaml").write_text("name: small\nnum_layers: 2\nembed_dim: 8\nattention_heads: 2\n")
    Path("mine.yaml").write_text("defaults: [config, {override model: small}, _self_]\ninput: 2024\n")
    options = ["--config-dir", ".", "--config-name", "mine"]
    with pytest.raises(
        ValueError, match=r"^input=2024 is read as a number or a truth value: write it in quotes"
    ):
        composed(*options)
    assert composed(*options, "input=a.fa").model.name == "small"
    with pytest.raises(
        ValueError, match=r"^model=tiny is no model: use one of esm2_t6_8M_UR50D, .*auto, small"
    ):
        composed(*options, "model=tiny")
    with pytest.raises(
        ValueError, match=r"^--config-name main: .* has no main.yaml: did you mean mine\? it holds mine$"
    ):
        composed("--config-dir", ".", "--config-name", "main")


RUNS = {
    "input=no.fa": r"input=no\.fa does not exist: name a FASTA file, a directory, a glob or a list of these",
    "input=*.fsta": r"input=\*\.fsta matches no FASTA file \(.*\): check the pattern, .*",
    "input=empty": r"input=empty .*",
    "output_dir=a.fa": r"output_dir=a\.fa cannot be written to \(.*\): name a directory that can",
    "output_dir=/proc/x": r"output_dir=/proc/x cannot be written to \(.*\): name a directory that can",
    "model.weights=no.pt": r"model\.weights=no\.pt is not a file or directory: name fair-esm's \.pt or .*",
    "model.weights=a.fa": r"a\.fa is a FASTA file and no weights \(.*\): proteins are named by input=, .*",
    "model.weights=other.pt": r"other\.pt holds no ESM-2 .*: use an ESM-2, for example model\.weights=null.*",
    "model.weights=other.safetensors": r"other\.safetensors holds no ESM-2 .*: use an ESM-2, .*",
    "model.weights=null": r".*esm2_t6_8M_UR50D\.pt is missing and http://127\.0\.0\.1:9\S* cannot be "
    r"downloaded \(.*\): put the file there, or name it with model\.weights=PATH",
    "model=auto model.weights=null": r"model=auto takes the size from the weights: set model\.weights=.*",
    "repr_layers=[3]": r"output_dir=done holds embeddings made under other settings \(layers=\[6\] before, "
    r"\[3\] now\): name another output_dir, or start over with resume=false",
    "attention=triton": r"attention=triton needs a CUDA GPU .*: use attention=auto",
}
"""What is wrong with a run, and is seen when its files, weights and directory are looked at."""


@pytest.mark.parametrize("words", RUNS)
def test_what_a_run_cannot_start_with_is_one_line(here, words, capfd, monkeypatch):
    from dist_esm.model.checkpoints import locate

    monkeypatch.setattr(locate, "URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    Path("empty").mkdir()
    torch.save({"a": torch.zeros(3)}, "other.safetensors")
    Path("other.pt").write_bytes(save({"a": torch.zeros(3)}))
    usual = {
        "input": "a.fa",
        "output_dir": "done",
        "model": "esm2_t6_8M_UR50D",
        "model.weights": "random",
        "device": "cpu",
    }
    if "repr_layers" in words:
        assert main([f"{key}={value}" for key, value in usual.items()]) == 0
        capfd.readouterr()
    given = dict(word.split("=", 1) for word in words.split())
    assert main([f"{key}={value}" for key, value in {**usual, **given}.items()]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if " INFO " not in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(f"dist_esm: error: {RUNS[words]}", lines[0]), lines[0]


@pytest.mark.distributed
def test_ranks_say_a_refusal_once_and_empty_output_dir_writes_nothing(here):
    result = run_ranks(2, "input=a.fa", "output_dir=", forks=False)
    ours = [line for line in result.stderr.splitlines() if line.startswith("dist_esm:")]
    assert ours == [
        "dist_esm: error: output_dir is empty: write output_dir=PATH, or leave it out for its default"
    ]
    assert sorted(path.name for path in here.iterdir()) == ["a.fa", "b.fa", "c.fa"]
    *_, reason, _ = result.stderr.splitlines()
    assert (
        reason == "  traceback : output_dir is empty: write output_dir=PATH, or leave it out for its default"
    )
    assert "<NO_OTHER_FAILURES>" in result.stderr
