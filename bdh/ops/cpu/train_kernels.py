"""The neurons of a block of tokens, neuron by neuron, at the price of those that fire.

Wide arrays are (N, M or more): a row for each neuron, a column for each of the M tokens of a block, which is a multiple of
the vector lanes; columns that are no tokens hold 0. A neuron's tokens are taken ``TILE_BYTES`` of their rows at a time, so
that these stay in the nearest cache while all neurons pass over them.

The neurons are shared out among threads, of which each does its ``part``, so nothing is written twice but sums over neurons: of
those each thread has its own, (P, M, D).
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
"""Of the rows of neurons, in each of the arrays that have some, that stay in the second cache while all tiles pass over
them."""


@jit
def _whole(count, group):
    """``count`` rounded up to whole groups."""
    return (count + group - 1) // group * group


@jit
def _tile(M, D):
    return min(M, max(LANES, TILE_BYTES // (4 * D) // LANES * LANES))


@jit
def rotate(part, x, q, cos, sin, starts, places, first_pair, cut, counts):
    """q = rope(x) for x (N, M), of which ``cut`` cuts off what is negative before; ``counts`` (P,): how many fire.

    ``cos`` and ``sin`` are (pairs, positions), of which these pairs stand from ``first_pair`` on; the tokens from
    ``starts[r]`` to ``starts[r + 1]`` have the positions from ``places[r]`` on.
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


# The lists of a tile, rows of one array: where x fires, its tokens, x, y and keys; where the product stays, its tokens, x, y.
_FIRING, _X, _Y, _KEYS, _STAYING, _X_STAYING, _Y_STAYING, _FACTORS = range(8)


@jit
def _gated(x_row, y_row, has_y, a, stride, weight_row, D, width, keys, key, threshold, lists, room):
    """Lists the tokens of a tile at which x and y fire and dropout keeps the product; returns how many there are.

    All by address; ``lists`` are ``room`` bytes apart.
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
    # Where in the first list they stand is of no further use: it goes over the keys.
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
    """``partial_sums`` (P, M, D) = sums of dropout(x * relu(Ev a)) Dec over the neurons of each part; or gradients of it.

    Args:
        y: (N, M), Ev a, with ``has_y``; else it is computed where x fires.
        a: (M or less, D).
        encoder_v: (N, D), decoder: (N, D).
        is_backward: whether gradients are computed; ``partial_sums`` are then sums of that of a.
        grad_out: (M or less, D), that of the sum.
        grad_encoder_v, grad_decoder: (N, D), which are added to.
        gated: (N, M), set to that of x as the gate of y.
        neuron_keys: int64 (N,), token_keys: int32 (M,), threshold: of dropout; 0 for none.
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
    """the gradients that lead to x: that of E (N, D) is added to, ``partial_sums`` (P, M, D) is set to the sums of that of v.

    Args:
        grad_q: (G, N, C), gated: (N, M), as :func:`gated_mlp` gives it.
        cos, sin, starts, places: as of :func:`rotate`; each stretch lies within a sequence.
        v: (M or less, D).
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
    lists, grads = address(memory), memory[8:]  # a view, with which the lists stay in memory
    end_pair = (part + 1) * (N // 2) // P
    for start in range(part * (N // 2) // P, end_pair, some):
        run = 0  # in which the tile begins; np.searchsorted would take a second to compile
        for first in range(0, M, tile):
            width = min(tile, M - first)
            last = min(first + width, G * C)  # what follows is no token
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
    """The gradient of x before its ReLU, in place of ``gated``: what :func:`fire_backward` computes on its way."""
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
