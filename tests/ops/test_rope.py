import math
from decimal import Decimal, getcontext

import pytest
import torch

from bdh.ops import naive
from bdh.ops.attention import make_rotation, rotate, rotation_table, turns_per_token

N, THETA = 64, 2**16
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def exact_turns(position: int, pair: int) -> float:
    """The fraction of a turn, by 50-digit arithmetic."""
    getcontext().prec = 50
    turns = Decimal(position) * Decimal(THETA) ** (Decimal(-2 * pair) / N) / (2 * PI)
    return float(turns % 1)


@pytest.mark.parametrize("position", [0, 1, 511, 10**6, 2**24 + 1, 10**9, 10**9 + 1])
def test_rotations_are_exact_up_to_position_1e9(position):
    table = rotation_table(torch.tensor([position]), N, THETA)[0]
    turns = torch.tensor([exact_turns(position, i) for i in range(N // 2)], dtype=torch.float64)
    expected = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
    # Float32 angles of up to 2 pi are good to 2.4e-7, cosines and sines to 6e-8; float64 turns to 4e-8 at 1e9.
    assert (table.to(torch.complex128) - expected).abs().max() < 8e-7


def test_float32_positions_would_have_failed():
    """The premise of the test above: multiplied in float32, the angle at 10^6 is off by more than 1e-2."""
    frequencies = turns_per_token(N, THETA)
    exact = torch.tensor([exact_turns(10**6, i) for i in range(N // 2)], dtype=torch.float64)
    narrow = (torch.tensor(10**6, dtype=torch.float32) * frequencies.float()).double()
    error = torch.remainder(narrow - exact + 0.5, 1) - 0.5
    assert 2 * math.pi * error.abs().max() > 1e-2


def test_one_more_token_turns_the_first_pair_by_one_radian_even_at_1e9():
    table = rotation_table(torch.tensor([10**9, 10**9 + 1]), N, THETA, torch.float64)
    # theta^0 / (2 pi) turns are one radian. Both positions are good to 4e-8 of a turn.
    assert torch.angle(table[1, 0] / table[0, 0]).item() == pytest.approx(1, abs=6e-7)


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 1, 2), (5, 10)])
def test_rotate_is_the_written_out_formula(shape):
    x = torch.randn(shape, dtype=torch.float64)
    positions = torch.arange(shape[-2]) * 97
    table = rotation_table(positions, shape[-1], THETA, torch.float64)
    torch.testing.assert_close(rotate(x, table), naive.rope(x, positions, THETA), rtol=1e-12, atol=1e-12)


def test_rotate_turns_a_towards_b():
    """(a, b) goes to (a cos - b sin, b cos + a sin), not the other way round."""
    quarter = torch.tensor([[1j]], dtype=torch.complex64)
    assert rotate(torch.tensor([[1.0, 0.0]]), quarter).tolist() == [[0.0, 1.0]]
    assert rotate(torch.tensor([[0.0, 1.0]]), quarter).tolist() == [[-1.0, 0.0]]


def test_gradients_of_rotate_are_those_of_the_formula():
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    table = rotation_table(torch.arange(6), 4, THETA, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotate_keeps_the_dtype_and_turns_in_at_least_float32(dtype):
    x = torch.randn(3, 8, dtype=torch.float64).to(dtype)
    table = rotation_table(torch.arange(3), 8, THETA, dtype)
    assert table.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    rotated = rotate(x, table)
    assert rotated.dtype == dtype
    # Rounded once, at the end: half a unit in the last place, and the float32 arithmetic before it.
    expected = naive.rope(x.double(), torch.arange(3), THETA)
    tolerance = torch.finfo(dtype).eps + 1e-6 * (dtype != torch.float64)
    torch.testing.assert_close(rotated.double(), expected, rtol=tolerance, atol=1e-6)


def test_every_row_may_stand_at_its_own_position():
    positions = torch.tensor([[0, 1, 2], [100, 101, 102]])
    table = rotation_table(positions, 8, THETA)
    assert table.shape == (2, 3, 4)
    for row in range(2):
        assert torch.equal(table[row], rotation_table(positions[row], 8, THETA))


def test_with_a_bound_no_position_is_looked_at_before_the_device_has_computed_it():
    """A tensor on meta has no values: whatever depends on them, as what a GPU has to be waited for does, raises there."""
    positions = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    rotation = make_rotation(positions, 8, THETA, torch.float32, bound=5)
    assert rotation.cos.shape == rotation.sin.shape == (4, 5)
    assert rotation.places is positions
    with pytest.raises(NotImplementedError):
        make_rotation(positions, 8, THETA, torch.float32)
