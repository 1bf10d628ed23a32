"""Models whose weights are rounded to whole numbers with scales, on every path that computes them."""

import copy

import pytest
import torch
from torch import nn

from bdh.generate.advance import Advancer, StepInput
from bdh.model.quantized import QuantizedLinear
from bdh.model.weights import quantized_format, recurrence_of
from bdh.ops.formats import layer_formats, rounded
from bdh.quantize import quantize

FORMATS = ["int8", "int4", "mixed"]
SIZES = [{}, {"n_embd": 64, "n_head": 4, "mlp_internal_dim_multiplier": 8}, {"n_embd": 50, "n_head": 2}]


def quantized(model, weights):
    """A copy of a model with quantized modules."""
    model, formats = copy.deepcopy(model), layer_formats(weights)

    def module(linear, format, by_input=False):
        weight = linear.weight.t() if by_input else linear.weight
        return QuantizedLinear.of(rounded(weight, format), format, by_input=by_input)

    model.encoder = module(model.encoder, formats.encoder)
    for head, linear in enumerate(model.encoder_v):
        model.encoder_v[head] = module(linear, formats.encoder_v)
    model.decoder = module(model.decoder, formats.decoder, by_input=True)
    return model


def dequantized(model, like):
    """A copy of a model with the numbers that the codes of another one stand for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for plain, other in [
            (model.encoder, like.encoder),
            *zip(model.encoder_v, like.encoder_v, strict=True),
            (model.decoder, like.decoder),
        ]:
            plain.weight.copy_(other.weight)
    return model


def logits_of(advancer, tokens):
    return advancer.advance([StepInput(advancer.new_state(), tokens, "all")])[0]


@pytest.mark.parametrize("sizes", SIZES, ids=["D 24", "D 64", "D 50"])
@pytest.mark.parametrize("weights", FORMATS)
def test_kernels_have_the_bits_of_the_numbers_that_the_codes_stand_for(make_model, weights, sizes):
    """Of a quantized model, and of copies that are rounded when the kernels are made."""
    plain = make_model(**sizes)
    model, tokens = quantized(plain, weights), list(range(40))
    expected = logits_of(Advancer(dequantized(plain, model), path="kernels"), tokens)
    assert torch.equal(logits_of(Advancer(model, path="kernels"), tokens), expected)
    assert torch.equal(logits_of(Advancer(plain, path="kernels", weights=weights), tokens), expected)
    assert not torch.equal(expected, logits_of(Advancer(plain, path="kernels"), tokens))


@pytest.mark.parametrize("layer_path", ["plain", "torch", "kernels"])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_path_of_the_layer_computes_the_numbers_that_the_codes_stand_for(make_model, tokens, weights, layer_path):
    plain = make_model()
    model = quantized(plain, weights)
    exact = dequantized(plain, model)
    for each in (model, exact):
        each.layer_options = type(each.layer_options)(path=layer_path)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, exact(tokens).logits)
        assert torch.equal(model(tokens, labels=tokens).loss, exact(tokens, labels=tokens).loss)


def test_weights_of_a_quantized_model_are_read_where_they_are(make_model):
    model = quantized(make_model(), "int4")
    stored = recurrence_of(model).weights
    assert stored.encoder.tensor.data_ptr() == model.encoder.packed.data_ptr()
    assert stored.decoder.tensor.data_ptr() == model.decoder.packed.data_ptr()


def test_an_embedding_and_a_head_in_int8_are_read(make_model):
    model = quantize(make_model(), "int4", embeddings=True)
    assert Advancer(model).backend == "cpu"
    plain, tokens = copy.deepcopy(model), list(range(40))
    plain.embed = nn.Embedding.from_pretrained(model.embed.weight)
    plain.lm_head = nn.Linear(24, 61, bias=False)
    plain.lm_head.weight = nn.Parameter(model.lm_head.weight)
    assert torch.equal(*(logits_of(Advancer(each, path="kernels"), tokens) for each in (model, plain)))


def test_a_change_of_the_codes_is_read(make_model):
    model, other = (quantized(make_model(seed), "int8") for seed in (0, 1))
    advancer = Advancer(model, path="kernels")
    before = logits_of(advancer, [1, 2, 3])
    model.load_state_dict(other.state_dict())
    after = logits_of(advancer, [1, 2, 3])
    assert not torch.equal(before, after)
    assert torch.equal(after, logits_of(Advancer(other, path="kernels"), [1, 2, 3]))


@pytest.mark.parametrize("weights", FORMATS)
def test_the_format_is_said_and_another_one_is_refused(make_model, weights):
    model = quantized(make_model(), weights)
    assert quantized_format(model) == weights
    assert Advancer(model).weight_format == Advancer(model, weights=weights).weight_format == weights
    assert f"weights {weights}" in Advancer(model).description
    assert f"weights {weights}" in Advancer(model, path="torch").description
    with pytest.raises(ValueError, match=f"weights is 'bfloat16': must be {weights}, in which the model's"):
        Advancer(model, weights="bfloat16")
    assert quantized_format(make_model()) is None


def test_matrices_in_formats_of_their_own_are_named(make_model):
    model = make_model()
    model.encoder = QuantizedLinear.of(rounded(model.encoder.weight, "int8"), "int8")
    assert quantized_format(model) == "int8, plain, plain, plain, plain"
    tokens = [1, 2, 3]
    by_torch = logits_of(Advancer(model, path="torch"), tokens)
    torch.testing.assert_close(logits_of(Advancer(model, path="kernels"), tokens), by_torch)


def test_a_state_that_other_weights_have_read_is_of_another_kind(make_model):
    patterns = [Advancer(make_model(), path="kernels", weights=weights).pattern for weights in ("float32", *FORMATS)]
    assert len({str(pattern) for pattern in patterns}) == len(patterns)


def test_weights_that_are_not_finite_are_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.encoder_v[1].weight[3, 2] = float("inf")
    advancer = Advancer(model, path="kernels", weights="int8")
    with pytest.raises(ValueError, match=r"weight 2 of row 3 of encoder_v\.1 is inf: only finite"):
        logits_of(advancer, [1])
