"""The words of the command line, read before Hydra sees them: what is plain is taken, the rest explained.

Hydra's grammar is made for sweeps and nested values. It refuses paths such as `it's.fasta`, reads `20240501`
as a number, and takes a key that is given twice, `+key` and `hydra.key` without a word. So text (`input`,
`output_dir`, `model.weights`) never passes through that grammar, and every other value is checked here
against the type of its key.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from dist_esm.commandline.mistakes import esm_extract_in_keys, no_key, no_key_value, no_option, shown
from dist_esm.config import Config, no_choice, unknown_model
from dist_esm.keys import is_auto_or_number, is_in_brackets, is_text, key_types, model_names

EXAMPLES = {
    "toks_per_batch": "8192",
    "selfcheck.max_spread_error": "0.03",
    "selfcheck.min_neighbours_kept": "0.99",
    "selfcheck.max_relative_error": "1e-5",
}
"""Values to show for keys whose default is null."""
NO_VALUE = ("null", "none")
TRUTH = ("true", "false", "yes", "no", "y", "n", "on", "off", "1", "0")
"""Words that OmegaConf takes as a truth value."""


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Tell options from `key=value` words, in any order.

    Raises
    ------
    ValueError
        If an option is unknown; the message names the key or option that does the same.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--config-name", default="config")
    parser.add_argument("overrides", nargs="*")
    try:
        options, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    words = list(argv or ())
    line = esm_extract_in_keys(words)
    if line is not None:
        raise ValueError(f"these are the words of esm-extract: write dist-esm {line}")
    if unknown:
        at = next((index for index, word in enumerate(words) if word == unknown[0]), len(words))
        raise ValueError(no_option(unknown[0], words[at + 1 :]))
    return options


Text = str | list[str] | None


def read_words(words: Sequence[str], config_dir: str | None = None) -> tuple[list[str], dict[str, Text]]:
    """Read the `key=value` words.

    Parameters
    ----------
    words
        As the shell gave them.
    config_dir
        The folder of the user's own configuration, whose folders are groups that Hydra knows.

    Returns
    -------
    overrides that Hydra's grammar reads as they are meant; text by key, for after Hydra

    Raises
    ------
    ValueError
        One line that names the key, its value and what to write.
    """
    types = key_types()
    words = put_together(words, types)
    given: dict[str, str] = {}
    inputs: list[str] = []
    overrides: list[str] = []
    for word in words:
        if "=" not in word:
            raise ValueError(no_key_value(word, words))
        key, value = split_word(word, types, config_dir)
        if key == "input":
            inputs.append(value)
        elif key in given:
            raise ValueError(f"{key} is given twice: {key}={given[key]} and {key}={value}: give it once")
        given[key] = value
    texts: dict[str, Text] = {}
    if inputs:
        texts["input"] = read_inputs(inputs)
    for key, value in given.items():
        if key == "input":
            continue
        hint = types.get(key)
        if key == "model":
            overrides.append(f"model={model_name(value, config_dir)}")
        elif hint is None:
            overrides.append(f"{key}={value}")
        elif is_text(hint):
            texts[key] = read_text(key, value, is_optional=NoneType in get_args(hint))
        else:
            overrides.append(f"{key}={read_value(key, hint, value)}")
    return overrides, texts


def put_together(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Put together what blanks have torn apart in the shell: `key = value`, and lists in brackets."""
    whole: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if rest and word in types and rest[0].startswith("="):
            word += rest.pop(0)
        key, equals, value = word.partition("=")
        if rest and key in types and equals and not value and "=" not in rest[0]:
            value = rest.pop(0)
        if key in types and value.startswith("[") and not os.path.lexists(value):
            ends = [at for at in range(1, len(rest) + 1) if is_in_brackets(" ".join([value, *rest[:at]]))]
            if ends and not is_in_brackets(value):
                value = " ".join([value, *rest[: ends[0]]])
                del rest[: ends[0]]
        whole.append(f"{key}{equals}{value}")
    return whole


def split_word(word: str, types: Mapping[str, Any], config_dir: str | None) -> tuple[str, str]:
    """Split a word into a key that there is, and its value."""
    signed, _, value = word.partition("=")
    key = signed.lstrip("+~")
    if key == "hydra.searchpath" and config_dir:
        raise ValueError(f"{word} does nothing beside --config-dir: leave it out")
    if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
        raise ValueError(f"{word} does nothing here: leave it out; a run writes to output_dir alone")
    is_group = bool(config_dir and key and (Path(config_dir) / key).is_dir())
    if key not in types and not is_group and key != "hydra.searchpath":
        if os.path.lexists(word):
            raise ValueError(f"{key!r} is no key: write {shown('input', word)}")
        raise ValueError(no_key(key, types))
    if signed.startswith("~"):
        raise ValueError(f"{word}: a key cannot be taken out: leave it out for its default")
    if signed.startswith("+") and not is_group:
        raise ValueError(f"{word}: {key} is a key already: write {shown(key, value)}")
    return (signed if is_group else key), value


