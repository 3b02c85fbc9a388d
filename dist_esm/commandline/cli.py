"""The door to Hydra: composing the configuration, saying in one line what is wrong with it, and the help."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from enum import EnumType
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.commandline.arguments import read_value, read_words
from dist_esm.commandline.mistakes import no_key
from dist_esm.config import Config, Job, by_layers, conf_dir, plain_values, unknown_model
from dist_esm.keys import is_text, key_types, model_names

HELP = """\
usage: dist-esm input=PATH [key=value ...]

Embed proteins with ESM-2 on every visible GPU of this host, or on its CPU. `python -m dist_esm` is the same.
On clusters torchrun starts the ranks: torchrun --nproc_per_node=N -m dist_esm input=PATH [key=value ...]

examples:
  dist-esm input=proteins/ output_dir=embeddings/
  dist-esm input=[a.fasta,b.fasta.gz] model=esm2_t33_650M_UR50D repr_layers=33 include=mean,per_tok ranks=2
  dist-esm input=proteins/ output_dir=embeddings/ job=plan
  dist-esm input=proteins/ model=esm2_t6_8M_UR50D device=cpu job=selfcheck

jobs:
  job=embed      the default: embed the input into output_dir, or go on from what earlier launches finished
  job=plan       say what that would do, how long it would take and whether it would start; write nothing
  job=selfcheck  compare the numbers of these settings, weights and GPUs with fair-esm's own fp32 model,
                 on a sample of the input
  job=verify     check a finished output_dir against the input
  job=report     write the report of output_dir's last run again, also after a crash; no input is needed

options:
  -h, --help     this text
  --version      the version
  --cfg          print the configuration that would run, and stop
  --config-dir DIR --config-name NAME
                 start from NAME.yaml in DIR instead of the defaults; it begins with
                 'defaults: [config, _self_]'
"""
HELP_GROUPS = {
    "input and outputs": (
        "input",
        "id",
        "header_encoding",
        "output_dir",
        "format",
        "save_dtype",
        "compression",
        "include",
        "repr_layers",
    ),
    "model and device": ("model", "ranks", "device", "dtype", "fp8", "attention", "linear", "toks_per_batch"),
    "proteins": (
        "truncation_seq_length",
        "long",
        "window_overlap",
        "residues",
        "special_tokens",
        "chains",
        "dedupe",
    ),
    "the run": (
        "job",
        "resume",
        "max_restarts",
        "writers",
        "assign_by",
        "unit_share",
        "max_proteins_per_output",
        "max_consecutive_failures",
        "steal",
        "heartbeat_timeout",
        "progress_seconds",
        "verbosity",
        "report",
        "selfcheck",
    ),
}
MEANING_COLUMN, HELP_WIDTH = 34, 110


@dataclass
class Composed(Config):
    """The schema as Hydra has it: `output_dir` as it was written, since the path of "" is "."."""

    output_dir: Any = "embeddings"


def help_text() -> str:
    """Return the help: what to write, then every key with its default, its meaning and its choices."""
    lines = []
    for title, keys in HELP_GROUPS.items():
        lines += ["", f"{title}:"]
        for key in keys:
            lines += [line for name in keys_of(key) for line in key_help(name)]
    return HELP + "\n".join(lines) + "\n"


def keys_of(key: str) -> list[str]:
    """Return a key and the keys of its group that a user may set."""
    fixed = {"model.name", "model.num_layers", "model.embed_dim", "model.attention_heads"}
    group = [name for name in key_types() if name.startswith(f"{key}.") and name not in fixed]
    return group if key in ("residues", "selfcheck") else [key, *group]


def key_help(key: str) -> list[str]:
    """Return the lines of the help that tell a key."""
    group, _, name = key.rpartition(".")
    schema = key_types()[group] if group else Config
    default = plain_values(Config(input="PATH"))
    for part in key.split("."):
        default = default[part]
    hint = key_types()[key]
    if key == "model":
        default = next(entry.model for entry in default_entries() if "model" in entry)
        choices = sorted(model_names(None), key=by_layers)
    else:
        hints = (hint, *get_args(hint))
        choices = [member for part in hints if isinstance(part, EnumType) for member in part.__members__]
    meaning = meanings(schema)[name]
    if choices:
        meaning += f" One of {', '.join(choices)}."
    left = f"  {key}={shown_default(default)}"
    lines = textwrap.wrap(" ".join(meaning.split()), HELP_WIDTH - MEANING_COLUMN)
    if len(left) >= MEANING_COLUMN:
        lines.insert(0, "")
    rest = [" " * MEANING_COLUMN + line for line in lines[1:]]
    return [f"{left:<{MEANING_COLUMN}}{lines[0]}".rstrip(), *rest]


def default_entries() -> list[Any]:
    """Return the entries of our defaults list that choose a group's file."""
    return [
        entry
        for entry in OmegaConf.load(conf_dir() / "config.yaml").defaults
        if isinstance(entry, DictConfig)
    ]


