"""Training for a format: the layer is computed with the weights that the format stores, and gradients pass through."""

import copy

import pytest
import torch
from torch import nn

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.fake_quantized import FakeQuantizedLinear
from bdh.model.quantized import QuantizedLinear
from bdh.model.weights import kernel_obstacle
from bdh.ops.blocks.plan import LayerOptions
from bdh.ops.formats import rounded
from bdh.quantize import quantize
from bdh.train.rounding import fake_rounding, rounded_in_place, rounded_once

# 48 is no multiple of a group of 32.
CONFIG = BDHConfig(vocab_size=64, n_embd=48, n_head=2, n_layer=3, mlp_internal_dim_multiplier=8, dropout=0.0)
TOKENS = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BDHForCausalLM(CONFIG)


def faked(model, weights: str):
    model = copy.deepcopy(model)
    fake_rounding(model, weights)
    return model


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("by_input", "shape"), [(False, (70, 48)), (True, (48, 70)), (False, (9000, 33))])
def test_it_computes_what_the_stored_weight_does_to_the_bit(format, by_input, shape):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    fake = FakeQuantizedLinear(linear.weight, format, by_input=by_input)
    rows = linear.weight.t() if by_input else linear.weight
    real = QuantizedLinear.of(rounded(rows, format), format, by_input=by_input)
    v = torch.randn(5, shape[1])
    assert torch.equal(fake(v), real(v))
    assert torch.equal(fake.rounded(), real.weight)
    assert not torch.equal(fake(v), linear(v))


@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("path", ["plain", "torch", "kernels"])
def test_every_backend_has_the_loss_of_the_rounded_weights_and_their_gradients(model, weights, path):
    fake = faked(model, weights)
    assert [name for name, _ in fake.named_parameters()] == [name for name, _ in model.named_parameters()]
    plain = copy.deepcopy(model)
    with torch.no_grad():  # the gradients of a model that has the rounded weights as its own
        for name, module in fake.named_modules():
            if isinstance(module, FakeQuantizedLinear):
                plain.get_submodule(name).weight.copy_(module.rounded())
    fake.layer_options = plain.layer_options = LayerOptions(path=path)
    loss, gradients = loss_and_gradients(fake.train())
    expected, expected_gradients = loss_and_gradients(plain.train())
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())
    real = quantize(model, weights).eval()
    real.layer_options = fake.layer_options
    assert torch.equal(real(TOKENS).logits, fake.eval()(TOKENS).logits)


def test_weights_are_rounded_once_while_they_are_said_not_to_change(model, monkeypatch):
    fake, calls = faked(model, "int4"), []
    compute = FakeQuantizedLinear.rounded
    monkeypatch.setattr(FakeQuantizedLinear, "rounded", lambda module: calls.append(module) or compute(module))
    expected = fake(TOKENS).logits
    calls.clear()
    with rounded_once(fake):
        assert torch.equal(fake(TOKENS).logits, expected)
        assert torch.equal(fake(TOKENS).logits, expected)
    assert len(calls) == len({*calls}) == 4  # E, the two heads of Ev, and Dec
    with torch.no_grad():
        fake.decoder.weight.neg_()
    assert not torch.equal(fake(TOKENS).logits, expected)
    with pytest.raises(KeyError), rounded_once(fake):
        raise KeyError
    assert fake.decoder.kept is None


def test_a_model_may_compute_without_rounding_for_a_while(model):
    fake = faked(model, "int4")
    with rounded_once(fake, rounds=False):
        assert torch.equal(fake(TOKENS).logits, model(TOKENS).logits)
    assert not torch.equal(fake(TOKENS).logits, model(TOKENS).logits)


def test_the_rounded_weights_take_the_place_of_the_others_for_a_while(model):
    fake, modules = faked(model, "mixed"), {}
    modules |= fake.named_modules()
    logits = quantize(model, "mixed")(TOKENS).logits  # of a model in training, which computes as the other one does
    assert "rounded while it is computed" in kernel_obstacle(fake)
    with rounded_in_place(fake):
        assert type(fake.encoder_v[1]) is nn.Linear
        assert torch.equal(fake(TOKENS).logits, logits)
        assert kernel_obstacle(fake) is None
    assert dict(fake.named_modules()) == modules
    with rounded_in_place(model):
        assert kernel_obstacle(model) is None


def test_generated_tokens_are_those_of_the_rounded_weights(model):
    fake = faked(model, "int4").eval()
    expected = quantize(model, "int4").eval().generate(TOKENS[:, :5], max_new_tokens=20, do_sample=False)
    with rounded_in_place(fake):
        assert torch.equal(fake.generate(TOKENS[:, :5], max_new_tokens=20, do_sample=False), expected)
    assert torch.equal(fake.generate(TOKENS[:, :5], max_new_tokens=20, do_sample=False), expected)


def test_a_model_that_was_trained_so_is_quantized_to_what_it_computed(model):
    fake = faked(model, "mixed")
    optimizer = torch.optim.SGD(fake.parameters(), lr=0.1)
    for _ in range(2):  # without the promise that weights do not change, they are rounded in each forward pass
        optimizer.zero_grad()
        fake(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    logits = fake(TOKENS).logits
    assert not torch.equal(logits, faked(model, "mixed")(TOKENS).logits)
    assert torch.equal(quantize(fake, "mixed")(TOKENS).logits, logits)
