"""A user whom the system does not know, as containers start processes."""

import pwd
from typing import NoReturn

import pytest


def be_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no home, and no place for a cache."""

    def refuse(user: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)
