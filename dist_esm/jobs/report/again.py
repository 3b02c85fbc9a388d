"""The command that goes on with a run, made of its configuration: what differs from the defaults."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from dist_esm.config import Config, model_config, plain_values
from dist_esm.launcher import is_started_by_us

QUOTED = frozenset(" \t,[]{}()'\"=#!$\\:")
"""Characters for which text in a list is put in quotes."""


def command_again(values: Mapping[str, Any], num_ranks: int) -> str:
    """Return a command that the shell takes, with torchrun if that has started these ranks.

    Parameters
    ----------
    values
        The configuration, as `plain_values` gives it.
    num_ranks
        Ranks of the run; a resumed run may have any number.
    """
    is_by_torchrun = num_ranks > 1 and "RANK" in os.environ and not is_started_by_us()
    launcher = f"torchrun --nproc_per_node={num_ranks}" if is_by_torchrun else "python"
    return shlex.join([*launcher.split(), "-m", "dist_esm", *words(values)])


def words(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key=value` for what differs from the defaults, `input` and `output_dir` first."""
    defaults = flat(plain_values(Config(input="")))
    try:
        defaults |= {
            f"model.{key}": value for key, value in vars(model_config(values["model"]["name"])).items()
        }
        is_known = True
    except ValueError:  # of model=auto
        is_known = False
    given = flat({key: value for key, value in values.items() if key not in ("job", "resume")})
    inputs = given.pop("input")
    is_like_a_list = isinstance(inputs, str) and ("," in inputs or inputs.startswith("["))
    yield f"input={quoted(inputs) if is_like_a_list else written(inputs)}"
    yield f"output_dir={given.pop('output_dir')}"
    yield f"model={given['model.name'] if is_known else 'auto'}"
    for key, value in given.items():
        is_of_file = key.startswith("model.") and key not in ("model.weights", "model.adapter", "model.seed")
        if not is_of_file and value != defaults.get(key):
            yield f"{key}={written(value)}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def written(value: Any) -> str:
    """Write a value as the command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(quoted(item) if needs_quotes(item) else str(item) for item in value)}]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def quoted(text: str) -> str:
    """Put text in quotes."""
    return json.dumps(text, ensure_ascii=False)


def needs_quotes(item: Any) -> bool:
    """Tell whether text in a list has to be put in quotes."""
    return isinstance(item, str) and bool(QUOTED & set(item))
