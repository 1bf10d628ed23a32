"""The mask of a seed looks random, and is the same wherever it is computed."""

import pytest
import torch

from bdh.ops.blocks.block import is_kept, make_dropout


def mask_of(seed=5, rate=0.1, neurons=512, rows=8, tokens=256):
    dropout = make_dropout(rate, torch.tensor(seed), neurons, rows, tokens)
    return dropout, is_kept(dropout, dropout.neuron_keys, dropout.token_keys)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_share_that_is_dropped_is_the_rate(rate, seed):
    _, mask = mask_of(seed, rate)
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean().item() - rate) < 5 * deviation  # once in a million, were it random


@pytest.mark.parametrize(("shift", "axis"), [(1, 0), (2, 0), (1, 2), (7, 2), (1, 1)])
def test_neighbours_are_independent(shift, axis):
    _, mask = mask_of(rate=0.5)
    signs = mask.double() * 2 - 1
    correlation = (signs * signs.roll(shift, axis)).mean().item()
    assert abs(correlation) < 5 / mask.numel() ** 0.5


def test_whole_rows_vary_as_chance_lets_them():
    """A sum of two keys, badly mixed, would drop some neurons or tokens more than others."""
    _, mask = mask_of(rate=0.5)
    for axes in ((1, 2), (0, 1), (0, 2)):
        means = mask.double().mean(axes)
        expected = 0.5 / (mask.numel() / means.numel()) ** 0.5
        # The deviation of n means is itself known to within 1 / sqrt(2 n) of it.
        assert abs(means.std().item() / expected - 1) < 5 / (2 * means.numel()) ** 0.5


def test_a_block_has_its_part_of_the_mask():
    dropout, whole = mask_of()
    part = is_kept(dropout, dropout.neuron_keys[100:130], dropout.token_keys[2:5, 40:90])
    assert torch.equal(part, whole[100:130, 2:5, 40:90])


def test_seeds_give_other_masks():
    masks = [mask_of(seed, 0.5)[1] for seed in (5, 6, 5 + 2**32, 5 + 2**40)]
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert abs((mask == other).double().mean().item() - 0.5) < 0.005
    assert torch.equal(mask_of(5)[1], mask_of(5)[1])


def test_what_is_kept_is_scaled_up():
    dropout, mask = mask_of(rate=0.25)
    assert (mask.double() * dropout.scale).mean().item() == pytest.approx(1, abs=0.005)
