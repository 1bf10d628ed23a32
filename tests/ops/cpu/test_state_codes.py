"""One pair's rows of codes, over the windows of a text."""

import numpy as np
import pytest

from bdh.ops.cpu.pieces import jit
from bdh.ops.cpu.state_codes import CODE_BYTES, HEAD_BYTES, WINDOW, rounding_table, row_numbers, sweep_windows
from bdh.ops.cpu.vector import address


@jit
def _sweep(rows, position, first_end, num_tokens, lists, count, places, scores, out, memory, table, D):
    row_bytes = rows.strides[0]
    sweep_windows(
        address(rows), row_bytes, position, first_end, num_tokens, address(lists), lists.strides[0], count,
        address(places), address(scores), address(out), address(memory), address(table), 7, D,
    )  # fmt: skip


class Pair:
    """A pair's rows, and what they stand for, in float64."""

    def __init__(self, D):
        self.rows, self.exact = np.zeros((2, row_numbers(D)), np.int16), np.zeros((2, D))
        self.D, self.position = D, 0

    @property
    def steps(self):
        return self.rows[:, : HEAD_BYTES // CODE_BYTES].copy().view(np.float32)[:, -1]

    @property
    def sums(self):
        return self.rows[:, HEAD_BYTES // CODE_BYTES :][:, : self.D] * self.steps[:, None].astype(np.float64)

    def read_window(self, queries, keys, values):
        """What the queries (W, 2) read from a whole window on, of its beginning and of its tokens before theirs."""
        lists = np.zeros((5, 2 * WINDOW), np.float32)
        lists[0, :WINDOW] = np.arange(WINDOW, dtype=np.int32).view(np.float32)
        lists[1:3, :WINDOW], lists[3:, :WINDOW] = queries.T, keys.T
        places = values.ctypes.data + np.arange(WINDOW)[None] * values.strides[0]
        scores, out = np.zeros((WINDOW, WINDOW), np.float32), np.zeros((WINDOW, self.D), np.float32)
        memory, table = np.zeros(2 * self.D + 2 + 6 * WINDOW, np.float32), rounding_table(self.D)
        _sweep(self.rows, self.position, WINDOW, WINDOW, lists, WINDOW, places, scores, out, memory, table, self.D)
        self.position += WINDOW
        self.exact += keys.T.astype(np.float64) @ values
        return out + np.tril(scores, -1) @ values


@pytest.mark.parametrize("D", [1, 24, 96])
def test_a_window_reads_what_was_written_before_and_is_merged_within_a_step(D):
    rng, pair = np.random.default_rng(0), Pair(D)
    for window in range(4):
        queries, keys = rng.standard_normal((2, WINDOW, 2)).astype(np.float32)
        values = rng.standard_normal((WINDOW, D)).astype(np.float32)
        before = [pair.exact + keys[:t].T.astype(np.float64) @ values[:t] for t in range(WINDOW)]
        expected = np.stack([q @ S for q, S in zip(queries, before, strict=True)])
        np.testing.assert_allclose(pair.read_window(queries, keys, values), expected, atol=2e-3, rtol=1e-4)
        assert (np.abs(pair.sums - pair.exact) <= (window + 1) * pair.steps[:, None]).all()
    largest = np.abs(pair.exact).max(1)
    np.testing.assert_allclose(pair.steps * 32_766, largest, rtol=1e-3)


def test_amounts_far_below_a_step_add_up_in_the_mean():
    pair, D = Pair(256), 256
    queries, keys = np.zeros((WINDOW, 2), np.float32), np.zeros((WINDOW, 2), np.float32)
    values = np.full((WINDOW, D), 0.02 / 32_766, np.float32)  # fiftieths of a step
    values[0], values[0, 0] = 0.5, 1
    keys[0] = 1
    pair.read_window(queries, keys, values)
    keys[0], keys[1] = 0, 1
    for _ in range(500):
        pair.read_window(queries, keys, values)
    added = (pair.sums - 0.5)[:, 1:] * 32_766
    # Each of the 500 times a number goes up by a step with a probability of 0.02.
    assert np.abs(added.mean(1) - 10).max() < 5 * np.sqrt(10 / (D - 1))
    assert added.std(1).max() < 5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_state_that_is_not_of_numbers_stays_so(wrong):
    pair = Pair(24)
    ones, values = np.ones((WINDOW, 2), np.float32), np.ones((WINDOW, 24), np.float32)
    values[3, 5] = wrong
    with np.errstate(invalid="ignore"):
        pair.read_window(ones, ones, values)
    assert np.isnan(pair.steps).all()
    assert np.isnan(pair.read_window(ones, ones, np.ones((WINDOW, 24), np.float32))).all()
    assert np.isnan(pair.steps).all()
