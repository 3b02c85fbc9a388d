"""The keys of the command line and their types, and the models that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

from dist_esm.config import Config, conf_dir


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
