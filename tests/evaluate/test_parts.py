"""Validation over several sources, and of rows in which only a part of the tokens counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from bdh import BDHConfig, BDHForCausalLM
from bdh.data.batches import Batch
from bdh.data.corpus import ValidationPart
from bdh.evaluate.loss import evaluate_parts


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = BDHConfig(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, mlp_internal_dim_multiplier=4, initializer_range=0.5
    )
    return BDHForCausalLM(config)


@pytest.fixture
def rows():
    return torch.randint(20, (5, 9), generator=torch.Generator().manual_seed(4))


def measured(model, batch, *, bytes_per_token=1.0, **how):
    """Of the sequences of one batch."""
    metrics, by_name = evaluate_parts(model, [ValidationPart("", batch, bytes_per_token)], **how)
    assert by_name == {}
    return metrics


def test_only_what_counts_is_measured(model, rows):
    counts = torch.rand(5, 8, generator=torch.Generator().manual_seed(5)) < 0.3
    found = measured(model, Batch(rows, counts), bytes_per_token=2.0, max_batch_size=2)
    with torch.no_grad():
        logits = model.eval()(rows[:, :-1], use_cache=False).logits[counts]
    targets = rows[:, 1:][counts]
    assert found.num_tokens == counts.sum()
    assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 2)
    assert found.accuracy == pytest.approx((logits.argmax(-1) == targets).double().mean().item())


def test_several_parts_are_weighed_by_their_tokens(model, rows):
    a, b = ValidationPart("a", Batch(rows[:3]), 1.0), ValidationPart("b", Batch(rows[3:]), 1.0)
    whole, by_name = evaluate_parts(model, [a, b])
    together = measured(model, Batch(rows))
    assert whole.loss == pytest.approx(together.loss)
    assert whole.accuracy == pytest.approx(together.accuracy)
    assert whole.num_tokens == together.num_tokens
    assert whole.loss_by_position == pytest.approx(together.loss_by_position)
    assert by_name["a"].loss == pytest.approx(measured(model, Batch(rows[:3])).loss)
    assert by_name["b"].loss != pytest.approx(by_name["a"].loss)


def test_bits_per_byte_of_several_parts_divide_by_all_their_bytes(model, rows):
    parts = [ValidationPart("a", Batch(rows[:3]), 1.0), ValidationPart("b", Batch(rows[3:]), 4.0)]
    whole, _ = evaluate_parts(model, parts)
    assert whole.bits_per_byte == pytest.approx(whole.loss * 40 / math.log(2) / (24 * 1.0 + 16 * 4.0))


def test_the_loss_by_position_of_several_parts_is_that_of_the_tokens_that_count_there(model, rows):
    """There was none where no token of one part counts at a position, and else it was the mean over sequences."""
    counts = torch.rand(5, 8, generator=torch.Generator().manual_seed(6)) < 0.7
    a, b = (
        ValidationPart(name, Batch(rows[each], counts[each]), 1.0)
        for name, each in (("a", slice(3)), ("b", slice(3, 5)))
    )
    whole, _ = evaluate_parts(model, [a, b])
    assert whole.loss_by_position == pytest.approx(measured(model, Batch(rows, counts)).loss_by_position)
