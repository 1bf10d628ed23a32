"""Every form of attention against naive.py, in float64.

The forms add the same products in another order. Float64 keeps 16 digits; sums of at most 500 * 10 products
lose three of them, gradients a few more, so 1e-9 is far above rounding and far below any fault.
"""

from functools import partial

import pytest
import torch

from bdh.ops import naive
from bdh.ops.attention import (
    ATTENTION_FORMS,
    attend,
    choose_form,
    chunked_attention,
    parallel_attention,
    recurrent_attention,
)

FORMS = {
    "parallel": parallel_attention,
    "chunked by 16": partial(chunked_attention, chunk_size=16),
    "chunked by 7": partial(chunked_attention, chunk_size=7),
    "chunked by 1": partial(chunked_attention, chunk_size=1),
    "chunked by 1000": partial(chunked_attention, chunk_size=1000),
    "recurrent": recurrent_attention,
}
SHAPES = [  # B, H, T, N, D
    (1, 1, 1, 6, 5),
    (2, 5, 63, 10, 7),
    (1, 3, 128, 8, 9),
    (2, 2, 500, 6, 3),
]
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def attention_from(q, v, state):
    """The ground truth on top of an earlier state: outputs and final state, as the equations are."""
    a = naive.attention(q, v)
    new_state = q.transpose(-1, -2) @ v[:, None]
    return (a, new_state) if state is None else (a + q @ state, state + new_state)


def random_inputs(B, H, T, N, D, *, with_state):
    generator = torch.Generator().manual_seed(T)
    make = partial(torch.randn, dtype=torch.float64, generator=generator)
    q, v = make(B, H, T, N), make(B, T, D)
    state = make(B, H, N, D) if with_state else None
    return [None if t is None else t.requires_grad_() for t in (q, v, state)], make


def gradients_of(outputs, inputs, weights):
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    # At T = 1 without a state the outputs are zero for all inputs: no gradient rather than zeros.
    return torch.autograd.grad(total, [t for t in inputs if t is not None], materialize_grads=True)


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("form", FORMS)
def test_outputs_state_and_gradients_are_those_of_naive(form, shape, with_state):
    inputs, make = random_inputs(*shape, with_state=with_state)
    B, H, T, N, D = shape
    weights = make(B, H, T, D), make(B, H, N, D)
    expected = attention_from(*inputs)
    results = FORMS[form](*inputs, keep_state=True)
    for result, truth in zip(results, expected, strict=True):
        assert_close(result, truth)
    for result, truth in zip(
        gradients_of(results, inputs, weights), gradients_of(expected, inputs, weights), strict=True
    ):
        assert_close(result, truth)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("form", FORMS)
def test_without_the_state_outputs_and_gradients_stay_the_same(form, shape):
    inputs, make = random_inputs(*shape, with_state=True)
    B, H, T, _, D = shape
    weight = make(B, H, T, D)
    expected = attention_from(*inputs)[0]
    result, state = FORMS[form](*inputs, keep_state=False)
    assert state is None
    assert_close(result, expected)
    for got, truth in zip(
        gradients_of([result], inputs, [weight]), gradients_of([expected], inputs, [weight]), strict=True
    ):
        assert_close(got, truth)


@pytest.mark.parametrize("sizes", [(1, 62, 437), (499, 1), (250, 1, 1, 248), (63, 63, 63, 63, 63, 63, 63, 59)])
def test_split_anywhere_and_resumed_in_any_form_is_the_whole(sizes):
    (q, v, _), _ = random_inputs(2, 2, 500, 6, 3, with_state=False)
    q, v = q.detach(), v.detach()
    expected = attention_from(q, v, None)
    for shift in range(len(FORMS)):
        state, parts = None, []
        for i, (q_part, v_part) in enumerate(zip(q.split(sizes, 2), v.split(sizes, 1), strict=True)):
            form = list(FORMS.values())[(i + shift) % len(FORMS)]
            a, state = form(q_part, v_part, state, keep_state=True)
            parts.append(a)
        assert_close(torch.cat(parts, 2), expected[0])
        assert_close(state, expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_is_not_kept_is_not_written(form):
    """The recurrent form used to advance it, all but the last token, though it did not return it."""
    (q, v, state), _ = random_inputs(2, 5, 63, 10, 7, with_state=True)
    before = state.detach().clone()
    with torch.no_grad():
        FORMS[form](q, v, state, keep_state=False)
    assert torch.equal(state, before)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_a_state_that_alone_requires_them(form):
    (q, v, state), make = random_inputs(1, 3, 17, 8, 9, with_state=True)
    q, v = q.detach(), v.detach()
    weights = make(1, 3, 17, 9), make(1, 3, 8, 9)
    (expected,) = gradients_of(attention_from(q, v, state), [state], weights)
    (got,) = gradients_of(FORMS[form](q, v, state, keep_state=True), [state], weights)
    assert_close(got, expected)


def test_the_recurrent_form_keeps_a_state_in_place():
    (q, v, state), _ = random_inputs(2, 5, 63, 10, 7, with_state=True)
    with torch.no_grad():
        expected = attention_from(q, v, state.clone())[1]
        _, kept = recurrent_attention(q, v, state, keep_state=True)
    assert kept.data_ptr() == state.data_ptr()
    assert_close(state.detach(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_does_not_see_itself_or_what_comes_after(form):
    (q, v, _), _ = random_inputs(1, 3, 128, 8, 9, with_state=False)
    q, v = q.detach(), v.detach()
    a, _ = FORMS[form](q, v)
    q_other, v_other = q.clone(), v.clone()
    q_other[:, :, 51:] += 1
    v_other[:, 50:] += 1
    other, _ = FORMS[form](q_other, v_other)
    assert_close(other[:, :, :51], a[:, :, :51])
    assert (other[:, :, 52:] - a[:, :, 52:]).abs().amin() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_kept_in_float32(form, dtype):
    q, v = torch.randn(1, 2, 20, 6).to(dtype), torch.randn(1, 20, 5).to(dtype)
    a, state = FORMS[form](q, v, keep_state=True)
    assert a.dtype == state.dtype == torch.float32


def test_auto_takes_a_step_then_parallel_then_chunks():
    assert choose_form("auto", 1, 64, has_state=True) == "recurrent"
    assert choose_form("auto", 1, 64, has_state=False) == "parallel"
    assert choose_form("auto", 256, 64, has_state=True) == "parallel"
    assert choose_form("auto", 257, 64, has_state=True) == "chunked"
    assert choose_form("auto", 640, 256, has_state=False) == "parallel"
    assert choose_form("auto", 641, 256, has_state=False) == "chunked"


@pytest.mark.parametrize("requested", sorted(set(ATTENTION_FORMS) - {"auto"}))
def test_a_requested_form_is_taken_at_any_length(requested):
    assert {choose_form(requested, T, 64, has_state=s) for T in (1, 10**6) for s in (True, False)} == {requested}


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'flash' is unknown: must be one of auto, parallel, chunked, recurrent"):
        attend(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2), form="flash")


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_attend_gives_what_the_form_gives(form):
    (q, v, state), _ = random_inputs(1, 3, 128, 8, 9, with_state=True)
    q, v, state = q.detach(), v.detach(), state.detach()
    expected = attention_from(q, v, state)
    for result, truth in zip(
        attend(q, v, state.clone(), form=form, chunk_size=16, keep_state=True), expected, strict=True
    ):
        assert_close(result, truth)
