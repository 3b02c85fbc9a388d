"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["dist_esm.commandline.cli", "dist_esm.embedder", "dist_esm.version"])
def test_the_examples_of_a_module(name):
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
