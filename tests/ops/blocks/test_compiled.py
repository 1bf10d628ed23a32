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
    parts = []

    def compile_parts(self, function, *arguments):
        parts.append(function)
        return block.compiled(function, arguments[0].shape)(*arguments)

    monkeypatch.setattr(block, "_sizes", set())
    monkeypatch.setattr(block, "_MOST_SIZES", most_sizes)
    monkeypatch.setattr(block.Neurons, "_run", compile_parts)
    found = case.found(case.by_blocks())
    assert len(set(parts)) == 4  # rotated, gated, and both backwards
    assert max(differences(found, expected)) < 1e-12  # fused, but in float64
    assert not torch.equal(found[0], torch.zeros_like(found[0]))


def test_more_sizes_than_are_compiled_for_themselves_share_one(monkeypatch):
    monkeypatch.setattr(block, "_sizes", set())
    sizes = [torch.Size((16, 2, columns)) for columns in range(1, 12)]
    found = [block.compiled(block._gated, size) for size in sizes]
    assert found[:8] == [block._compiled(block._gated, False)] * 8
    assert found[8:] == [block._compiled(block._gated, True)] * 3
    assert block.compiled(block._gated, sizes[0]) is found[0]
