"""The element-wise parts under torch.compile, as they run on a GPU, give what they give as they stand."""

import shutil

import pytest
import torch

from bdh.ops.blocks import block
from tests.ops.blocks.reference import Case, differences


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_parts_are_those_that_are_not(monkeypatch):
    case = Case(T=20, D=8, H=2, N=16, B=3, rows=2, columns=9, dropout=0.1, state=True)
    expected = case.found(case.by_blocks())
    compiled = []

    def compile_parts(self, function, *arguments):
        compiled.append(function)
        return block._compiled(function)(*arguments)

    monkeypatch.setattr(block.Neurons, "_run", compile_parts)
    found = case.found(case.by_blocks())
    assert len(set(compiled)) == 4  # rotated, gated, and both backwards
    assert max(differences(found, expected)) < 1e-12  # fused, but in float64
    assert not torch.equal(found[0], torch.zeros_like(found[0]))
