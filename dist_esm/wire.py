"""The values that ranks give each other, as JSON: data that is checked, never code that is run.

A dataclass becomes an object that carries its name. It is made again only if the receiver names that class,
so whoever reaches the store or the process group can pass on data at most.
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

TYPE = "__type__"
BYTES = "__bytes__"


class WireError(ValueError):
    """A message that is no message of ours."""


def encode(value: Any) -> bytes:
    """Encode plain values, lists, tuples, dicts with text keys, bytes and dataclasses of these.

    Raises
    ------
    TypeError
        If there is something else in it.
    """
    return json.dumps(value, default=_plain, separators=(",", ":")).encode()


def decode(text: bytes, *types: type[Any]) -> Any:
    """Decode what `encode` made; tuples come back as lists, but for fields that are declared as tuples.

    Parameters
    ----------
    text
        The message.
    types
        Dataclasses that may be in it.

    Raises
    ------
    WireError
        If it is no JSON, names another class, or has other fields than the class.
    """
    known = {of_type.__name__: of_type for of_type in types}

    def rebuild(values: dict[str, Any]) -> Any:
        if BYTES in values:
            return base64.b85decode(values[BYTES])
        name = values.pop(TYPE, None)
        if name is None:
            return values
        if name not in known:
            raise WireError(f"{name!r} is not expected")
        of_type = known[name]
        names, tuples = _fields_of(of_type)
        if values.keys() != set(names):
            raise WireError(f"{name} has the fields {sorted(values)}")
        return of_type(**{key: tuple(value) if key in tuples else value for key, value in values.items()})

    try:
        return json.loads(text, object_hook=rebuild)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WireError(f"no JSON: {error}") from None


@cache
def _fields_of(of_type: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of a dataclass's fields, in order, and those that are declared as tuples."""
    found = {field.name: str(field.type) for field in fields(of_type)}
    return tuple(found), frozenset(name for name, text in found.items() if text.startswith("tuple["))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names, _ = _fields_of(type(value))
        return {TYPE: type(value).__name__, **{name: getattr(value, name) for name in names}}
    if isinstance(value, bytes):
        return {BYTES: base64.b85encode(value).decode()}
    raise TypeError(f"{type(value).__name__} has no place in a message between ranks")
