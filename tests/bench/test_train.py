"""The comparison that goes before the timing finds a wrong gradient."""

import pytest
import torch

from bdh.bench.report import Report
from bdh.bench.split import timed_parts
from bdh.bench.train import _compare
from bdh.bench.training import BlocksStep, NaiveStep, TrainCase, dropout_masks, gpt2_config
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.ops.layer import function

CONFIG = {"vocab_size": 31, "n_embd": 16, "n_head": 2, "n_layer": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.2}


@pytest.fixture
def case():
    return TrainCase(BDHConfig(**CONFIG), batch_size=3, block_size=20)


def compared(case):
    report, figures = Report("train"), {}
    _compare(report, figures, case, lambda stage: None)
    return report, figures["agreement"]


def test_equal_gradients_agree(case):
    report, agreement = compared(case)
    assert not report.failed
    assert max(agreement["relative_difference"].values()) < 1e-4


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_gradient_is_found(case, monkeypatch, factor):
    right = function.read_block_backward

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(q=found.q * factor)

    monkeypatch.setattr(function, "read_block_backward", wrong)
    report, agreement = compared(case)
    assert report.failed
    assert not agreement["agrees"]
    assert "nothing was timed" in report.text()


def test_the_masks_are_those_that_the_model_draws(case):
    """With others, the plain equations give another loss."""
    torch.manual_seed(case.seed)
    blocks = BlocksStep(case)
    torch.manual_seed(7)
    loss = blocks()
    plain = NaiveStep(case)
    losses = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        plain.masks = dropout_masks(plain.model, case.batch_size, case.block_size)
        losses.append(plain())
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert losses[1] != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("wanted", [500_000, 1_640_000, 25_000_000])
def test_gpt2_has_about_as_many_parameters(wanted):
    from transformers import GPT2LMHeadModel

    config = gpt2_config(TrainCase(BDHConfig(), 1, 128), wanted)
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT2LMHeadModel(config).parameters())
    assert count == pytest.approx(wanted, rel=0.05)


def test_timing_the_parts_leaves_nothing_behind():
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(**CONFIG)).train()
    before = function._neurons, function.read_block
    with timed_parts("cpu") as seconds:
        model(torch.zeros(2, 9, dtype=torch.long), labels=torch.zeros(2, 9, dtype=torch.long)).loss.backward()
    assert (function._neurons, function.read_block) == before
    assert len(seconds) == 6  # fire, read, respond, and all three backwards
    assert all(value > 0 for value in seconds.values())
