import pytest
import torch
import torch.nn.functional as F

from bdh.ops.eager import IGNORE_INDEX, chunked_cross_entropy, cross_entropy


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(5, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(11, (37,), generator=generator)
    targets[[0, 3, 36]] = IGNORE_INDEX
    return hidden, head, targets


@pytest.mark.parametrize("num_items", [None, 20, torch.tensor(20)])
@pytest.mark.parametrize("tokens_per_chunk", [1, 8, 36, 37, 1000])
def test_chunks_give_the_loss_and_gradients_of_the_whole(problem, tokens_per_chunk, num_items):
    hidden, head, targets = problem
    whole = F.cross_entropy(hidden @ head, targets, reduction="sum") / (34 if num_items is None else 20)
    chunked = chunked_cross_entropy(
        hidden, lambda h: h @ head, targets, tokens_per_chunk=tokens_per_chunk, num_items=num_items
    )
    # Float64 sums of 34 terms in another order.
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(whole, [hidden, head])
    for got, truth in zip(torch.autograd.grad(chunked, [hidden, head]), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_items", [None, 20])
def test_in_one_piece_it_is_pytorchs(problem, num_items):
    hidden, head, targets = problem
    expected = F.cross_entropy(hidden @ head, targets)
    expected = expected if num_items is None else expected * 34 / 20
    torch.testing.assert_close(cross_entropy(hidden @ head, targets, num_items=num_items), expected)


def test_no_more_logits_than_asked_for_exist_at_once(problem):
    hidden, head, targets = problem
    sizes = []

    def counted(h):
        sizes.append(h.shape[0])
        return h @ head

    chunked_cross_entropy(hidden, counted, targets, tokens_per_chunk=8).backward()
    # Each chunk's logits are computed twice, forward and again for the backward pass.
    assert sizes == [8, 8, 8, 8, 5, 5, 8, 8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits = torch.randn(4096, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(4096) % 300
    expected = F.cross_entropy(logits.double(), targets)
    # Summed in half precision, 4096 losses of about 6 would have lost the third digit.
    torch.testing.assert_close(cross_entropy(logits, targets).double(), expected, rtol=1e-6, atol=0)
    chunked = chunked_cross_entropy(logits, lambda h: h, targets, tokens_per_chunk=1000)
    torch.testing.assert_close(chunked.double(), expected, rtol=1e-6, atol=0)
