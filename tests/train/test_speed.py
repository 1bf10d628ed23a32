"""Times add up, operations are counted as they are, and the machine's peak is not beaten."""

import itertools
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bdh import BDHConfig, BDHForCausalLM
from bdh.ops.blocks.plan import LayerOptions
from bdh.train.config import TrainSettings
from bdh.train.loop import StepClock
from bdh.train.runtime import choose_runtime, matmul_peak, training_flops_per_token
from tests.clock import time_with

from .conftest import losses


def test_the_clock_leaves_out_pauses_and_takes_means_since_the_last_time():
    clock = StepClock()
    for number in range(4):
        with clock.waiting_for_data():
            time.sleep(0.005)
        time.sleep(0.01)
        with clock.paused():
            time.sleep(0.1)
        clock.count(100)
        if number % 2:  # not every step is waited for
            clock.read()
    means = clock.take_means()
    assert 0.015 <= means["step_seconds"] < 0.1
    assert 0.005 <= means["data_seconds"] < 0.015
    assert 1_000 < clock.tokens_per_second <= 100 / 0.015
    clock.count(100)
    clock.read()
    assert clock.take_means()["data_seconds"] == 0.0


@pytest.mark.parametrize("block_size", [24, 400])
def test_operations_are_those_that_pytorch_counts(block_size):
    """But for the attention: PyTorch counts all T x T scores where half are needed, and keeps no state."""
    config = BDHConfig(n_embd=32, n_layer=3, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=64, dropout=0.0)
    model = BDHForCausalLM(config).train()
    model.layer_options = LayerOptions(path="plain")  # what recomputes and skips counts otherwise
    ids = torch.randint(64, (2, block_size))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, attention_form="parallel").loss.backward()
    D, H, T, neurons = 32, 2, block_size, 256
    attention = 3 * config.n_layer * 2 * T * (neurons + H * D)  # all scores, and their products with v
    counted = counter.get_total_flops() / ids.numel() - attention
    ours = training_flops_per_token(config, T) - 3 * config.n_layer * min(T * (neurons + H * D), 4 * D * neurons)
    assert ours == pytest.approx(counted, rel=1e-3)


def test_the_peak_is_of_the_order_of_a_product_timed_here(monkeypatch):
    monkeypatch.setattr("bdh.train.runtime.MEASURING_SECONDS", 0.04)
    runtime = choose_runtime(TrainSettings(device="cpu"))
    peak = matmul_peak(runtime)
    factor = torch.ones(128, 128)
    started = time.perf_counter()
    for _ in range(20):
        factor @ factor
    assert peak > 2 * 128**3 * 20 / (time.perf_counter() - started) / 10


def test_the_peak_counts_a_multiplication_and_an_addition_as_two(monkeypatch):
    """By a clock that shows a second more each time: the first product, of 256 x 256, is long enough."""
    monkeypatch.setattr("bdh.train.runtime.time", time_with(perf_counter=itertools.count().__next__))
    peak = matmul_peak(choose_runtime(TrainSettings(device="cpu")))
    assert peak == 2 * 256**3


def test_every_logged_step_and_evaluation_has_what_the_docs_list(train, tmp_path):
    run = tmp_path / "run"
    assert train(run) == 0
    steps = {
        *("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "mfu"),
        *("grad_norm/encoder.weight", "grad_norm/encoder_v.0.weight", "grad_norm/encoder_v.1.weight"),
        *("grad_norm/decoder.weight", "grad_norm/embed.weight", "grad_norm/lm_head.weight", "peak_memory_bytes"),
    }
    for name in steps:
        assert len(losses(run, f"train/{name}")) == 12, name
    evaluations = {
        *("loss", "perplexity", "bits_per_byte", "accuracy", "dead_neurons"),
        *(f"loss_at/{start}" for start in (1, 2, 4, 8, 16, 32)),
        *(f"{what}/{kind}/{i}" for what in ("density", "norm") for kind in ("x", "y", "xy") for i in range(2)),
    }
    for name in evaluations:
        assert len(losses(run, f"val/{name}")) == 3, name
    assert len(losses(run, "weights/norm/encoder.weight")) == 3
    for total, *parts in zip(
        losses(run, "train/grad_norm"),
        *(losses(run, f"train/{name}") for name in steps if name.startswith("grad_norm/")),
        strict=True,
    ):
        assert total == pytest.approx(sum(part**2 for part in parts) ** 0.5, rel=1e-5)  # float32
    assert all(0 < density < 1 for density in losses(run, "val/density/x/0"))
    assert all(mfu > 0 for mfu in losses(run, "train/mfu"))
