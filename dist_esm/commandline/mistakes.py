"""What to write in place of a word of the command line that is no key, no option or no `key=value`."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from dist_esm.config import Job
from dist_esm.keys import is_in_brackets, key_types, model_names

REPLACED = {
    "selfcheck.min_cosine": "write selfcheck.max_spread_error=0.03, since cosines hardly tell proteins apart"
}
"""Keys that there were, and what to write in their place."""
REMEDIES = {
    "--nogpu": "write device=cpu",
    "-i": "write input=PATH",
    "-o": "write output_dir=PATH",
    "--multirun": "one call is one run; a list is written in brackets, as include=[mean,bos]",
    "-m": "one call is one run; a list is written in brackets, as include=[mean,bos]",
    "--config-path": "write --config-dir DIR",
    "-cd": "write --config-dir DIR",
    "-cn": "write --config-name NAME",
}
"""What does the same as an option of esm-extract or Hydra."""
TORCHRUN = (
    "--nproc",
    "--nnodes",
    "--node",
    "--rdzv",
    "--master",
    "--standalone",
    "--max-restarts",
    "--max_restarts",
)
"""Beginnings of torchrun's own options."""


SYNONYMS = {
    "ranks": (
        "gpus",
        "gpu",
        "num_gpus",
        "n_gpus",
        "ngpus",
        "nproc",
        "nproc_per_node",
        "devices",
        "world_size",
    ),
    "toks_per_batch": ("batch", "batch_size", "batchsize", "max_tokens", "tokens_per_batch"),
    "repr_layers": ("layer", "layers", "repr_layer"),
    "input": ("fasta", "fasta_file", "file", "files", "in", "path", "i"),
    "output_dir": ("output", "out", "out_dir", "outdir", "o"),
    "truncation_seq_length": ("max_length", "max_len", "max_seq_len", "truncate", "truncation"),
    "dtype": ("precision", "fp16", "bf16", "half", "quantize", "quantization"),
    "model.weights": ("checkpoint", "ckpt", "model_location", "model_path"),
    "include": ("pool", "pooling", "mean", "per_tok", "embedding"),
    "model": ("model_name", "name"),
    "selfcheck.proteins": ("num_proteins",),
}
"""Words that other programs use for a key."""
EXTRACT = {"toks_per_batch": 1, "repr_layers": None, "include": None, "truncation_seq_length": 1, "nogpu": 0}
"""Options of esm-extract, with how many values each takes; None: any number."""


def esm_extract_in_keys(words: Sequence[str]) -> str | None:
    """Write a command line of esm-extract, MODEL FASTA OUTPUT_DIR and options, with our keys.

    None if it is no such line.
    """
    places: list[str] = []
    options: dict[str, list[str]] = {}
    option, room = "", 0
    for word in words:
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            if option not in EXTRACT:
                return None
            options[option] = [value] if equals else []
            room = 0 if equals else EXTRACT[option] or len(words) * (EXTRACT[option] is None)
        elif room:
            options[option].append(word)
            room -= 1
        else:
            places.append(word)
    if len(places) != 3 or any("=" in place for place in places):
        return None
    model, fasta, output_dir = places
    stem = model.rpartition("/")[2].removesuffix(".pt")
    if stem not in model_names(None):
        return None
    line = [f"model={stem}", shown("input", fasta), shown("output_dir", output_dir)]
    if model.endswith(".pt"):
        line.insert(1, shown("model.weights", model))
    for name, values in options.items():
        is_list = EXTRACT[name] is None
        text = f"[{','.join(values)}]" if is_list else "".join(values)
        line.append("device=cpu" if name == "nogpu" else f"{name}={text}")
    return " ".join(line)


def no_option(option: str, following: Sequence[str]) -> str:
    """Say in one line what to write in place of an option, given the words that follow it."""
    name, equals, value = option.partition("=")
    key = name.lstrip("-").replace("-", "_")
    values = [value] if equals else []
    for word in following if not equals else ():
        if "=" in word or (word.startswith("-") and not word[1:].isdigit()):
            break
        values.append(word)
    hint = key_types().get(key)
    if name in REMEDIES:
        remedy = REMEDIES[name]
    elif name.startswith(TORCHRUN):
        remedy = "it is torchrun's, write it before -m dist_esm"
    elif hint is None:
        options = ["--help", "--version", "--cfg", "--config-dir", "--config-name"]
        near = difflib.get_close_matches(name, options, n=1)
        remedy = f"did you mean {near[0]}?" if near else "write keys as key=value, and see --help"
    elif get_origin(hint) is list or (key == "input" and len(values) > 1):
        remedy = f"write {key}=[{','.join(values) or 'VALUE,...'}]"
    elif hint is bool and not values:
        remedy = f"write {key}=true"
    else:
        remedy = f"write {key}={values[0] if values else 'VALUE'}"
    given = " ".join([option, *values]) if hint is not None and not equals else option
    return f"{given} is no option: {remedy}"


def no_key(key: str, types: Mapping[str, Any]) -> str:
    """Say in one line that there is no such key, and which may be meant."""
    if key in REPLACED:
        return f"{key!r} is no key any more: {REPLACED[key]}"
    near = difflib.get_close_matches(key.strip().lower(), types, n=1)
    leaves = [name for name in types if name.rpartition(".")[2] == key.strip().lower()]
    synonyms = [name for name, others in SYNONYMS.items() if key.strip().lower().replace("-", "_") in others]
    guess = (synonyms or (leaves if len(leaves) == 1 else near))[:1]
    return f"{key!r} is no key" + (f": did you mean {guess[0]}?" if guess else ": see --help for the keys")


def no_key_value(word: str, words: Sequence[str]) -> str:
    """Say in one line what to write in place of a word without a key."""
    types = key_types()
    key = word.lstrip("+~")
    if word != key and key in types:
        remedy = f"leave {key} out for its default"
    elif (torn := torn_apart(word, words)) is not None:
        remedy = f"a value with blanks is quoted: write {torn}"
    elif os.path.lexists(word):
        keyed = [other.partition("=")[2] for other in words if other.startswith("input=")]
        paths = [path[1:-1] if is_in_brackets(path) else path for path in keyed]
        paths += [other for other in words if "=" not in other and os.path.lexists(other)]
        paths = [path for path in paths if path]
        remedy = f"write {shown('input', paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']')}"
    elif word in Job.__members__:
        remedy = f"write job={word}"
    elif word in model_names(None):
        remedy = f"write model={word}"
    elif word in types:
        following = words[list(words).index(word) + 1 :][:1]
        value = following[0] if following and "=" not in following[0] else "VALUE"
        remedy = f"write {shown(word, value)}" + (", and see --help" if value == "VALUE" else "")
    else:
        remedy = "for example input=proteins/"
    return f"{word!r} is not key=value: {remedy}"


def torn_apart(word: str, words: Sequence[str]) -> str | None:
    """Put a path together that the shell took apart at its blanks, quoted, if there is such a path."""
    at = list(words).index(word)
    start = next((index for index in range(at, -1, -1) if "=" in words[index]), None)
    for end in range(at + 1, len(words) + 1) if start is not None else ():
        key, _, value = " ".join(words[start:end]).partition("=")
        if os.path.lexists(value):
            return shown(key, value)
    return None


def shown(key: str, value: str) -> str:
    """Write a word as a shell takes it."""
    word = f"{key}={value}"
    return word if re.fullmatch(r"[\w./,:@%+=\[\]~^-]*", word, re.ASCII) else shlex.quote(word)
