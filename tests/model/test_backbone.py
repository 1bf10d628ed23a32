"""The model without its head: BDHModel, and what the base_model of a language model is."""

import copy
import io

import pytest
import torch
from transformers import AutoModel

from bdh import BDHForCausalLM, BDHModel
from bdh.ops.eager import HOOK_POINTS


def test_it_gives_what_the_head_gets(model, tokens):
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True, use_cache=True)
        bare = model.base_model(tokens, output_hidden_states=True, use_cache=True)
        assert torch.equal(model.lm_head(bare.last_hidden_state), whole.logits)
    assert all(torch.equal(a, b) for a, b in zip(bare.hidden_states, whole.hidden_states, strict=True))
    assert torch.equal(bare.hidden_states[-1], bare.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(bare.cache.sums, whole.cache.sums, strict=True))
    assert bare.cache.num_columns == tokens.shape[1]


def test_it_continues_from_a_state(model, tokens):
    whole = model.base_model(tokens).last_hidden_state
    state = model.base_model(tokens[:, :9]).cache
    rest = model.base_model(tokens[:, 9:], cache=state).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 9:], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_language_model(make_model, tokens):
    model, other = make_model(), make_model()
    model(tokens).logits.square().sum().backward()
    other.lm_head(other.base_model(tokens).last_hidden_state).square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_hidden_state_has_the_dtype_of_the_head(make_model, tokens, dtype):
    assert make_model().to(dtype).base_model(tokens).last_hidden_state.dtype == dtype


def test_auto_model_takes_it_out_of_an_export_without_complaint(model, tokens, tmp_path, caplog, capfd):
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is BDHModel
    assert not any(report.values())
    assert "lm_head" not in caplog.text + "".join(capfd.readouterr())
    assert torch.equal(loaded(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)


def test_it_is_saved_and_loaded_and_a_language_model_begins_with_it(model, tokens, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.architectures == ["BDHModel"]
    assert torch.equal(again(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    with_head, report = BDHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(with_head.encoder.weight, model.encoder.weight)


def test_names_are_flat_in_both(model):
    names = [name for name, _ in model.named_parameters()]
    assert (names[0], names[-1]) == ("embed.weight", "lm_head.weight")
    assert [name for name, _ in model.base_model.named_parameters()] == names[:-1]
    assert list(model.state_dict()) == names
    heads = {f"encoder_v.{head}" for head in range(model.config.n_head)}
    points = {"hook_points", *(f"hook_points.{name}" for name in HOOK_POINTS)}
    modules = {"", "embed", "encoder", "encoder_v", "decoder", "lm_head"}
    assert set(dict(model.named_modules())) == modules | heads | points


def test_base_model_is_the_model_as_it_is_now(make_model, tokens):
    model = make_model()
    for base in (model.base_model, model.get_decoder()):
        assert type(base) is BDHModel
        assert base.base_model is base.get_decoder() is base.get_encoder() is base
    assert model.get_encoder() is model
    model.train()
    model.activation_checkpointing_enable()
    assert (model.base_model.training, model.base_model.gradient_checkpointing) == (True, True)
    model.eval()
    before = model.base_model(tokens).last_hidden_state
    model.encoder = torch.nn.Linear(24, model.encoder.out_features, bias=False)  # as adapters and quantizers replace it
    model.to(torch.float64)
    after = model.base_model(tokens).last_hidden_state
    assert after.dtype == torch.float64
    assert not torch.allclose(after, before.double())
    copied = copy.deepcopy(model)
    assert copied.base_model.encoder is copied.encoder is not model.encoder


def test_the_forward_of_the_model_may_be_replaced_by_one_that_calls_base_model(make_model, tokens):
    """As training libraries do; the replacement is not the one of the backbone."""
    model = make_model()
    expected = model.base_model(tokens).last_hidden_state
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.forward = lambda ids: model.base_model(ids).last_hidden_state
    assert torch.equal(model(tokens), expected)
    assert calls == [1]


def test_a_model_whose_base_model_was_used_is_pickled_and_copied(make_model, tokens):
    model = make_model()
    expected = model.base_model(tokens).last_hidden_state
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again.base_model(tokens).last_hidden_state, expected)
    assert torch.equal(copy.deepcopy(model.base_model)(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_alone(make_model, tokens, checkpointing):
    model = make_model().base_model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(tokens).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