def shown_default(value: Any) -> str:
    """Write a default as it is written on the command line."""
    return json.dumps(value).replace('"', "").replace(" ", "")


@cache
def meanings(schema: type[Any]) -> dict[str, str]:
    """Return the text under each field of a dataclass, as its source has it."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: str(text.value.value)
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def compose_config(
    words: Sequence[str], config_dir: str | None = None, config_name: str = "config"
) -> Config:
    """Compose the configuration of the command line's words, and turn it into typed objects.

    Parameters
    ----------
    words
        `key=value`, as the shell gave them.
    config_dir, config_name
        The folder and name of the user's own configuration, in place of the defaults.

    Raises
    ------
    ValueError
        One line that names the key, its value and what to write.

    Examples
    --------
    >>> compose_config(["input=proteins/", "include=mean,bos"]).include
    [<Include.mean: 'mean'>, <Include.bos: 'bos'>]
    """
    config_name = config_name.removesuffix(".yaml")
    if config_dir and not Path(config_dir).is_dir():
        raise ValueError(
            f"--config-dir {config_dir} is not a directory: name the one that holds {config_name}.yaml"
        )
    overrides, texts = read_words(words, config_dir)
    folder = Path(config_dir or conf_dir()).resolve()
    try:
        composed = compose_files(folder, config_name, overrides)
        texts = {key: looked_up(composed, key, text) for key, text in texts.items()}
        for key, text in texts.items():
            OmegaConf.update(composed, key, escaped(text))
        if composed.job is Job.report and OmegaConf.is_missing(composed, "input"):
            composed.input = str(composed.output_dir)  # it looks at nothing else
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise ValueError(
                f"{min(missing)} is required: for example input=proteins/; --help shows all keys"
            )
        config = OmegaConf.to_object(composed)
    except yaml.YAMLError as error:
        raise ValueError(yaml_problem(error)) from None
    except UnicodeDecodeError:
        raise ValueError(f"{folder / config_name}.yaml is not UTF-8: save it as UTF-8") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, folder, config_name)) from None
    assert isinstance(config, Config)
    for key, text in texts.items():
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, text)
    if not isinstance(config.output_dir, str) or not config.output_dir.strip():
        raise ValueError(no_output_dir(config.output_dir, folder / f"{config_name}.yaml"))
    return fill_in(Config(**vars(config)))


def no_output_dir(value: Any, path: Path) -> str:
    """Say in one line what is wrong with an `output_dir` that is no text, and where that stands."""
    line, written = find_in_yaml(path, "output_dir")
    where = f"{path}, line {line}: " if line else ""
    if value is None or not str(value).strip():
        return f"{where}output_dir is empty: write output_dir: PATH, or leave it out for its default"
    if isinstance(value, (list, dict)):
        return f"{where}output_dir: {value} is a {type(value).__name__}: write output_dir: PATH"
    return where + yaml_value_problem("output_dir", str(value) if written is None else written)


def compose_files(folder: Path, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration file and what it starts from, as Hydra does.

    Raises
    ------
    ValueError
        If it does not start from the defaults, or sets what only Hydra's own application has.
    """
    path = folder / f"{config_name}.yaml"
    searchpath = []
    if folder != conf_dir():
        ours = str(conf_dir()).replace("'", "\\'")
        searchpath = [f"hydra.searchpath=['file://{ours}']"]
        for key in ("run", "sweep", "job", "launcher", "sweeper", "output_subdir", "mode"):
            line, _ = find_in_yaml(path, f"hydra.{key}")
            if line:
                raise ValueError(f"{path}, line {line}: hydra.{key} does nothing here: leave it out")
    ConfigStore.instance().store(name="schema", node=Composed)
    with warnings.catch_warnings(), initialize_config_dir(str(folder), version_base="1.3"):
        warnings.filterwarnings("ignore", "In .*Defaults list is missing `_self_`")
        composed = compose(config_name, overrides=[*overrides, *searchpath])
    if OmegaConf.get_type(composed) is not Composed:
        remedy = "write 'defaults: [config, _self_]' at its beginning"
        raise ValueError(f"{path} does not start from the defaults: {remedy}")
    return composed


