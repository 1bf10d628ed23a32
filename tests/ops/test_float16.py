"""Attention in float16, whose largest number is 65,504, at the width of the base model."""

import copy

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.ops import naive
from bdh.ops.attention import attend, parallel_attention, rotate, rotation_table

LARGEST = torch.finfo(torch.float16).max
D, H, N, T = 256, 4, 8192, 24


@pytest.fixture(scope="module")
def model():
    """Two passes of the base model, whose neurons fire 30 times as strongly as those of a fresh one."""
    torch.manual_seed(0)
    config = BDHConfig(n_embd=D, n_head=H, mlp_internal_dim_multiplier=128, n_layer=2, dropout=0.0, chunk_size=8)
    assert config.neurons_per_head == N
    model = BDHForCausalLM(config)
    with torch.no_grad():
        model.encoder.weight *= 30
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(256, (1, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def queries(model, tokens):
    """q of the first pass and its values, in float32."""
    with torch.no_grad():
        v = naive.layer_norm(model.embed(tokens))
        x = torch.relu(model.encoder(v)).unflatten(-1, (H, N)).transpose(1, 2)
        return rotate(x, rotation_table(torch.arange(T), N, 2**16)).contiguous(), v


def test_the_scores_do_exceed_the_range_of_float16(queries):
    """The premise of this file: in the obvious form every score of these inputs is lost."""
    q, v = queries
    scores = (q @ q.transpose(-1, -2)).tril(-1)
    assert scores.abs().max() > 2 * LARGEST
    assert q.abs().max() < LARGEST / 100  # the neurons themselves fit
    assert not naive.attention(q.half(), v.half()).isfinite().all()


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_attention_is_finite_and_that_of_float32(queries, form):
    q, v = queries
    expected, expected_state = parallel_attention(q, v, keep_state=True)
    a, state = attend(q.half(), v.half(), form=form, chunk_size=8, keep_state=True)
    # q, v and the scores are rounded to 11 bits, 5e-4 each, in sums of terms of both signs.
    assert (a - expected).norm() / expected.norm() < 3e-3
    assert (state - expected_state).norm() / expected_state.norm() < 3e-3


def test_a_text_where_no_neuron_fires_gives_zeros():
    q, v = torch.zeros(1, 2, 5, 8, dtype=torch.float16), torch.randn(1, 5, 4).half()
    assert torch.equal(parallel_attention(q, v)[0], torch.zeros(1, 2, 5, 4))


def loss_and_gradients(model, tokens, form, *, half):
    model = copy.deepcopy(model).train()
    # What torch.amp.GradScaler does: without it the gradients of this loss are below float16's smallest numbers.
    scale = 2.0**12
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        loss = model(tokens, labels=tokens, attention_form=form).loss
    (loss * scale).backward()
    return loss.item(), {name: p.grad / scale for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def in_float32(model, tokens):
    return loss_and_gradients(model, tokens, "parallel", half=False)


@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_a_training_step_under_autocast_is_that_of_float32(model, tokens, in_float32, form):
    loss, gradients = loss_and_gradients(model, tokens, form, half=True)
    expected_loss, expected = in_float32
    # Every matmul rounds its inputs to 11 bits, 5e-4.
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        # A relu whose input is within that of zero passes a gradient in one precision and none in the other:
        # a share of 5e-4 of the neurons, so an error of sqrt(5e-4) = 2.2e-2 of the norm.
        assert (gradient - expected[name]).norm() < 4e-2 * expected[name].norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_a_model_in_half_precision_weights_stays_close_to_float32(model, tokens, dtype, tolerance):
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        half = copy.deepcopy(model).to(dtype)
        output = half(tokens, use_cache=True)
        step = half(tokens[:, :1], cache=output.cache)
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all()
    assert step.logits.isfinite().all()
    assert {s.dtype for s in output.cache.sums} == {torch.float32}
    # The weights themselves are rounded, to 11 and to 8 bits, and two passes add to it.
    assert (output.logits.float() - expected).norm() < tolerance * expected.norm()
