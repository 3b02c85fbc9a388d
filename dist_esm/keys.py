"""The keys of the command line and their types, and the models that there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.config import Config, conf_dir, no_choice


def key_types(schema: type[Any] = Config, prefix: str = "") -> dict[str, Any]:
    """Return the type of every key by its dotted name; a group of keys has the type of its dataclass."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        types[prefix + name] = hint
        if hasattr(hint, "__dataclass_fields__"):
            types |= key_types(hint, f"{prefix}{name}.")
    return types


def is_text(hint: Any) -> bool:
    """Return whether a key's value is text, taken as it stands: a path or a name."""
    return hint is Any or (bool({str, Path} & {hint, *get_args(hint)}) and not is_auto_or_number(hint))


def is_auto_or_number(hint: Any) -> bool:
    """Return whether a key's value is a whole number or the word `auto`."""
    return set(get_args(hint)) == {int, str}


def model_names(config_dir: str | None) -> list[str]:
    """Return the models that there are, those of the user's own configuration included."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return [path.stem for folder in folders for path in sorted((folder / "model").glob("*.yaml"))]


def is_in_brackets(text: str) -> bool:
    """Return whether the first bracket is closed by the last, as in `[a,b]` and not in `[ab]*[0-9]`."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth == 0:
            return index == len(text) - 1 and index > 0
    return False


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return a configuration with other values of some keys, as Python has them.

    Raises
    ------
    ValueError
        If there is no such key, or the value is none of its type.
    """
    types = key_types()
    for key, value in keys.items():
        if key not in types:
            near = difflib.get_close_matches(key, [name for name in types if "." not in name], n=1)
            raise ValueError(
                f"there is no key {key}: " + (f"did you mean {near[0]}?" if near else "see dist-esm --help")
            )
        check_choices(key, types[key], value)
    values = {
        key: [value] if key in ("include", "repr_layers") and isinstance(value, (str, int)) else value
        for key, value in keys.items()
    }
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(Config), values)
        typed = {key: merged[key] for key in keys}
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None
    plain: dict[str, Any] = {
        key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        for key, value in typed.items()
    }
    return replace(config, **plain)


def check_choices(key: str, hint: Any, value: Any) -> None:
    """Refuse a name that is no choice of a key."""
    choices = next(iter(get_args(hint)), None) if get_origin(hint) is list else hint
    if isinstance(choices, type) and issubclass(choices, Enum):
        for name in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
            if isinstance(name, str) and name not in choices.__members__:
                raise ValueError(no_choice(choices, key, name))
