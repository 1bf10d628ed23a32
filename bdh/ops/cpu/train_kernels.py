"""Kernels for the neurons of a block of tokens, in training. Their cost depends on the number of neurons that fire.

Wide arrays are (N, M or more), with a row for each neuron and a column for each token of the block. M is a multiple of
the vector lanes, and columns without a token contain 0. Tokens are processed in tiles, whose rows have about
``TILE_BYTES``, so that they stay in the nearest cache while the neurons are processed.

The neurons are divided among P threads, each of which computes its ``part``. Threads never write to the same memory.
For sums over neurons, each thread has its own partial sums, in an array (P, M, D).
"""

import numpy as np

from bdh.ops.cpu.entries import (
    DOTS,
    GROUP,
    dots,
    dots_and_gather,
    gate,
    gather_and_spread,
    list_firing_1,
    list_firing_2,
    pad,
    scatter,
    spread_row,
)
from bdh.ops.cpu.pieces import jit
from bdh.ops.cpu.vector import LANES, address

TILE_BYTES = 64 * 1024

BLOCK_BYTES = 64 * 1024
"""The most bytes that the rows of a group of neurons have in one array. The rows of a group stay in the L2 cache while
all tiles are processed."""


@jit
def _whole(count, group):
    """Rounds ``count`` up to whole groups."""
    return (count + group - 1) // group * group


