"""The layer steps with int16 states.

They are those of :mod:`bdh.ops.cpu.kernels`, except that these stages read and write the states:

    sweep     q S from the codes, and the scores within the window;     for pairs of neurons that fire or have
              stores the keys, and merges the windows that end          written in the window
    attend    LN(q S + the window's values, weighted by their scores)   for every row and head
    store     stores the rows' values in the state                      for every sequence

The order of sums is fixed as in :mod:`bdh.ops.cpu.window`. For each layer step, a state has the rows that
:mod:`bdh.ops.cpu.state_codes` describes, and the values (W, D) of the last W = ``WINDOW`` tokens, each at its position
modulo W. Where the windows end depends on the layer step and the head, so that no token has to merge all of them.
"""

import numpy as np

from bdh.ops.cpu.kernels import (
    AHEAD,
    LISTED,
    STAGE_BYTES,
    STAGES,
    STRETCH_NEURONS,
    bounds_of,
    enter,
    firing_pairs,
    gated_mlp,
    list_pairs,
    normalise,
    project,
    residual_norm,
    sum_stretches,
)
from bdh.ops.cpu.pieces import jit, pieces
from bdh.ops.cpu.state_codes import CODE_BYTES, HEAD_BYTES, WINDOW, WRITTEN_ARRAYS, row_numbers, sweep_windows
from bdh.ops.cpu.state_rows import LIST_ARRAYS
from bdh.ops.cpu.vector import CACHE_LINE, LANES, address, prefetch
from bdh.ops.cpu.window import add_values, sequences_of, store

_row_numbers = jit(row_numbers)


@jit
def place_in_window(position, layer_step, H, h):
    """Returns the place of a token in a head's window."""
    return (position + layer_step * H + h) % WINDOW


@jit
def locate_values(values, v, row, position, first_end, num_windows, out):
    """Writes the addresses of the values of the windows that end to ``out`` (windows, W).

    The values of earlier tokens are in the state, at the address ``values``. Those of the call's tokens are in v.

    Args:
        row: the sequence's first row in v, which is its token 0.
        position: the absolute position of token 0.
        first_end: the number of the token after the end of the first window.
    """
    value_bytes = v.shape[1] * 4
    for window in range(num_windows):
        for place in range(WINDOW):
            token = first_end + (window - 1) * WINDOW + place
            in_state = values + (position + token) % WINDOW * value_bytes
            out[window, place] = in_state if token < 0 else address(v) + (row + token) * value_bytes


