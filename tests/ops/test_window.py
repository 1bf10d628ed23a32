"""The ring of the last tokens against the banded scores of naive.py, in float64.

They add the same few hundred products in another order: 1e-9 is far above float64's rounding and far below any fault.
"""

from functools import partial

import pytest
import torch

from bdh.ops import naive
from bdh.ops.eager import Ring, attend_window, ring_shapes, take_in

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
HALF_LIVES = [3.0, float("inf"), 0.01, 40.0, 7.0]


def random_inputs(H, T, N, D):
    make = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(T + H))
    return make(H, T, N).relu(), make(T, D)


def empty_ring(window, *sizes):
    shapes = ring_shapes(window, *sizes, torch.float64)
    return Ring(**{name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()})


def in_pieces(q, v, ring, pieces, position, half_lives):
    parts = []
    for q_piece, v_piece in zip(q.split(pieces, dim=1), v.split(pieces), strict=True):
        parts.append(attend_window(q_piece, v_piece, ring, position, half_lives=half_lives))
        take_in(q_piece, v_piece, ring, position)
        position += v_piece.shape[0]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("with_decay", [False, True], ids=["", "decay"])
@pytest.mark.parametrize("window", [1, 2, 8, 17, 60, 1000])
@pytest.mark.parametrize("shape", [(1, 60, 6, 5), (5, 60, 18, 7)], ids=["1 head", "5 heads"])
@pytest.mark.parametrize("pieces", [[60], [1] * 60, [5, 1, 1, 30, 16, 7]], ids=["whole", "tokens", "pieces"])
@pytest.mark.parametrize("position", [0, 10**9 + 3])
def test_any_pieces_give_what_banded_scores_give(shape, window, pieces, position, with_decay):
    H, _, N, D = shape
    q, v = random_inputs(*shape)
    half_lives = torch.tensor(HALF_LIVES[:H], dtype=torch.float64) if with_decay else None
    ring = empty_ring(window, H, N, D)
    a = in_pieces(q, v, ring, pieces, position, half_lives)
    assert_close(a, naive.attention(q[None], v[None], window=window, half_lives=half_lives)[0])


def test_a_window_as_long_as_the_text_is_none():
    q, v = random_inputs(2, 20, 6, 3)
    everything = naive.attention(q[None], v[None])
    assert torch.equal(naive.attention(q[None], v[None], window=20), everything)
    assert not torch.allclose(naive.attention(q[None], v[None], window=19), everything)
    for half_lives in (torch.tensor([3.0, 9.0], dtype=torch.float64), None):
        by_scores = naive.attention(q[None], v[None], window=20, half_lives=half_lives)
        assert_close(by_scores, naive.attention_by_state(q[None], v[None], half_lives=half_lives)[0])


def test_the_ring_marks_the_pairs_that_fire_and_holds_the_last_tokens():
    q, v = random_inputs(3, 23, 18, 5)
    q[:, :, 4:14] *= torch.rand(3, 23, 1) > 0.5
    ring = empty_ring(8, 3, 18, 5)
    in_pieces(q, v, ring, [2, 1, 11, 9], 0, None)
    for token in range(16, 23):
        column = token % 7
        assert torch.equal(ring.keys[:, :, column], q[:, token])
        assert torch.equal(ring.values[column], v[token])
        fires = (q[:, token].unflatten(-1, (-1, 2)) > 0).any(-1)  # (H, N/2)
        bits = (ring.fired[:, column, :, None] >> torch.arange(8)) & 1
        assert torch.equal(bits.flatten(1)[:, :9].bool(), fires)
    assert not ring.keys[:, :, 7:].any()