def looked_up(composed: DictConfig, key: str, text: Any) -> Any:
    """Return text, or a list of it, with what OmegaConf knows by `${oc.env:HOME}` or `${output_dir}`."""
    if isinstance(text, list):
        return [looked_up(composed, key, item) for item in text]
    if text is None or os.path.lexists(text) or not re.search(r"\$\{.*\}", text):
        return text
    OmegaConf.update(composed, key, text)
    return str(OmegaConf.select(composed, key, throw_on_missing=True))


def escaped(text: Any) -> Any:
    """Return text, or a list of it, that OmegaConf takes as it stands."""
    if isinstance(text, list):
        return [escaped(item) for item in text]
    return "-" if text == "???" else text.replace("${", "\\${") if text is not None else None


def fill_in(config: Config) -> Config:
    """Fill in `~` and `$NAME` in paths, as a shell does; `~` in `input` is left to the search for files."""
    if isinstance(config.input, str):
        config.input = variables_filled_in("input", config.input)
    elif isinstance(config.input, list):
        config.input = [
            variables_filled_in("input", item) if isinstance(item, str) else item for item in config.input
        ]
    output_dir = variables_filled_in("output_dir", str(config.output_dir))
    at_home = os.path.expanduser(output_dir)
    if at_home.startswith("~") and not os.path.lexists(at_home):
        user = output_dir.partition("/")[0]
        raise ValueError(f"output_dir={output_dir}: {user} is nobody's home: write output_dir=./{output_dir}")
    config.output_dir = Path(at_home)
    if config.model.weights is not None:
        config.model.weights = variables_filled_in("model.weights", config.model.weights)
    if config.model.adapter is not None:
        config.model.adapter = variables_filled_in("model.adapter", config.model.adapter)
    return config


def variables_filled_in(key: str, text: str) -> str:
    """Return a path with the values of its `$NAME`, unless there is a path of that very name.

    Raises
    ------
    ValueError
        If a variable is not set.
    """
    if os.path.lexists(text):
        return text
    filled_in = os.path.expandvars(text)
    unset = re.search(r"\$(\w+|\{\w+\})", filled_in, re.ASCII)
    if unset:
        name = unset[1].strip("{}")
        raise ValueError(f"{key}={text}: the variable {name} is not set: set it, or write the path itself")
    return filled_in


