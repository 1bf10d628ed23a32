"""A checksum sees every bit, and where it is; the one that accelerators compute too, whose arithmetic runs anywhere."""

import pytest
import torch

from bdh.model import fingerprint as module
from bdh.model.fingerprint import checksum


def by_host(tensor):
    return checksum([tensor])


def by_accelerator(tensor):
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    return tuple(module._sums(content).tolist())


on_both = pytest.mark.parametrize("of", [by_host, by_accelerator])


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """So that a tensor has several of them, and the last is not full."""
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", 16)


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_every_bit_counts(of, dtype):
    tensor = torch.arange(45).to(dtype)
    seen = {of(tensor)}
    bits = tensor.view(torch.uint8)
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            seen.add(of(tensor))
            bits[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(bits)
    assert of(tensor.clone()) == of(tensor)


@on_both
def test_changes_that_cancel_out_in_a_plain_sum_are_seen(of):
    tensor = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    changed = [tensor, -tensor, tensor.flip(0), tensor.flip(1), tensor.roll(1), torch.cat([tensor[4:], tensor[:4]])]
    two = tensor.clone()
    two[0, 0], two[0, 1] = -two[0, 0], -two[0, 1]
    assert len({of(each) for each in [*changed, two]}) == len(changed) + 1


@on_both
def test_the_order_in_memory_does_not_count(of):
    tensor = torch.randn(8, 12)
    assert of(tensor) == of(tensor.t().contiguous().t())


def test_several_tensors_count_in_their_order():
    a, b = torch.ones(3), torch.zeros(3)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([a, b]) == checksum([torch.cat([a, b])])  # shapes are for the caller to compare
    assert checksum([]) == checksum([torch.ones(0)])


def test_what_has_no_content_is_refused():
    with pytest.raises(ValueError, match="no content"):
        checksum([torch.ones(3, device="meta")])


def test_a_parameter_made_in_inference_mode_can_be_read():
    with torch.inference_mode():
        weight = torch.ones(3)
    assert checksum([weight]) == checksum([torch.nn.Parameter(torch.ones(3))])
