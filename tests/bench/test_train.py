"""The comparison that goes before the timing finds a wrong gradient."""

import pickle
import time
from dataclasses import replace

import pytest
import torch

from bdh.bench import train
from bdh.bench.common import Report
from bdh.bench.steps import (
    REST,
    BlocksStep,
    Memory,
    NaiveStep,
    TrainCase,
    dropout_masks,
    gpt2_of_size,
    median_step,
    timed_parts,
)
from bdh.bench.train import CaseBench, bench_one_step, bench_train, relative
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.ops.blocks import train as blocks
from bdh.ops.blocks.plan import LayerOptionError, LayerOptions

CONFIG = {"vocab_size": 31, "n_embd": 16, "n_head": 2, "n_layer": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.2}


@pytest.fixture
def case():
    return TrainCase(BDHConfig(**CONFIG), batch_size=3, block_size=20)


def compared(case):
    report = Report("train")
    bench = CaseBench(report, case, lambda stage: None)
    bench.compare()
    return report, bench.figures["agreement"]


def test_equal_gradients_agree(case):
    report, agreement = compared(case)
    assert not report.failed
    assert max(agreement["relative_difference"].values()) < 1e-4


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_gradient_is_found(case, monkeypatch, factor):
    right = blocks.read_block_backward

    def wrong(*arguments):
        grad_q, grad_state = right(*arguments)
        return grad_q * factor, grad_state

    monkeypatch.setattr(blocks, "read_block_backward", wrong)
    report, agreement = compared(case)
    assert report.failed
    assert not agreement["agrees"]
    assert "nothing was timed" in report.text()


def test_one_token_leaves_most_weights_without_gradient_and_agrees(case):
    """Of two norms that are 0, the difference is no share of anything: it was not a number, and so did not agree."""
    report, agreement = compared(replace(case, block_size=1))
    assert not report.failed
    for name in ("encoder", "encoder_v", "decoder"):
        assert agreement["relative_difference"][name] == 0
    assert agreement["relative_difference"]["embed"] > 0


def test_a_gradient_where_there_should_be_none_does_not_agree():
    assert relative(0.0, 0.0) == 0
    assert relative(1e-9, 0.0) == float("inf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plain_path_agrees_with_its_own_dropout(case, dtype):
    """Its masks are not those of the blocks: with theirs, the gradients were said not to agree."""
    report, _ = compared(replace(case, options=LayerOptions(path="plain"), dtype=dtype))
    assert not report.failed


def test_decay_chunks_and_another_base_agree(case):
    config = BDHConfig(**CONFIG, decay=[5, None], rope_theta=500, attention_form="chunked", chunk_size=7)
    report, agreement = compared(replace(case, config=config))
    assert not report.failed
    assert max(agreement["relative_difference"].values()) < 1e-4


def test_options_of_every_case_are_checked_before_anything_is_computed(case, monkeypatch):
    monkeypatch.setattr(CaseBench, "compare", lambda *arguments: pytest.fail("something was computed"))
    monkeypatch.setattr(train, "measure_memory", lambda *arguments, **others: pytest.fail("something was measured"))
    wrong = replace(case, dtype="bfloat16", options=LayerOptions(path="kernels"))
    with pytest.raises(LayerOptionError, match="bfloat16"):
        bench_train([case, wrong])
    with pytest.raises(LayerOptionError, match="bfloat16"):
        bench_one_step(wrong)


def test_a_baseline_that_runs_out_of_memory_is_left_out_and_said(case, monkeypatch):
    """On a GPU this is found out by trying; the error comes from another process."""

    def measured(case, form):
        if form == "naive":
            raise pickle.loads(pickle.dumps(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB")))
        return Memory(before=1, peak=2, seconds=1.0)

    monkeypatch.setattr(train, "measure_memory", measured)
    report = bench_train([case], baselines=["naive"], rounds=1)
    (figures,) = report.figures["cases"]
    assert not report.failed
    assert [form["name"] for form in figures["forms"]] == ["bdh"]
    assert figures["left_out"] == {"naive": "runs out of memory: CUDA out of memory. Tried to allocate 24 GiB"}
    assert "ops/naive.py is left out: it runs out of memory" in report.text()


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

    config = gpt2_of_size(TrainCase(BDHConfig(), 1, 128), wanted)
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT2LMHeadModel(config).parameters())
    assert count == pytest.approx(wanted, rel=0.05)


def test_timing_the_parts_leaves_nothing_behind():
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(**CONFIG)).train()
    before = blocks.make_neurons, blocks.read_block
    with timed_parts(time.perf_counter) as seconds:
        model(torch.zeros(2, 9, dtype=torch.long), labels=torch.zeros(2, 9, dtype=torch.long)).loss.backward()
    assert (blocks.make_neurons, blocks.read_block) == before
    assert len(seconds) == 7  # fire, read, gated_mlp, all three backwards, and the rotation of the x that was kept
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(("rounds", "median"), [(3, (0.4, 0.3)), (2, (0.2, 0.1))])
def test_the_parts_add_up_to_the_step_of_median_length(monkeypatch, rounds, median):
    """The rest was what other steps had left of their time, and so was often cut at 0."""
    now = [100.0]

    def take(seconds):
        now[0] += seconds

    monkeypatch.setattr(blocks, "learn_block", take)
    times = iter([(0.2, 0.1), (2.0, 0.0), (0.4, 0.3)])

    def step():
        in_part, outside = next(times)
        blocks.learn_block(in_part)
        take(outside)

    seconds, parts = median_step(step, lambda: now[0], rounds)
    assert seconds == pytest.approx(sum(median))
    assert parts == pytest.approx(dict(zip(("attention: the state after a block", REST), median, strict=True)))
