"""The layer steps with attention to a window of the last tokens, which skip neurons that do not fire.

:mod:`bdh.ops.eager` computes the same in dense operations. These stages replace ``attention_update`` and
``reduce_norm`` of :mod:`bdh.ops.cpu.kernels`:

    score     q K, and then stores the row's key in its column    for pairs of neurons that fire; clears those that
                                                                  have fired at the column's previous token
    gather    LN(the values, weighted by their scores)            for every row and head
    store     stores the rows' values in their columns            for every sequence

Sums are computed over the neurons of a stretch, then over stretches, and then over the ring's columns, always in the
same order. The column of a token is determined by its position. As in the other kernels, the bits of a result therefore
do not depend on the threads, on the other rows, or on how a text was divided into calls.

Rings are passed by address. For each layer step and sequence, these are the keys (H, N, C), the marks (H, W - 1,
ceil(N / 16)), which are ``fired`` of a :class:`bdh.ops.eager.Ring`, and the values (W - 1, D).
"""

import numpy as np

from bdh.ops.cpu.kernels import (
    AHEAD,
    FLOAT32,
    STAGE_BYTES,
    STAGES,
    STRETCH_NEURONS,  # a stretch has whole bytes of marks, so that no two threads write to the same byte
    bounds_of,
    enter,
    gated_mlp,
    normalise,
    project,
    residual_norm,
    sum_stretches,
)
from bdh.ops.cpu.pieces import jit, pieces
from bdh.ops.cpu.vector import CACHE_LINE, add_scaled, address, get_byte, prefetch, put_byte, put_float


