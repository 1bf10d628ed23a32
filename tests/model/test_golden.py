"""Logits, gradients and continuations against those of the published reference code, in float32.

The reference and we add the same float32 products in another order: logits of about 1 differ by 1e-6, so
1e-4 leaves room for other processors and none for a fault.
"""

import pytest
import torch

from bdh import BDHForCausalLM
from bdh.ops import naive

FORMS = ["parallel", "chunked", "recurrent"]


@pytest.fixture
def model(golden):
    return BDHForCausalLM.from_reference(golden.weights, {**golden.config, "chunk_size": 16})


def gradients_in_the_layout_of_the_reference(model):
    """The gradients, sent through the converter in place of the weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return model.to_reference()


def test_naive_is_the_reference(golden):
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    weights = naive.Weights(*(golden.weights[name] for name in names))
    logits = naive.forward(golden.input_ids, weights, golden.config["n_layer"])
    torch.testing.assert_close(logits, golden.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_gradients_are_the_references(golden, model, form):
    assert golden.input_ids.shape[1] > 2 * model.config.chunk_size  # so that chunks are carried over
    output = model(golden.input_ids, shift_labels=golden.targets, attention_form=form)
    torch.testing.assert_close(output.logits, golden.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, golden.loss[0], rtol=0, atol=1e-5)
    output.loss.backward()
    gradients = gradients_in_the_layout_of_the_reference(model)
    for name, expected in golden.grads.items():
        assert (gradients[name] - expected).norm() < 1e-4 * expected.norm(), name


def test_token_by_token_gives_the_references_logits(golden, model):
    state, logits = None, []
    with torch.no_grad():
        for t in range(golden.input_ids.shape[1]):
            output = model(golden.input_ids[:, t : t + 1], cache=state, use_cache=True)
            state = output.cache
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), golden.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuations_are_the_references(golden, model, use_cache):
    prompt = golden.greedy_32[:, :-32]
    text = model.generate(prompt, max_new_tokens=32, do_sample=False, use_cache=use_cache)
    assert torch.equal(text, golden.greedy_32)
