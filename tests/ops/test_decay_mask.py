"""Documents and decay in every form of attention, against naive.py's walk over the tokens, in float64.

The forms add the same products in another order: 16 digits, of which sums of at most 500 * 10 products lose three.
"""

from functools import partial

import pytest
import torch

from bdh.ops import naive
from bdh.ops.attention import (
    ATTENTION_FORMS,
    DecayMask,
    attend,
    chunked_attention,
    parallel_attention,
    recurrent_attention,
)

FORMS = {
    "parallel": parallel_attention,
    "chunked by 16": partial(chunked_attention, chunk_size=16),
    "chunked by 7": partial(chunked_attention, chunk_size=7),
    "chunked by 1": partial(chunked_attention, chunk_size=1),
    "recurrent": recurrent_attention,
}
B, H, N, D = 3, 2, 6, 5
# Chunks of 7 and 16 begin at 0, 7, 14, 16, 21, 32, 48, 49: at, before and behind them, and one after the other.
STARTS = {
    "none": [],
    "at 0": [0],
    "anywhere": [3, 11, 40],
    "consecutive": [5, 6, 7, 8],
    "at the edges of chunks": [0, 7, 14, 16, 32, 48, 49],
    "around the edges of chunks": [6, 8, 15, 17, 31, 33],
    "last": [62],
}
HALF_LIVES = torch.tensor([3.0, 50.0], dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def starts_at(positions, T):
    """Row 0 has none, row 1 the positions, row 2 those two tokens later."""
    starts = torch.zeros(B, T, dtype=torch.bool)
    for position in positions:
        for row, shift in ((1, 0), (2, 2)):
            if position + shift < T:
                starts[row, position + shift] = True
    return starts


def random_inputs(T, *, with_state=True):
    generator = torch.Generator().manual_seed(T)
    make = partial(torch.randn, dtype=torch.float64, generator=generator)
    inputs = [make(B, H, T, N), make(B, T, D), *([make(B, H, N, D)] if with_state else [])]
    return [t.requires_grad_() for t in inputs], (make(B, H, T, D), make(B, H, N, D))


def padding(T):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, : T // 3] = False
    mask[2, T // 2 : T // 2 + 2] = False
    return mask


def assert_same(form, T, *, with_state=True, **facts):
    """Outputs, state and all gradients are those of naive.py; a padded token has no key, as in the model."""
    inputs, weights = random_inputs(T, with_state=with_state)
    mask = facts.get("mask")

    def of(compute):
        q = inputs[0] if mask is None else inputs[0] * mask[:, None, :, None]
        outputs = compute(q, *inputs[1:])
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(total, inputs, materialize_grads=True)]

    expected = of(partial(naive.attention_by_state, **facts))
    for got, truth in zip(
        of(partial(FORMS[form], decay_mask=DecayMask(**facts), keep_state=True)), expected, strict=True
    ):
        assert_close(got, truth)


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("form", FORMS)
def test_documents_are_those_of_naive(form, where, with_state):
    assert_same(form, 63, with_state=with_state, starts=starts_at(STARTS[where], 63))


@pytest.mark.parametrize("T", [1, 2, 63, 500])
@pytest.mark.parametrize("form", FORMS)
def test_decay_is_that_of_naive(form, T):
    assert_same(form, T, half_lives=HALF_LIVES)


@pytest.mark.parametrize("T", [1, 2, 63])
@pytest.mark.parametrize("form", FORMS)
def test_decay_documents_and_padding_go_together(form, T):
    assert_same(form, T, half_lives=HALF_LIVES, starts=starts_at([0, 7, 8, 20], T), mask=padding(T))


@pytest.mark.parametrize("form", FORMS)
def test_padding_takes_no_time(form):
    (q, v, state), _ = random_inputs(20)
    q, v, state = q.detach(), v.detach(), state.detach()
    mask = torch.zeros(B, 27, dtype=torch.bool)
    mask[:, [0, 1, 2, *range(7, 15), *range(18, 27)]] = True
    padded_q, padded_v = torch.zeros(B, H, 27, N).double(), torch.randn(B, 27, D).double()
    padded_q[:, :, mask[0]], padded_v[:, mask[0]] = q, v
    expected = FORMS[form](q, v, state.clone(), decay_mask=DecayMask(half_lives=HALF_LIVES), keep_state=True)
    got = FORMS[form](
        padded_q, padded_v, state.clone(), decay_mask=DecayMask(half_lives=HALF_LIVES, mask=mask), keep_state=True
    )
    assert_close(got[0][:, :, mask[0]], expected[0])
    assert_close(got[1], expected[1])


@pytest.mark.parametrize("sizes", [(1, 62), (7, 1, 1, 54), (16, 16, 16, 15)])
def test_split_anywhere_and_resumed_in_any_form_is_the_whole(sizes):
    (q, v), _ = random_inputs(63, with_state=False)
    q, v = q.detach(), v.detach()
    starts, mask = starts_at([0, 7, 16, 17, 40], 63), padding(63)
    q = q * mask[:, None, :, None]
    expected = naive.attention_by_state(q, v, starts=starts, mask=mask, half_lives=HALF_LIVES)
    for shift in range(len(FORMS)):
        state, parts, at = None, [], 0
        for i, size in enumerate(sizes):
            columns = slice(at, at + size)
            decay_mask = DecayMask(starts[:, columns], HALF_LIVES, mask[:, columns])
            form = list(FORMS.values())[(i + shift) % len(FORMS)]
            a, state = form(q[:, :, columns], v[:, columns], state, decay_mask=decay_mask, keep_state=True)
            parts.append(a)
            at += size
        assert_close(torch.cat(parts, 2), expected[0])
        assert_close(state, expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_not_even_infinity_passes_a_documents_start(form):
    (q, v, state), _ = random_inputs(20)
    q, v, state = q.detach(), v.detach(), torch.full_like(state, torch.inf)
    starts = torch.zeros(B, 20, dtype=torch.bool)
    starts[:, 0] = True
    got = FORMS[form](q, v, state, decay_mask=DecayMask(starts=starts), keep_state=True)
    for result, truth in zip(got, naive.attention_by_state(q, v), strict=True):
        assert_close(result, truth)


@pytest.mark.parametrize("form", FORMS)
def test_a_half_life_is_the_tokens_after_which_half_is_left(form):
    q, v = torch.zeros(1, 3, 11, 2).double(), torch.zeros(1, 11, 1).double()
    q[:, :, [0, 1, -1], 0], v[:, 0] = 1, 1
    half_lives = torch.tensor([9.0, 3.0, torch.inf]).double()
    a, _ = FORMS[form](q, v, decay_mask=DecayMask(half_lives=half_lives))
    assert_close(a[0, :, 1, 0], torch.ones(3).double())  # the next token sees all of it
    assert_close(a[0, :, -1, 0], torch.tensor([0.5, 0.125, 1.0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_fastest_decay_over_a_long_text_stays_finite(form, dtype):
    """g^-s would overflow float32 after 128 half-lives, float16 after 16."""
    q, v = torch.randn(1, 2, 1500, 8).to(dtype), torch.randn(1, 1500, 4).to(dtype)
    half_lives = torch.tensor([0.5, 4.0])
    a, state = FORMS[form](q, v, decay_mask=DecayMask(half_lives=half_lives), keep_state=True)
    expected = naive.attention_by_state(q.float(), v.float(), half_lives=half_lives)
    # Scores are rounded to dtype, in sums of terms of both signs.
    tolerance = 50 * torch.finfo(dtype).eps
    for got, truth in zip((a, state), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - truth).norm() < tolerance * truth.norm()


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_attend_hands_the_reach_to_every_form(form):
    (q, v, state), _ = random_inputs(63)
    q, v, state = q.detach(), v.detach(), state.detach()
    starts = starts_at([9, 30], 63)
    expected = naive.attention_by_state(q, v, state, starts=starts, half_lives=HALF_LIVES)
    decay_mask = DecayMask(starts, HALF_LIVES)
    got = attend(q, v, state.clone(), form=form, chunk_size=16, decay_mask=decay_mask, keep_state=True)
    for result, truth in zip(got, expected, strict=True):
        assert_close(result, truth)


def test_the_walk_of_naive_is_its_sum():
    """The ground truth agrees with itself: the walk without documents and decay is the plain form."""
    (q, v), _ = random_inputs(63, with_state=False)
    a, state = naive.attention_by_state(q, v)
    assert_close(a, naive.attention(q, v))
    assert_close(state, q.transpose(-1, -2) @ v[:, None])
