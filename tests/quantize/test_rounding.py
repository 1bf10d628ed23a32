import copy

import pytest
import torch

from bdh.generate.advance import Advancer
from bdh.model.fingerprint import fingerprint
from bdh.model.network import Network
from bdh.model.quantization import quantized_formats
from bdh.model.quantized import QuantizedLinear
from bdh.model.weights import weights_mark
from bdh.quantize import quantize


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize(
    ("weights", "encoder", "rest"), [("int8", "int8", "int8"), ("int4", "int4", "int4"), ("mixed", "int8", "int4")]
)
def test_each_matrix_has_its_format(model, weights, encoder, rest, embeddings):
    expected = {"encoder": encoder, "encoder_v.0": rest, "encoder_v.1": rest, "decoder": rest}
    expected |= {"embed": "int8", "lm_head": "int8"} if embeddings else {}
    quantized = quantize(model, weights, embeddings=embeddings)
    assert quantized_formats(quantized) == expected
    for name, weight_format in expected.items():
        before = model.get_submodule(name).weight
        most = before.abs().max() * (
            0.51 / 127 if weight_format == "int8" else 2 / 15
        )  # int4 may clip one end by a step
        assert (quantized.get_submodule(name).weight - before).abs().max() < most


@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
def test_the_logits_are_those_of_the_dequantized_weights(model, tokens, weights):
    quantized = quantize(model, weights, embeddings=True)
    plain = copy.deepcopy(quantized).dequantize()
    assert not quantized_formats(plain)
    assert plain.config.to_dict().get("quantization_config") is None
    torch.testing.assert_close(quantized(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-5)
    assert not torch.equal(quantized(tokens).logits, model(tokens).logits)


def test_the_model_stays_as_it_is_and_the_copy_shares_nothing(model, tokens):
    before, logits = fingerprint(model), model(tokens).logits
    quantized = quantize(model, "int4")
    assert fingerprint(model) == before
    assert quantized_formats(model) == {}
    assert not hasattr(model.config, "quantization_config")
    theirs = quantized(tokens).logits
    with torch.no_grad():
        model.embed.weight += 1
    assert torch.equal(quantized(tokens).logits, theirs)
    assert not torch.equal(model(tokens).logits, logits)


def test_fingerprint_and_mark_cover_the_format_and_each_code(model):
    made = [quantize(model, weights, embeddings=each) for weights in ("int8", "int4", "mixed") for each in (0, 1)]
    assert len({fingerprint(each) for each in (model, *made)}) == 7
    assert len({weights_mark(each).content for each in (model, *made)}) == 7
    for quantized in made:
        before = fingerprint(quantized), weights_mark(quantized).content
        quantized.decoder.packed[3, 5] ^= 1
        assert fingerprint(quantized) != before[0]
        assert weights_mark(quantized).content != before[1]


def test_parameters_are_counted_as_weights(model):
    for embeddings in (False, True):
        quantized = quantize(model, "int4", embeddings=embeddings)
        assert quantized.num_parameters() == model.num_parameters()
        assert quantized.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)
    assert quantized.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("embeddings", [False, True])
def test_it_computes_in_bfloat16(model, tokens, embeddings):
    quantized = quantize(model, "int8", embeddings=embeddings)
    exact = quantized(tokens).logits
    quantized.to(torch.bfloat16)
    assert quantized.dtype == torch.bfloat16
    assert quantized.encoder.packed.dtype == torch.uint8
    logits = quantized(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.1


@pytest.mark.parametrize("module", ["encoder", "encoder_v.1", "decoder", "lm_head"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_named(model, module, value):
    with torch.no_grad():
        model.get_submodule(module).weight[2, 1] = value
    row, column = (1, 2) if module == "decoder" else (2, 1)
    with pytest.raises(ValueError, match=rf"^{module}: weight {column} of row {row} .*is {value}"):
        quantize(model, "int8", embeddings=True)


def test_what_is_quantized_is_refused(model):
    with pytest.raises(ValueError, match="the model has weights in int4 and int8: quantize the unquantized model"):
        quantize(quantize(model, "mixed"), "int4")


def test_other_layers_are_refused_by_name(model):
    model.encoder_v[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"encoder_v.1 of the model cannot be quantized: a layer has hooks"):
        quantize(model, "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3': must be int8 or int4 or mixed"),
        ({"method": "awq"}, "method is 'awq': must be"),
        ({"state": "int2"}, "state is 'int2': must be None or float32"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(model, **arguments)


def test_progress_is_told_of_each_matrix(model):
    told = []
    quantize(model, "int8", progress=lambda *each: told.append(each))
    assert told == [("matrices", number, 4) for number in (1, 2, 3, 4)]


def test_gradients_reach_what_comes_in(model):
    quantized = quantize(model, "int8")
    assert isinstance(quantized.encoder, QuantizedLinear)
    x = torch.randn(2, 40, requires_grad=True)
    quantized.encoder(x).sum().backward()
    torch.testing.assert_close(x.grad, quantized.encoder.weight.sum(0).expand(2, -1))


def test_to_reference_gives_the_weights_that_it_computes_with(model):
    quantized = quantize(model, "int4", embeddings=True)
    ours, plain = quantized.to_reference(), copy.deepcopy(quantized).dequantize().to_reference()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_states_are_in_the_format_that_the_model_recommends_unless_another_is_given(model, tmp_path):
    quantized = quantize(model, "int8", state="bfloat16")
    quantized.save_pretrained(tmp_path)
    for each in (quantized, Network.load(tmp_path)):
        assert Advancer(each).state_format == "bfloat16"
        assert Advancer(each, state="float32").state_format == "float32"
        assert Advancer(each, window=8).state_format == "float32"
        assert Advancer(each, path="torch").state_format == "float32"
    assert Advancer(quantize(model, "int8")).state_format == "float32"
