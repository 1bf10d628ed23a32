"""The layer steps over states in int16: those of :mod:`bdh.ops.cpu.kernels`, with other stages where the states are read and written.

    sweep     q S of the codes, scores of a row with its window; keys enter, windows that end are merged    pairs that fire
    attend    LN(q S + the window's values, weighted by their scores)                                       every row
    store     the rows' values go into their columns

What :mod:`bdh.ops.cpu.window` says of the order of its sums holds here too. A state is, of each layer step, the rows of
:mod:`bdh.ops.cpu.state_codes`, and the values (W, D) of the last tokens, which stand at their positions modulo W. Each head of a
layer step has windows that end at positions of its own, so that no token has to merge all of them.
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
    """Of a token in a head's window."""
    return (position + layer_step * H + h) % WINDOW


@jit
def locate_values(values, v, row, position, first_end, num_windows, out):
    """The addresses of the values of windows that end, to ``out`` (windows, W): in the state, or in row ``row`` of v or a later one.

    ``position`` is that of the row, ``first_end`` the token after the first window's last, from the row on.
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
    """The sums of each stretch, ``partial_sums`` (stretches, R, D), of q S, and the scores, ``partial_scores`` (the same, R, W).

    The keys of the rows enter; what has been written in a window is merged where it ends. ``values`` (sequences,) are addresses;
    what is not named here is as of :func:`bdh.ops.cpu.kernels.attention_update`.
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
        lists, room = address(listed), listed.strides[0]  # in the loop: after its last use numba frees an array
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
    """LN of what the rows have read: ``partial_scores`` (H * stretches of a head, R, W), ``partial_sums`` (the same, R, D) to a (H, R, D)."""
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
    """Layer steps of the model over v (R, D), in place.

    Args:
        progress: and what follows to decoder, as those of :func:`bdh.ops.cpu.kernels.layer_steps`.
        states: (layer steps, 2, sequences) addresses of each one's rows and values.
        table: int32 (D,), of :func:`bdh.ops.cpu.state_codes.rounding_table`.
        x: (H*N, R), a: (H, R, D), scores: (H * stretches of a head, R, W), partial_sums: (the same, R, D): memory to work in.
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
