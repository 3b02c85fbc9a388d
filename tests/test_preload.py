"""The stand-in for torch's compiler, in a process of its own each time: what is imported stays imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import sys
import torch
from dist_esm.preload import without_compiler

def twice(x):
    return 2 * x

def is_imported():
    return "torch._dynamo.eval_frame" in sys.modules

assert not is_imported()
real = torch.compile
"""

MARKS = """
with without_compiler():
    assert torch.compiler.disable(twice) is twice
    assert torch.compiler.disable(recursive=False)(twice) is twice
    assert torch.compile(twice, dynamic=False) is twice
    assert torch._dynamo.assume_constant_result(twice) is twice
    torch._dynamo.config.cache_size_limit = 64
assert not is_imported()
"""

ANYTHING_ELSE = """
with without_compiler():
    import torch._dynamo
    optimize = torch._dynamo.optimize
assert is_imported()
assert sys.modules["torch._dynamo"].optimize is optimize
"""

FAILS = """
try:
    with without_compiler():
        raise KeyError
except KeyError:
    pass
assert not is_imported()
"""

END = """
assert torch.compile is real
compiled = torch.compile(twice, backend="eager")
assert compiled is not twice and compiled(torch.ones(1)) == 2
assert is_imported()
"""


@pytest.mark.parametrize("block", [MARKS, ANYTHING_ELSE, FAILS], ids=["marks", "anything else", "fails"])
def test_torchs_compiler_is_imported_when_it_is_wanted_and_not_for_marks(block):
    result = subprocess.run([sys.executable, "-c", BEGIN + block + END], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
