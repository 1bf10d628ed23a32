"""Rounding in the metric of what the layer reads."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bdh.model.quantization import neuron_rows
from bdh.ops.formats import rounded
from bdh.quantize import gptq
from bdh.quantize.gptq import gptq_codes

FORMATS = ("int8", "int4")


def correlated(num_inputs, D, seed=0):
    """Inputs (num_inputs, D) most of whose variance lies in a quarter of the directions."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(num_inputs, D // 4, generator=generator) @ torch.randn(D // 4, D, generator=generator)
    return few + 0.3 * torch.randn(num_inputs, D, generator=generator)


def output_error(inputs, weight, codes):
    return (inputs @ (codes.dequantized() - weight).t()).square().sum() / (inputs @ weight.t()).square().sum()


@pytest.mark.parametrize("D", [40, 96])
@pytest.mark.parametrize("format", FORMATS)
def test_it_beats_rounding_on_correlated_inputs(format, D):
    weight = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    inputs, other = correlated(2000, D).split(1000)
    found = gptq.round_in_metric(weight, (inputs.t() @ inputs)[None], format)
    assert output_error(inputs, weight, found) < 0.5 * output_error(inputs, weight, rounded(weight, format))
    assert output_error(other, weight, found) < 0.5 * output_error(other, weight, rounded(weight, format))


@pytest.mark.parametrize("format", FORMATS)
def test_a_metric_without_correlations_is_plain_rounding(format):
    weight = torch.randn(30, 80)
    plain = rounded(weight, format)
    found = gptq.nearest_plane(weight, torch.eye(80)[None] * 3, plain.scales, format)
    assert torch.equal(found.codes, plain.codes)
    of_block = gptq._round_block(weight, 3 * torch.eye(30), torch.zeros(30, 80), torch.tensor(0.0), format)
    assert torch.equal(of_block.codes, plain.codes)
    assert torch.equal(of_block.scales, plain.scales)


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_are_always_0_are_rounded_plainly(format):
    weight, inputs = torch.randn(20, 64), correlated(500, 64)
    inputs[:, [3, 40]] = 0
    hessians = (inputs.t() @ inputs / 500)[None] + 0.01 * torch.eye(64)
    plain = rounded(weight, format)
    found = gptq.nearest_plane(weight, hessians, plain.scales, format)
    assert torch.equal(found.codes[:, [3, 40]], plain.codes[:, [3, 40]])
    without = gptq.round_in_metric(weight, torch.zeros(1, 64, 64), format)
    assert (without.dequantized() - weight).norm() <= (plain.dequantized() - weight).norm()


def test_a_neuron_has_the_hessian_of_the_inputs_that_count(monkeypatch):
    inputs, shared = torch.randn(200, 8), torch.eye(8)
    counts = torch.rand(200, 5) < torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0])
    most = gptq.NEURON_SAMPLES * 8
    monkeypatch.setattr(gptq, "_INPUTS_AT_ONCE", 33)
    taken = gptq._first_inputs(200, torch.arange(5), lambda part, rows: counts[part, rows], most)
    found = gptq.neuron_hessians(inputs, taken, shared)
    for row, hessian in enumerate(found):
        first = inputs[counts[:, row]][:most]
        torch.testing.assert_close(hessian, first.t() @ first + gptq._SHARED * most * shared)


def every_format(model, format):
    return dict.fromkeys(["encoder", "encoder_v.0", "encoder_v.1", "decoder"], format)


def with_weights(model, codes):
    changed = copy.deepcopy(model)
    for name, each in codes.items():
        weight = changed.get_submodule(name).weight
        weight.data.copy_(neuron_rows(name, each.dequantized()))
    return changed