@jit
def sweep(
    stage, states, values, table, layer_step, starts, positions, x, cos, sin, read_scales, write_scales, v,
    partial_scores, partial_sums, N,
):  # fmt: skip
    """Computes the sums over each stretch of q S and of the scores within the window, and updates the states' rows.

    It stores the rows' keys in the states. At the end of a window, it merges what was written in it into the codes.

    Args:
        states, values: (sequences,), the addresses of each sequence's rows and values.
        table: int32 (D,), the result of :func:`bdh.ops.cpu.state_codes.rounding_table`.
        partial_scores: (stretches, R, W), the result for the scores.
        partial_sums: (stretches, R, D), the result for q S.

    The other arguments are those of :func:`bdh.ops.cpu.kernels.attention_update`.
    """
    num_stretches, R, D = partial_sums.shape
    H, row_bytes = x.shape[0] // N, _row_numbers(D) * CODE_BYTES
    firing, offsets = np.empty(STRETCH_NEURONS // 2, np.int64), np.empty(STRETCH_NEURONS // 2 + 1, np.int64)
    listed = np.empty((LIST_ARRAYS, LISTED + R + LANES), np.float32)
    read, write = np.empty(R, np.float32), np.empty(R, np.float32)
    value_places = np.empty((R // WINDOW + 1, WINDOW), np.int64)
    memory = np.empty(2 * D + 2 + WRITTEN_ARRAYS * 2 * WINDOW, np.float32)
    for stretch in pieces(stage, num_stretches):
        h, first, end = bounds_of(stretch, N)
        partial_sums[stretch] = 0
        partial_scores[stretch] = 0
        lists, room = address(listed), listed.strides[0]  # in the loop, because numba frees an array after its last use
        for r in range(R):
            read[r], write[r] = read_scales[r, h], write_scales[r, h]
        for sequence in range(len(states)):
            row, last = starts[sequence], starts[sequence + 1]
            state = states[sequence] + h * N * row_bytes
            scores = address(partial_scores) + (stretch * R + row) * HEAD_BYTES
            out = address(partial_sums) + (stretch * R + row) * D * 4
            first_end = WINDOW - place_in_window(positions[row], layer_step, H, h)
            num_windows = max(0, (last - row - first_end) // WINDOW + 1)
            locate_values(values[sequence], v, row, positions[row], first_end, num_windows, value_places)
            count = firing_pairs(x, h, N, first, end, row, last, state if num_windows else 0, row_bytes, firing)
            begin = 0
            while begin < count:
                stop = list_pairs(firing, begin, count, x, h, N, cos, sin, read, write, row, last, lists, room, offsets)
                for index in range(begin, stop):
                    if index + AHEAD < count:
                        following = state + 2 * firing[index + AHEAD] * row_bytes
                        for line in range(0, 2 * row_bytes, CACHE_LINE):
                            prefetch(following + line)
                    n = 2 * firing[index]
                    sweep_windows(
                        state + n * row_bytes,
                        row_bytes,
                        positions[row],
                        first_end,
                        last - row,
                        lists + offsets[index] * 4,
                        room,
                        offsets[index + 1] - offsets[index],
                        address(value_places),
                        scores,
                        out,
                        address(memory),
                        address(table),
                        (layer_step * H + h) * N + n,
                        D,
                    )
                begin = stop


@jit
def attend(stage, partial_scores, partial_sums, values, layer_step, starts, positions, v, a, eps):
    """Computes a (H, R, D), the LN of what each row reads from the codes and from its window.

    Args:
        partial_scores: (H * stretches per head, R, W), of :func:`sweep`.
        partial_sums: (H * stretches per head, R, D), of :func:`sweep`.
        values: (sequences,), the addresses of each sequence's values.
    """
    H, R, D = a.shape
    per_head = partial_sums.shape[0] // H
    ones, fading = np.ones(D, np.float32), np.ones(WINDOW, np.float32)
    sequence_of = sequences_of(starts, R)
    scores = np.empty(WINDOW, np.float32)
    for item in pieces(stage, R * H):
        r, h = item // H, item % H
        sum_stretches(partial_scores, h * per_head, per_head, r, scores)
        sum_stretches(partial_sums, h * per_head, per_head, r, a[h, r])
        sequence = sequence_of[r]
        place = place_in_window(positions[r], layer_step, H, h)
        first, num_earlier = positions[r] - place, r - starts[sequence]
        add_values(scores, first, place, fading, values[sequence], num_earlier, positions[r], v, r, a[h, r])
        normalise(a[h, r], ones, eps)


@jit
def code_steps(
    thread, progress, embed, tokens, positions, turns_per_token, v, cos, sin, eps, first_step,
    like_encoder, encoder, like_encoder_v, encoder_v, like_decoder, decoder,
    states, table, starts, read_scales, write_scales, x, a, scores, partial_sums,
):  # fmt: skip
    """Runs layer steps of the model on v (R, D), in place.

    Args:
        states: (layer steps, 2, sequences), the addresses of the rows and of the values.
        table: int32 (D,), the result of :func:`bdh.ops.cpu.state_codes.rounding_table`.
        x: (H*N, R), work memory.
        a: (H, R, D), work memory.
        scores: (H * stretches per head, R, W), work memory.
        partial_sums: (H * stretches per head, R, D), work memory.

    The other arguments are those of :func:`bdh.ops.cpu.kernels.layer_steps`.
    """
    N, stage = x.shape[0] // a.shape[0], address(progress)
    if first_step == 0:
        enter(stage, embed, tokens, positions, turns_per_token, v, cos, sin, eps)
    for index in range(len(states)):
        stage += STAGES * STAGE_BYTES
        rows, values = states[index]
        project(stage, like_encoder, encoder, v, x, np.bool_(True))
        sweep(
            stage + STAGE_BYTES,
            rows,
            values,
            table,
            first_step + index,
            starts,
            positions,
            x,
            cos,
            sin,
            read_scales,
            write_scales,
            v,
            scores,
            partial_sums,
            N,
        )
        attend(stage + 2 * STAGE_BYTES, scores, partial_sums, values, first_step + index, starts, positions, v, a, eps)
        store(stage + 3 * STAGE_BYTES, values, WINDOW, starts, positions, v)
        gated_mlp(stage + 4 * STAGE_BYTES, like_encoder_v, encoder_v, like_decoder, decoder, x, a, partial_sums, N)
        residual_norm(stage + 5 * STAGE_BYTES, partial_sums, v, eps)