def model_name(value: str, config_dir: str | None) -> str:
    """Return the name of a model that there is."""
    name = unquoted(value)
    if os.path.isfile(value):
        stem = Path(value).stem
        model = stem if stem in model_names(config_dir) else "NAME"
        remedy = f"write model={model} {shown('model.weights', value)}"
        raise ValueError(f"model={value} is a file, not the name of a model: {remedy}")
    if name not in model_names(config_dir):
        raise ValueError(unknown_model(name, model_names(config_dir)))
    return name


def unquoted(text: str) -> str:
    """Take off the quotes or backslashes that Hydra's grammar would want."""
    quoted = re.fullmatch(r"""\s*(["'])(.*)\1\s*""", text, re.DOTALL)
    if quoted:
        return quoted[2].replace("\\" + quoted[1], quoted[1])
    return re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", text.strip())


def read_text(key: str, text: str, is_optional: bool = False) -> str | None:
    """Read a path or a name: as it stands if it is there, else without quotes and with `$NAME` filled in."""
    if os.path.lexists(text):
        return text
    text = unquoted(text)
    if not text:
        default = "" if key == "input" else ", or leave it out for its default"
        raise ValueError(f"{key} is empty: write {key}=PATH{default}")
    if text.lower() in NO_VALUE and key != "input":
        if is_optional and text.lower() == "null":
            return None
        remedy = f"write {key}=null" if is_optional else f"leave it out, or write {key}=./{text}"
        raise ValueError(f"{key}={text} names nothing: {remedy}")
    return text if os.path.lexists(text) else os.path.expandvars(text)


def read_inputs(values: Sequence[str]) -> str | list[str]:
    """Read the values of `input`, a list or not, to a path or a list of paths."""
    lists = [read_list(value) for value in values]
    if len(values) == 1 and lists[0] is None:
        return str(read_text("input", values[0]))
    paths: list[str] = []
    for value, items in zip(values, lists, strict=True):
        paths += [str(read_text("input", item)) for item in ([value] if items is None else items)]
    return paths


def read_list(value: str) -> list[str] | None:
    """Return the paths of a list, with brackets or, where each is there, without; None if it is no list."""
    if os.path.lexists(value) or re.fullmatch(r"""\s*(["']).*\1\s*""", value, re.DOTALL):
        return None
    text = value.strip()
    if is_in_brackets(text):
        item = r"""\s*((["'])(?:\\.|(?!\2).)*\2|(?:\\.|[^,\\])*)\s*(?:,|$)"""
        return [match[1] for match in re.finditer(item, text[1:-1], re.DOTALL) if match[1].strip()]
    parts = [part for part in re.split(r"," if "," in text else r"\s+", text) if part]
    if parts in ([], [text]) or glob.has_magic(text):
        return None
    if all(os.path.lexists(os.path.expanduser(os.path.expandvars(part))) for part in parts):
        return parts
    if "," not in text:
        return None
    raise ValueError(f"input={value} does not exist: a list is written {shown('input', f'[{text}]')}")


def read_value(key: str, hint: Any, value: str) -> str:
    """Check a value against the type of its key, and write it as Hydra's grammar reads it.

    Raises
    ------
    ValueError
        If it is none of that type.
    """
    if "${" in value:  # looked up by OmegaConf, which checks it
        return value
    text = unquoted(value)
    if hasattr(hint, "__dataclass_fields__"):
        first = next(name for name in key_types() if name.startswith(f"{key}."))
        raise ValueError(f"{key}={value}: {key} is a group of keys: write for example {first}=VALUE")
    if get_origin(hint) is list:
        (item_type,) = get_args(hint)
        items = re.split(r"[\s,]+", text[1:-1] if is_in_brackets(text) else text)
        return f"[{','.join(read_value(key, item_type, item) for item in items if item)}]"
    choices = get_args(hint)
    if is_auto_or_number(hint):
        if text != "auto" and not text.isdecimal():
            raise ValueError(f"{key}={value} is neither auto nor a whole number: write {key}=auto or {key}=2")
        return text
    if NoneType in choices:
        if text.lower() == "null":
            return "null"
        if text.lower() in NO_VALUE:
            raise ValueError(f"{key}={value} is no value: write {key}=null")
        hint = next(choice for choice in choices if choice is not NoneType)
    if issubclass(hint, Enum):
        if text not in hint.__members__:
            raise ValueError(no_choice(hint, key, text))
    elif hint is bool:
        if text.lower() not in TRUTH:
            raise ValueError(f"{key}={value} is neither true nor false: write {key}=true or {key}=false")
    else:
        refuse_unless_number(key, hint, text, NoneType in choices)
    return text


def refuse_unless_number(key: str, hint: type[int] | type[float], text: str, is_optional: bool) -> None:
    """Refuse text that is no number of a type."""
    try:
        hint(text)
    except ValueError:
        default: Any = Config()
        for name in key.split("."):
            default = getattr(default, name)
        example = EXAMPLES.get(key, default[0] if isinstance(default, list) else default)
        sort = "a whole number" if hint is int else "a number"
        remedy = f"for example {key}={example}" + (f", or {key}=null" if is_optional else "")
        raise ValueError(f"{key}={text} is not {sort}: {remedy}") from None