def yaml_problem(error: yaml.YAMLError) -> str:
    """Say in one line which file is no YAML, and where."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return f"a configuration file is no YAML: {' '.join(str(error).split())}"
    problem = " ".join(str(error.problem or error.context).split())
    return f"{mark.name}, line {mark.line + 1}: this is no YAML: {problem}"


def explain(error: Exception, folder: Path, config_name: str) -> str:
    """Say in one line what Hydra refused: file, line, key, value, and what to write."""
    if isinstance(error, MissingConfigException):
        return no_such_file(error, folder, config_name)
    text = " ".join(line.strip() for line in flattened(error) if not line.strip().startswith(NOISE))
    raised = re.match(r"In '(?P<name>[^']*)': .*\n(?P<problem>.*)\n\s*full_key: (?P<key>[\w.]*)", str(error))
    if raised is None:
        key = getattr(error, "full_key", None)
        where = "" if folder == conf_dir() else f"{folder / config_name}.yaml: "
        return where + (f"{key}: {text}" if key else text)
    path, key = folder / f"{raised['name']}.yaml", raised["key"]
    if not key:  # text where a group of keys is wanted
        groups = [name for name, hint in key_types().items() if is_dataclass(hint)]
        key = next((name for name in groups if find_in_yaml(path, name)[1] is not None), "")
    line, value = find_in_yaml(path, key)
    if key and key not in key_types():
        problem = no_key(key, key_types())
    else:
        problem = raised["problem"] if value is None else yaml_value_problem(key, value)
    return f"{path}{f', line {line}' if line else ''}: {problem if key in problem else f'{key}: {problem}'}"


def yaml_value_problem(key: str, value: str) -> str:
    """Say in one line what is wrong with a scalar in a configuration file, and what to write."""
    hint = key_types().get(key)
    if key == "model":
        return f"model: {value} is chosen in the defaults list: write 'override model: {value}' there"
    if is_dataclass(hint):
        return f"{key}: {value}: {key} is a group of keys: write them below it, indented"
    if is_text(hint):
        return f'{key}: {value} is read as a number or a truth value: write {key}: "{value}"'
    try:
        read_value(key, hint, value)
    except ValueError as problem:
        return str(problem).replace(f"{key}=", f"{key}: ")
    return f"{key}: write a list, as {key}: [{value}]"


NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "To append",
    "Set the environment",
    "Config search path",
    "provider=",
    "See https",
)
"""Beginnings of lines of Hydra's messages that help nobody who writes `key=value`."""


def flattened(error: BaseException) -> list[str]:
    """Return the distinct lines of an error and of what caused it."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None and str(cause) not in messages:
        messages.append(str(cause))
        cause = cause.__cause__
    return list(dict.fromkeys(line for message in messages for line in message.splitlines() if line.strip()))


def no_such_file(error: MissingConfigException, folder: Path, config_name: str) -> str:
    """Say in one line which configuration file is not there, and which are."""
    wanted = error.missing_cfg_file or ""
    if wanted == config_name:
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        holds = f"it holds {', '.join(names)}" if names else "it holds no yaml file"
        near = difflib.get_close_matches(wanted, names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"--config-name {wanted}: {folder} has no {wanted}.yaml: {guess}{holds}"
    group, _, name = wanted.rpartition("/")
    if group == "model":
        return unknown_model(name, error.options or [])
    choices = f": use one of {', '.join(error.options)}" if error.options else ": correct its defaults list"
    return f"{folder / config_name}.yaml names {wanted}, of which there is no file{choices}"


def find_in_yaml(path: Path, key: str) -> tuple[int | None, str | None]:
    """Return the line of a key in a file, from 1, and its value if that is a scalar."""
    if not path.is_file():
        return None, None
    with path.open(encoding="utf-8") as file:
        node = yaml.compose(file)
    line = None
    for name in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key_node, value) for key_node, value in pairs if key_node.value == name), None)
        if match is None:
            return None, None
        line, node = match[0].start_mark.line + 1, match[1]
    return line, node.value if isinstance(node, yaml.ScalarNode) else None


def config_text(config: Config) -> str:
    """Return the configuration as a YAML file that `--config-name` reads; `${` in a name stays a name."""
    text = json.dumps(plain_values(config)).replace("${", "\\\\${")
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(text)))