def text(num_sequences, length, seed):
    """Token ids of which few are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return (61 * torch.rand(num_sequences, length, generator=generator) ** 3).long()


@torch.no_grad()
def divergence(model, changed, tokens):
    before, after = (each(input_ids=tokens).logits.log_softmax(-1) for each in (model, changed))
    return (before.exp() * (before - after)).sum(-1).mean()


@pytest.mark.parametrize("format", FORMATS)
def test_predictions_of_other_text_change_less_than_by_rounding(model, format):
    formats = every_format(model, format)
    codes = gptq_codes(model, [text(8, 64, 1), text(8, 30, 2)], formats)
    plain = {name: rounded(neuron_rows(name, model.get_submodule(name).weight), format) for name in formats}
    other = text(8, 64, 3)
    after = divergence(model, with_weights(model, codes), other)
    assert after < 0.8 * divergence(model, with_weights(model, plain), other)


def test_it_is_deterministic_and_leaves_the_model_as_it_is(model, tokens):
    before = copy.deepcopy(model.state_dict())
    formats = every_format(model, "int4") | {"encoder": "int8"}
    torch.manual_seed(1)
    one = gptq_codes(model, [tokens], formats)
    torch.manual_seed(2)
    other = gptq_codes(model, [tokens], formats)
    assert one.keys() == formats.keys()
    for name, codes in one.items():
        assert torch.equal(codes.codes, other[name].codes)
        assert torch.equal(codes.scales, other[name].scales)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_modules_without_a_format_stay_as_they_are(model, tokens):
    assert gptq_codes(model, [tokens], {"decoder": "int8"}).keys() == {"decoder"}


def test_dead_neurons_and_a_model_that_does_nothing(model, tokens):
    formats = every_format(model, "int4")
    with torch.no_grad():
        model.encoder.weight[5] = 0
    codes = gptq_codes(model, [tokens], formats)
    plain = rounded(neuron_rows("decoder", model.decoder.weight), "int4")
    assert (codes["encoder"].codes[5] == 0).all()
    assert torch.equal(codes["decoder"].codes[5], plain.codes[5])
    assert all(each.dequantized().isfinite().all() for each in codes.values())
    with torch.no_grad():
        model.encoder.weight.zero_()
    codes = gptq_codes(model, [tokens], formats)
    assert torch.equal(codes["decoder"].codes, plain.codes)
    assert all(each.dequantized().isfinite().all() for each in codes.values())


@pytest.mark.parametrize("fields", [{"dtype": torch.bfloat16}, {"decay": [3.0, 20.0]}], ids=["bfloat16", "decay"])
def test_other_models(model, tokens, fields):
    if "dtype" in fields:
        model.to(fields["dtype"])
    else:
        model.config.decay = fields["decay"]
    codes = gptq_codes(model, [tokens], every_format(model, "int8"))
    for name, each in codes.items():
        weight = neuron_rows(name, model.get_submodule(name).weight.detach()).float()
        assert (each.dequantized() - weight).norm() < 0.02 * weight.norm()


def test_long_sequences_are_read_in_pieces(model, tokens, monkeypatch):
    layer = gptq._layer_of(model)
    whole = gptq._gather(model, [tokens], layer, 3 * tokens.numel(), lambda *done: None)
    monkeypatch.setattr(gptq, "_WIDE", 160 * 8)  # 8 tokens at once
    steps = list(gptq._layer_steps(model, [tokens], layer))
    assert [len(each.v) for each in steps] == 3 * [*3 * [8], *3 * [8], *3 * [5]]
    # The same inputs in another order: the sums of their squares agree.
    v, a = torch.cat([each.v for each in steps]), torch.cat([each.a for each in steps], 1)
    torch.testing.assert_close(whole.v.square().sum(-2), v.square().sum(-2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.a.square().sum(-2), a.square().sum(-2), rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The largest number of bytes of a tensor that is made within it."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(model, monkeypatch):
    monkeypatch.setattr(gptq, "MAX_SAMPLES", 300)
    monkeypatch.setattr(gptq, "_WIDE", 160 * 32)
    monkeypatch.setattr(gptq, "_HESSIANS", 40**2 * 8)
    found = []
    for length in (100, 400):
        with Largest() as largest:
            gptq_codes(model, [text(4, length, 0)], every_format(model, "int4"))
        found.append(largest.num_bytes)
    assert found[0] == found[1]


def test_text_that_is_too_short(model):
    with pytest.raises(ValueError, match="the calibration text has 39 tokens: at least 40 are needed"):
        gptq_codes(model, [text(3, 13, 0)], every_format(model, "int8"))
    with pytest.raises(ValueError, match="the calibration text has 0 tokens"):
        gptq_codes(model, [], every_format(model, "int8"))


def test_weights_and_activations_that_are_not_finite(model, tokens):
    with torch.no_grad():
        model.encoder_v[1].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight 3 of row 2 of encoder_v\.1 is nan"):
        gptq_codes(model, [tokens], every_format(model, "int8"))
    with torch.no_grad():
        model.encoder_v[1].weight[2, 3] = 0
        model.embed.weight[tokens[0, 0], 0] = float("inf")
    with pytest.raises(ValueError, match="activations on the calibration text are infinite or not a number"):
        gptq_codes(model, [tokens], every_format(model, "int8"))


@pytest.mark.parametrize("names", [None, ["encoder_v.1"]])
def test_progress_is_that_of_the_whole_work(model, tokens, names):
    told = []
    formats = every_format(model, "int4")
    formats = {name: formats[name] for name in names or formats}
    gptq_codes(model, [tokens], formats, lambda *each: told.append(each))
    assert {(stage, total) for stage, _, total in told} == {("gptq, percent", 100)}
    percents = [done for _, done, _ in told]
    assert percents == sorted(percents)
    assert percents[-2:] != [100, 100]
    assert percents[-1] == 100
