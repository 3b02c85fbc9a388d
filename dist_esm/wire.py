"""The values that ranks give each other, as JSON: data that is checked, never code that is run.

A dataclass becomes an object that carries its name. It is made again only if the receiver names that class,
so whoever reaches the store or the process group can pass on data at most.
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields, is_dataclass
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
    declared = {
        name: {each.name: str(each.type) for each in fields(of_type)} for name, of_type in known.items()
    }
    tuples = {
        name: {field for field, of_type in own.items() if of_type.startswith("tuple[")}
        for name, own in declared.items()
    }

    def rebuild(values: dict[str, Any]) -> Any:
        if BYTES in values:
            return base64.b85decode(values[BYTES])
        name = values.pop(TYPE, None)
        if name is None:
            return values
        if name not in known:
            raise WireError(f"{name!r} is not expected")
        if values.keys() != declared[name].keys():
            raise WireError(f"{name} has the fields {sorted(values)}")
        for field in tuples[name]:
            values[field] = tuple(values[field])
        return known[name](**values)

    try:
        return json.loads(text, object_hook=rebuild)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WireError(f"no JSON: {error}") from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in fields(value)}
        return {TYPE: type(value).__name__, **values}
    if isinstance(value, bytes):
        return {BYTES: base64.b85encode(value).decode()}
    raise TypeError(f"{type(value).__name__} has no place in a message between ranks")