@jit
def take_in(x, row, h, N, first, end, marks, table, pair_bytes, firing):
    """Writes the pairs of a stretch that fire in a row to ``firing``, marks them, and clears old keys in its column.

    The old keys are those of pairs that do not fire now, but did when the column was last written.

    Args:
        marks: the address of the column's bits.
        table: the address of the column's element in the keys of the head's first neuron.
        pair_bytes: the size of the keys of a pair.

    Returns:
        The number of pairs that fire.
    """
    count = 0
    for octet in range(first // 16, (end + 15) // 16):
        fires = np.uint8(0)
        for i in range(8 * octet, min(8 * octet + 8, end // 2)):
            if x[h * N + 2 * i, row] > 0 or x[h * N + 2 * i + 1, row] > 0:
                fires |= np.uint8(1 << (i % 8))
                firing[count] = i
                count += 1
        left = get_byte(marks + octet) & ~fires
        put_byte(marks + octet, fires)
        if left:
            for i in range(8 * octet, min(8 * octet + 8, end // 2)):
                if left & (1 << (i % 8)):
                    put_float(table + i * pair_bytes, np.float32(0))
                    put_float(table + i * pair_bytes + pair_bytes // 2, np.float32(0))
    return count


@jit
def score(stage, keys, fired, length, starts, positions, x, cos, sin, partial_sums, N):
    """Computes the scores of the rows with the tokens in the ring, and stores the rows' keys.

    Args:
        keys, fired: (sequences,), the addresses of each sequence's keys and marks.
        length: W - 1.
        starts: (sequences + 1,): the rows of sequence s are ``starts[s]`` to ``starts[s + 1]``.
        partial_sums: (stretches, R, C), set to the scores, summed over each stretch.
    """
    num_stretches, R, C = partial_sums.shape
    row_bytes = C * 4
    pair_bytes, mark_bytes = 2 * row_bytes, (N + 15) // 16
    firing = np.empty(STRETCH_NEURONS // 2, np.int64)
    for stretch in pieces(stage, num_stretches):
        h, first, end = bounds_of(stretch, N)
        partial_sums[stretch] = 0
        for sequence in range(keys.shape[0]):
            table = keys[sequence] + h * N * row_bytes
            for row in range(starts[sequence], starts[sequence + 1]):
                column = positions[row] % length
                marks = fired[sequence] + (h * length + column) * mark_bytes
                out = address(partial_sums) + (stretch * R + row) * row_bytes
                place = table + column * 4
                count = take_in(x, row, h, N, first, end, marks, place, pair_bytes, firing)
                for index in range(count):
                    i = firing[index]
                    if index + AHEAD < count:
                        following = table + firing[index + AHEAD] * pair_bytes
                        for line in range(0, pair_bytes, CACHE_LINE):
                            prefetch(following + line)
                    x_0, x_1 = x[h * N + 2 * i, row], x[h * N + 2 * i + 1, row]
                    q_0 = x_0 * cos[i, row] - x_1 * sin[i, row]
                    q_1 = x_1 * cos[i, row] + x_0 * sin[i, row]
                    add_scaled(FLOAT32, out, table + i * pair_bytes, q_0, C)
                    add_scaled(FLOAT32, out, table + i * pair_bytes + row_bytes, q_1, C)
                    # Not before: until now, the column contained the earliest token that the row attends to.
                    put_float(place + i * pair_bytes, q_0)
                    put_float(place + i * pair_bytes + row_bytes, q_1)


@jit
def sequences_of(starts, R):
    """Returns the sequence of each of the R rows."""
    found = np.empty(R, np.int64)
    for sequence in range(len(starts) - 1):
        found[starts[sequence] : starts[sequence + 1]] = sequence
    return found


@jit
def add_values(scores, first, count, fading, values, num_earlier, position, v, r, out):
    """Adds the values of a window to ``out`` (D,), each times its score and the weight of its distance.

    Args:
        scores: ``count`` scores, for the columns of the ring that start at ``first``.
        fading: (length,), the weights by the number of tokens between a token and the row.
        values: the address of the ring's values.
        num_earlier: the number of rows of the same sequence before row r. Their values are still in v, not in the ring.
        position: the position of row r.
    """
    D, length = v.shape[1], fading.shape[0]
    for c in range(count):
        if scores[c] != 0:
            column = (first + c) % length
            between = (position - 1 - column) % length
            value = values + column * D * 4
            if between < num_earlier:
                value = address(v) + (r - 1 - between) * D * 4
            add_scaled(FLOAT32, address(out), value, scores[c] * fading[between], D)


@jit
def gather(stage, partial_sums, fading, values, starts, positions, v, a, eps):
    """Computes a (H, R, D), the LN of the window's values, weighted by their scores.

    Args:
        partial_sums: (H * stretches per head, R, C), the result of :func:`score`.
        fading: (H, W - 1), the weights of tokens by the number of tokens between them and the row.
        values: (sequences,), the addresses of each sequence's values.
    """
    H, R, D = a.shape
    C, per_head = partial_sums.shape[2], partial_sums.shape[0] // H
    ones = np.ones(D, np.float32)
    sequence_of = sequences_of(starts, R)
    scores = np.empty(C, np.float32)
    for item in pieces(stage, R * H):
        r, h = item // H, item % H
        sum_stretches(partial_sums, h * per_head, per_head, r, scores)
        a[h, r] = 0
        sequence = sequence_of[r]
        add_values(
            scores, 0, fading.shape[1], fading[h], values[sequence], r - starts[sequence], positions[r], v, r, a[h, r]
        )
        normalise(a[h, r], ones, eps)


@jit
def store(stage, values, length, starts, positions, v):
    """Stores the values of the rows in their columns, except those that later rows would overwrite."""
    D = v.shape[1]
    for sequence in pieces(stage, values.shape[0]):
        for r in range(max(starts[sequence], starts[sequence + 1] - length), starts[sequence + 1]):
            place = values[sequence] + positions[r] % length * D * 4
            for d in range(D):
                put_float(place + d * 4, v[r, d])


@jit
def window_steps(
    thread, progress, embed, tokens, positions, turns_per_token, v, cos, sin, eps, first_step,
    like_encoder, encoder, like_encoder_v, encoder_v, like_decoder, decoder,
    rings, fading, starts, x, a, scores, partial_sums,
):  # fmt: skip
    """Runs layer steps of the model on v (R, D), in place.

    Args:
        rings: (layer steps, 3, sequences), the addresses of the keys, marks and values.
        fading: (H, W - 1), as for :func:`gather`.
        x: (H*N, R), work memory.
        a: (H, R, D), work memory. It must contain 0 if W is 1.
        scores: (H * stretches per head, R, C), work memory.
        partial_sums: (H * stretches per head, R, D), work memory.

    The other arguments are those of :func:`bdh.ops.cpu.kernels.layer_steps`.
    """
    N, length, stage = x.shape[0] // a.shape[0], fading.shape[1], address(progress)
    if first_step == 0:
        enter(stage, embed, tokens, positions, turns_per_token, v, cos, sin, eps)
    for index in range(len(rings)):
        stage += STAGES * STAGE_BYTES
        project(stage, like_encoder, encoder, v, x, np.bool_(True))
        if length > 0:
            keys, marks, values = rings[index]
            score(stage + STAGE_BYTES, keys, marks, length, starts, positions, x, cos, sin, scores, N)
            gather(stage + 2 * STAGE_BYTES, scores, fading, values, starts, positions, v, a, eps)
            store(stage + 3 * STAGE_BYTES, values, length, starts, positions, v)
        gated_mlp(stage + 4 * STAGE_BYTES, like_encoder_v, encoder_v, like_decoder, decoder, x, a, partial_sums, N)
        residual_norm(stage + 5 * STAGE_BYTES, partial_sums, v, eps)
