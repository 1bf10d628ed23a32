"""The element-wise parts under torch.compile, as they run on a GPU, give what they give as they stand."""

import shutil

import pytest
import torch

from bdh.ops.blocks import block
from tests.ops.blocks.reference import Case, differences


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("most_sizes", [8, 0], ids=["each size for itself", "one for all"])
def test_compiled_parts_are_those_that_are_not(monkeypatch, most_sizes):
    case = Case(T=20, D=8, H=2, N=16, B=3, rows=2, columns=9, dropout=0.1, state=True)
    expected = case.found(case.by_blocks())
    parts, compiled = [], block.compiled

    def noted(function, size):
        parts.append(function)
        return compiled(function, size)

    monkeypatch.setattr(block, "sizes_compiled", set())
    monkeypatch.setattr(block, "MOST_SIZES_COMPILED", most_sizes)
    monkeypatch.setattr(block, "compiles_parts", lambda device: True)
    monkeypatch.setattr(block, "compiled", noted)
    found = case.found(case.by_blocks())
    assert len(set(parts)) == 4  # rotated, gated, and both backwards
    assert max(differences(found, expected)) < 1e-12  # fused, but in float64
    assert not torch.equal(found[0], torch.zeros_like(found[0]))


def test_more_sizes_than_are_compiled_for_themselves_share_one(monkeypatch):
    monkeypatch.setattr(block, "sizes_compiled", set())
    sizes = [torch.Size((16, 2, columns)) for columns in range(1, 12)]
    found = [block.compiled(torch.relu, size) for size in sizes]
    assert found[:8] == [found[0]] * 8
    assert found[8:] == [found[8]] * 3
    assert found[0] is not found[8]
    assert block.compiled(torch.relu, sizes[0]) is found[0]