@jit
def _tile(M, D):
    return min(M, max(LANES, TILE_BYTES // (4 * D) // LANES * LANES))


@jit
def rotate(part, x, q, cos, sin, starts, places, first_pair, cut, counts):
    """Computes q = rope(x) for x (N, M), and counts how many elements of x fire.

    Args:
        cos, sin: (pairs, positions), the rotation tables.
        starts, places: the runs of tokens with consecutive columns in the tables. The tokens from ``starts[r]`` to
            ``starts[r + 1]`` have the columns that start at ``places[r]``.
        first_pair: the row of the tables for the first pair of x.
        cut: whether to set negative x to 0 before, in place.
        counts: (P,), set to the number of elements that fire in each part.
    """
    N, P = x.shape[0], counts.shape[0]
    zero = np.float32(0)
    fires = 0
    for i in range(part * (N // 2) // P, (part + 1) * (N // 2) // P):
        for r in range(len(places)):
            first, last = starts[r], starts[r + 1]
            C = last - first
            turn_cos = cos[first_pair + i, places[r] : places[r] + C]
            turn_sin = sin[first_pair + i, places[r] : places[r] + C]
            x_0, x_1 = x[2 * i, first:last], x[2 * i + 1, first:last]
            q_0, q_1 = q[2 * i, first:last], q[2 * i + 1, first:last]
            for c in range(C):
                a, b = x_0[c], x_1[c]
                if cut:
                    a, b = zero if a < zero else a, zero if b < zero else b  # NaN stays
                    x_0[c], x_1[c] = a, b
                q_0[c] = a * turn_cos[c] - b * turn_sin[c]
                q_1[c] = b * turn_cos[c] + a * turn_sin[c]
                fires += int(a > zero) + int(b > zero)
    counts[part] = fires


# The lists of a tile, which are rows of one array. For x that fires: the tokens, x, y and keys. For products that are
# kept: the tokens, x, y and factors.
_FIRING, _X, _Y, _KEYS, _STAYING, _X_STAYING, _Y_STAYING, _FACTORS = range(8)


@jit
def _gated(x_row, y_row, has_y, a, stride, weight_row, D, width, keys, key, threshold, lists, room):
    """Lists the tokens of a tile at which x and y fire and dropout keeps the product. Returns their number.

    All arrays are given by address. The ``lists`` are ``room`` bytes apart.
    """
    firing, xs, ys, kept_keys = lists + _FIRING * room, lists + _X * room, lists + _Y * room, lists + _KEYS * room
    if has_y:
        count = list_firing_2(x_row, width, firing, xs, keys, kept_keys, y_row, ys)
    else:
        count = list_firing_1(x_row, width, firing, xs, keys, kept_keys)
        pad(firing, ys, count)
        for index in range(0, count, DOTS):
            dots(weight_row, firing + index * 4, a, stride, D, ys + index * 4)
    if count == 0:
        return 0
    gate(ys, kept_keys, key, threshold, count)
    # Their indices in the first list are not needed any more. They overwrite the keys.
    return list_firing_2(
        ys,
        _whole(count, LANES),
        kept_keys,
        lists + _Y_STAYING * room,
        firing,
        lists + _STAYING * room,
        xs,
        lists + _X_STAYING * room,
    )


@jit
def gated_mlp(
    part, x, y, has_y, a, encoder_v, decoder,
    is_backward, grad_out, grad_encoder_v, grad_decoder, gated,
    partial_sums, neuron_keys, token_keys, threshold, scale,
):  # fmt: skip
    """Computes the sum of dropout(x * relu(Ev a)) Dec over the neurons of each part, or the gradients.

    Args:
        x: (N, M or more).
        y: (N, M or more), Ev a, if ``has_y``. Otherwise it is computed where x fires.
        a: (at most M, D).
        encoder_v, decoder: (N, D).
        is_backward: whether to compute gradients instead of the sum.
        grad_out: (at most M, D), the gradient of the sum over all neurons.
        grad_encoder_v, grad_decoder: (N, D). The gradients are added to them.
        gated: (N, M or more), set to the gradient of x as a factor of the product.
        partial_sums: (P, M, D), set to the sums of each part, or with ``is_backward`` to sums of the gradient of a.
        neuron_keys: int64 (N,), the keys of dropout for neurons.
        token_keys: int32 (M or more,), the keys of dropout for tokens.
        threshold: the threshold of dropout; 0 for no dropout.
        scale: the factor of what dropout keeps.
    """
    N, row_length = x.shape
    M = partial_sums.shape[1]
    P, stride, D = partial_sums.shape[0], partial_sums.strides[1], decoder.shape[1]
    tile = _tile(M, D)
    room = (tile + LANES) * 4
    some = max(1, BLOCK_BYTES // (4 * D))
    partial_sums[part] = 0
    memory = np.empty((8, tile + LANES), np.float32)
    lists = address(memory)
    factors, staying = lists + _FACTORS * room, lists + _STAYING * room
    end_neuron = (part + 1) * N // P
    for start in range(part * N // P, end_neuron, some):
        for first in range(0, M, tile):
            width = min(tile, M - first)
            values = address(a) + first * stride
            sums = address(partial_sums) + part * partial_sums.strides[0] + first * stride
            for n in range(start, min(end_neuron, start + some)):
                place, row = (n * row_length + first) * 4, n * D * 4
                if is_backward:
                    for index in range(first, first + width):
                        gated[n, index] = 0
                count = _gated(
                    address(x) + place,
                    address(y) + place * has_y,
                    has_y,
                    values,
                    stride,
                    address(encoder_v) + row,
                    D,
                    width,
                    address(token_keys) + first * 4,
                    neuron_keys[n],
                    threshold,
                    lists,
                    room,
                )
                if count == 0:
                    continue
                for index in range(count):
                    memory[_FACTORS, index] = memory[_X_STAYING, index] * memory[_Y_STAYING, index] * scale
                pad(staying, factors, count)
                if not is_backward:
                    for index in range(0, count, GROUP):
                        at = index * 4
                        spread_row(address(decoder) + row, factors + at, staying + at, sums, stride, D)
                    continue
                for index in range(0, count, GROUP):
                    dots_and_gather(
                        address(decoder) + row,
                        address(grad_decoder) + row,
                        factors + index * 4,
                        staying + index * 4,
                        address(grad_out) + first * stride,
                        stride,
                        D,
                        lists + _Y * room + index * 4,
                    )
                for index in range(count):
                    grad_z = memory[_Y, index] * scale
                    memory[_FACTORS, index] = grad_z * memory[_X_STAYING, index]
                    memory[_Y, index] = grad_z * memory[_Y_STAYING, index]
                scatter(lists + _Y * room, staying, count, address(gated) + place)
                pad(staying, factors, count)
                for index in range(0, count, GROUP):
                    gather_and_spread(
                        address(encoder_v) + row,
                        address(grad_encoder_v) + row,
                        factors + index * 4,
                        staying + index * 4,
                        values,
                        sums,
                        stride,
                        D,
                    )


@jit
def fire_backward(part, x, grad_q, gated, cos, sin, starts, places, v, encoder, grad_encoder, partial_sums):
    """Computes the gradients of E and v from those of q and x.

    Args:
        x: (N, M or more).
        grad_q: (G, N, C), the gradient of q.
        gated: (N, M or more), the result of :func:`gated_mlp`.
        cos, sin, starts, places: as for :func:`rotate`. Each run of tokens is within one sequence.
        v: (at most M, D).
        encoder: (N, D).
        grad_encoder: (N, D). The gradient of E is added to it.
        partial_sums: (P, M, D), set to the sums of the gradient of v over the neurons of each part.
    """
    N, row_length = x.shape
    M = partial_sums.shape[1]
    P, stride, D = partial_sums.shape[0], partial_sums.strides[1], encoder.shape[1]
    G, _, C = grad_q.shape
    tile = _tile(M, D)
    room = (tile + LANES) * 4
    some = max(1, BLOCK_BYTES // (8 * D))
    partial_sums[part] = 0
    memory = np.empty((10, tile + LANES), np.float32)
    lists, grads = address(memory), memory[8:]  # this view keeps the memory of the lists alive
    end_pair = (part + 1) * (N // 2) // P
    for start in range(part * (N // 2) // P, end_pair, some):
        run = 0  # the run of tokens in which the tile begins; np.searchsorted would take a second to compile
        for first in range(0, M, tile):
            width = min(tile, M - first)
            last = min(first + width, G * C)  # no tokens follow
            offset = first * stride
            while starts[run + 1] <= first:
                run += 1
            for i in range(start, min(end_pair, start + some)):
                r, m = run, first
                while m < last:
                    g, end, place = m // C, min(last, starts[r + 1]), places[r] + m - starts[r]
                    c = m - g * C
                    turn_cos = cos[i, place : place + end - m]
                    turn_sin = sin[i, place : place + end - m]
                    q_0, q_1 = grad_q[g, 2 * i, c : c + end - m], grad_q[g, 2 * i + 1, c : c + end - m]
                    gated_0, gated_1 = gated[2 * i, m:end], gated[2 * i + 1, m:end]
                    grad_0, grad_1 = grads[0, m - first : end - first], grads[1, m - first : end - first]
                    for j in range(end - m):
                        grad_0[j] = q_0[j] * turn_cos[j] + q_1[j] * turn_sin[j] + gated_0[j]
                        grad_1[j] = q_1[j] * turn_cos[j] - q_0[j] * turn_sin[j] + gated_1[j]
                    r, m = r + 1, end
                for side in range(2):
                    n = 2 * i + side
                    count = list_firing_1(
                        address(x) + (n * row_length + first) * 4,
                        width,
                        lists + _FIRING * room,
                        lists + _X * room,
                        address(grads) + side * room,
                        lists + _FACTORS * room,
                    )
                    if count == 0:
                        continue
                    pad(lists + _FIRING * room, lists + _FACTORS * room, count)
                    for index in range(0, count, GROUP):
                        gather_and_spread(
                            address(encoder) + n * D * 4,
                            address(grad_encoder) + n * D * 4,
                            lists + _FACTORS * room + index * 4,
                            lists + _FIRING * room + index * 4,
                            address(v) + offset,
                            address(partial_sums) + part * partial_sums.strides[0] + offset,
                            stride,
                            D,
                        )


@jit
def turn_back(part, num_parts, x, grad_q, gated, cos, sin, starts, places):
    """Replaces ``gated`` by the gradient of x before its ReLU, which :func:`fire_backward` computes internally."""
    N, C = x.shape[0], grad_q.shape[2]
    zero = np.float32(0)
    for i in range(part * (N // 2) // num_parts, (part + 1) * (N // 2) // num_parts):
        for r in range(len(places)):
            first, last = starts[r], starts[r + 1]
            g = first // C
            column = first - g * C
            turn_cos = cos[i, places[r] : places[r] + last - first]
            turn_sin = sin[i, places[r] : places[r] + last - first]
            q_0 = grad_q[g, 2 * i, column : column + last - first]
            q_1 = grad_q[g, 2 * i + 1, column : column + last - first]
            x_0, x_1 = x[2 * i, first:last], x[2 * i + 1, first:last]
            gated_0, gated_1 = gated[2 * i, first:last], gated[2 * i + 1, first:last]
            for c in range(last - first):
                grad_0 = q_0[c] * turn_cos[c] + q_1[c] * turn_sin[c] + gated_0[c]
                grad_1 = q_1[c] * turn_cos[c] - q_0[c] * turn_sin[c] + gated_1[c]
                gated_0[c] = zero if x_0[c] <= zero else grad_0
                gated_1[c] = zero if x_1[c] <= zero else grad_1
