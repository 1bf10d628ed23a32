import shutil

import pytest
import torch

from bdh.ops.blocks.plan import LayerOptions


def loss_and_gradients(model, tokens, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_gradient_checkpointing_gives_equal_gradients_with_dropout(make_model, tokens, form, use_reentrant):
    model = make_model(dropout=0.3, attention_form=form).train()
    loss, expected = loss_and_gradients(model, tokens)
    other, _ = loss_and_gradients(model, tokens, seed=1)
    assert other != loss  # dropout does something
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.gradient_checkpointing
    checkpointed, gradients = loss_and_gradients(model, tokens)
    assert torch.equal(checkpointed, loss)
    # The same operations in the same order, but gradients of shared weights may be added in another.
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_really_drops_the_wide_activations(make_model, tokens):
    """Fewer bytes are kept for the backward pass: else the gradients above would be equal for free."""

    def bytes_kept(model):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, labels=tokens)
        return kept

    model = make_model().train()
    model.layer_options = LayerOptions(path="plain")
    plain = bytes_kept(model)
    model.activation_checkpointing_enable()
    assert bytes_kept(model) < plain / 2


def test_a_few_steps_learn_a_text_by_heart(make_model, tokens):
    model = make_model(initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss, _ = loss_and_gradients(model, tokens)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4.11, abs=0.1)  # log(61): all tokens alike
    assert losses[-1] < 0.5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_training_step_is_the_plain_one(make_model, tokens):
    model = make_model(n_layer=2).train()
    loss, expected = loss_and_gradients(model, tokens)
    compiled = torch.compile(model)
    compiled_loss, gradients = loss_and_gradients(compiled, tokens)
    # Fused kernels round elsewhere.
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
