"""The layer steps of the model over rows of tokens, neuron by neuron, skipping those that do not fire.

A *row* is a token of some sequence; the rows of a sequence follow each other in order. The stages of a layer step are

    project            x = relu(E v)                              every neuron, every row
    attention_update   a = q S, then S += k v^T                   pairs of neurons that fire
    reduce_norm        LN(a)
    gated_mlp          y = relu(Ev LN(a)), and Dec (x * y)        y where x fires, Dec where y fires too
    residual_norm      v = LN(v + LN(sum))

Each is a stage (:mod:`bdh.ops.cpu.pieces`) whose pieces are stretches of neurons, or rows: its first argument is the address
of its counters, and every thread calls it. Whatever is summed over neurons is first summed within each
stretch and then over the stretches in their order, and sequences never meet in a sum; so the bits of a result depend
neither on the threads, nor on the other rows, nor on how a text was cut into calls.

Weights and states come by address, one row of D numbers for each neuron.
"""

import numpy as np

from bdh.ops.cpu.entries import DOTS, GROUP, dots, dots_of_group, list_above_0, list_products, pad, spread_list
from bdh.ops.cpu.pieces import STAGE_WORDS, jit, pieces
from bdh.ops.cpu.state_codes import has_written
from bdh.ops.cpu.state_rows import LIST_ARRAYS, attend_and_update, list_pair
from bdh.ops.cpu.vector import (
    CACHE_LINE,
    LANES,
    add_scaled,
    address,
    dot,
    dots_1,
    dots_8,
    float_rows,
    prefetch,
    prefetch_to_write,
    row_bytes,
    tile_1x1,
    tile_1x4,
    tile_4x4,
    tile_8x1,
)

FLOAT32 = np.zeros(0, np.float32)
LIKE: dict[str, np.ndarray] = {
    "float32": FLOAT32,
    "bfloat16": np.zeros(0, np.uint16),
    "int8": np.zeros(0, np.int8),
    "int4": np.zeros(0, np.uint8),
}
"""What tells the kernels, which get addresses, in which format weights or states are."""

STRETCH_NEURONS = 512
"""Neurons of a head that are summed before their sum is added to that of others; even."""
BLOCK_NEURONS = 8
"""Neurons whose weights stay in the nearest cache while all rows are multiplied with them: those of ``tile_8x1``."""
AHEAD = 3  # pairs whose rows are asked for before they are needed
LISTED = 1024  # neurons that fire, gathered before they are worked off
_PROJECTED = 256  # neurons of a piece; a multiple of BLOCK_NEURONS
_TURNED = 256  # pairs of a piece
MANY_ROWS = 16
"""From so many on a neuron mostly fires in several, so that its weights are loaded for several at once."""
STAGE_BYTES = 8 * STAGE_WORDS
STAGES = 6
"""Counters of a layer step: it has 5 stages here, and 6 with a window or states in int16. What comes before the first one has as many, for 2."""


@jit
def stretches_of(N):
    """Stretches in a head."""
    return (N + STRETCH_NEURONS - 1) // STRETCH_NEURONS


@jit
def projected_pieces(num_neurons):
    """Pieces of :func:`project`."""
    return (num_neurons + _PROJECTED - 1) // _PROJECTED


@jit
def bounds_of(stretch, N):
    """The head of a stretch, and its first neuron and the one after its last within the head."""
    per_head = stretches_of(N)
    first = stretch % per_head * STRETCH_NEURONS
    return stretch // per_head, first, min(N, first + STRETCH_NEURONS)


@jit
def normalise(numbers, ones, eps):
    """LN of a row (D,), in place."""
    D = numbers.shape[0]
    mean = dot(FLOAT32, address(numbers), address(ones), D) / np.float32(D)
    for d in range(D):
        numbers[d] -= mean
    variance = dot(FLOAT32, address(numbers), address(numbers), D) / np.float32(D)
    scale = np.float32(1) / np.sqrt(variance + np.float32(eps))
    for d in range(D):
        numbers[d] *= scale


@jit
def rotations(stage, positions, turns_per_token, cos, sin):
    """cos and sin (N/2, R) of each pair's phase at the rows' positions, exact as in ``bdh.ops.attention``."""
    num_pairs = cos.shape[0]
    for piece in pieces(stage, (num_pairs + _TURNED - 1) // _TURNED):
        for i in range(piece * _TURNED, min(num_pairs, (piece + 1) * _TURNED)):
            for r in range(positions.shape[0]):
                turns = positions[r] * turns_per_token[i]
                angle = 2 * np.pi * (turns - np.floor(turns))
                cos[i, r] = np.cos(angle)
                sin[i, r] = np.sin(angle)


@jit
def begin(stage, embed, tokens, v, eps):
    """v (R, D) = LN(embed[tokens]) before the first layer step."""
    ones = np.ones(v.shape[1], np.float32)
    for r in pieces(stage, v.shape[0]):
        for d in range(v.shape[1]):  # the assignment of a row would take two seconds to compile
            v[r, d] = embed[tokens[r], d]
        normalise(v[r], ones, eps)


@jit
def products_by_row(like, weights, stored_bytes, count, v, first_row, out, first, relu):
    """Those of up to ``BLOCK_NEURONS`` rows of weights with the rows of v from one on, into ``out`` from neuron ``first`` on."""
    R, D = v.shape
    for r in range(first_row, R):
        value = address(v) + r * D * 4
        place = address(out) + (first * R + r) * 4
        if count == BLOCK_NEURONS:
            tile_8x1(like, relu, weights, stored_bytes, value, D * 4, D, place, R * 4)
            continue
        for n in range(count):
            tile_1x1(like, relu, weights + n * stored_bytes, stored_bytes, value, D * 4, D, place + n * R * 4, R * 4)


@jit
def project(stage, like, weights, v, out, relu):
    """``out`` (n, R): the products of n rows of weights, by address, with the rows of v (R, D), cut at 0 by ``relu``.

    Each of them is multiplied with the tokens one by one in the same order, whether they are few or many.
    """
    num_neurons, R = out.shape
    D = v.shape[1]
    stored_bytes = row_bytes(like, D)
    # The next block is asked for a little at a time, with each group of rows its share.
    block_bytes = BLOCK_NEURONS * stored_bytes
    groups = max(1, R // 4)
    share = (block_bytes + groups * CACHE_LINE - 1) // (groups * CACHE_LINE) * CACHE_LINE
    scratch = np.empty((BLOCK_NEURONS, D), np.float32)
    for piece in pieces(stage, projected_pieces(num_neurons)):
        end = min(num_neurons, (piece + 1) * _PROJECTED)
        for first in range(piece * _PROJECTED, end, BLOCK_NEURONS):
            count = min(BLOCK_NEURONS, end - first)
            block = weights + first * stored_bytes
            if R < 4:
                products_by_row(like, block, stored_bytes, count, v, 0, out, first, relu)
                continue
            rows = float_rows(like, block, count, address(scratch), D)
            by_4 = count - count % 4
            for r in range(0, R - R % 4, 4):
                value = address(v) + r * D * 4
                if r * 4 % CACHE_LINE == 0:
                    for n in range(first + count, min(end, first + count + BLOCK_NEURONS)):
                        prefetch_to_write(address(out) + (n * R + r) * 4)
                for line in range(r // 4 * share, min(block_bytes, (r // 4 + 1) * share), CACHE_LINE):
                    prefetch(block + block_bytes + line)
                for n in range(0, by_4, 4):
                    place = address(out) + ((first + n) * R + r) * 4
                    tile_4x4(FLOAT32, relu, rows + n * D * 4, D * 4, value, D * 4, D, place, R * 4)
                for n in range(by_4, count):
                    place = address(out) + ((first + n) * R + r) * 4
                    tile_1x4(FLOAT32, relu, rows + n * D * 4, D * 4, value, D * 4, D, place, R * 4)
            products_by_row(FLOAT32, rows, D * 4, count, v, R - R % 4, out, first, relu)


@jit
def firing_pairs(x, h, N, first, end, row, last, states, row_bytes, firing):
    """Gathers the pairs of a stretch that fire in some rows, for ``firing``; returns how many there are.

    Where ``states`` is an address, of rows of :mod:`bdh.ops.cpu.state_codes`, also those that have written in the window.
    """
    count = 0
    for i in range(first // 2, end // 2):
        fires = last - row >= LANES  # nearly every pair does at one of them, and listing them is fast
        if not fires:
            for r in range(row, last):
                fires |= (x[h * N + 2 * i, r] > 0) | (x[h * N + 2 * i + 1, r] > 0)
        if not fires and states != 0:
            fires = has_written(states + 2 * i * row_bytes, row_bytes)
        firing[count] = i
        count += fires
    return count


@jit
def list_pairs(firing, begin, count, x, h, N, cos, sin, read, write, row, last, lists, room, offsets):
    """Lists the tokens of pairs from ``begin`` on, as many as go into the lists; returns the pair after the last.

    Those of pair ``index`` are the entries from ``offsets[index]`` to ``offsets[index + 1]``.
    """
    R = x.shape[1]
    listed, stop = 0, begin
    while stop < count and listed < LISTED:
        i, offsets[stop] = firing[stop], listed
        x_0 = address(x) + ((h * N + 2 * i) * R + row) * 4
        turn = (i * R + row) * 4
        listed += list_pair(
            x_0,
            x_0 + R * 4,
            address(cos) + turn,
            address(sin) + turn,
            address(read) + row * 4,
            address(write) + row * 4,
            last - row,
            lists + listed * 4,
            room,
        )
        stop += 1
    offsets[stop] = listed
    return stop


@jit
def attention_update(stage, like, states, starts, x, cos, sin, read_scales, write_scales, v, partial_sums, N):
    """The sums of each stretch, ``partial_sums`` (stretches, R, D), of q S; and S with the rows' keys and values added.

    ``states`` (sequences,) are addresses of (H, N, D); the rows of sequence s are ``starts[s]`` to ``starts[s + 1]``.
    ``read_scales`` and ``write_scales`` (R, H) multiply queries and keys.
    """
    num_stretches, R, D = partial_sums.shape
    state_bytes = row_bytes(like, D)
    firing, offsets = np.empty(STRETCH_NEURONS // 2, np.int64), np.empty(STRETCH_NEURONS // 2 + 1, np.int64)
    memory = np.empty((LIST_ARRAYS, LISTED + R + LANES), np.float32)
    read, write = np.empty(R, np.float32), np.empty(R, np.float32)
    for stretch in pieces(stage, num_stretches):
        h, first, end = bounds_of(stretch, N)
        partial_sums[stretch] = 0
        lists, room = address(memory), memory.strides[0]  # in the loop: after its last use numba frees an array
        for r in range(R):
            read[r], write[r] = read_scales[r, h], write_scales[r, h]
        for sequence in range(states.shape[0]):
            state = states[sequence] + h * N * state_bytes
            row, last = starts[sequence], starts[sequence + 1]
            values, out = address(v) + row * D * 4, address(partial_sums) + (stretch * R + row) * D * 4
            # Gathered first: the neurons that come next can be asked for while a pair is worked on.
            count = firing_pairs(x, h, N, first, end, row, last, 0, 0, firing)
            begin = 0
            while begin < count:
                stop = list_pairs(firing, begin, count, x, h, N, cos, sin, read, write, row, last, lists, room, offsets)
                for index in range(begin, stop):
                    if index + AHEAD < count:
                        following = state + 2 * firing[index + AHEAD] * state_bytes
                        for line in range(0, 2 * state_bytes, CACHE_LINE):
                            prefetch(following + line)
                    attend_and_update(
                        like,
                        state + 2 * firing[index] * state_bytes,
                        lists + offsets[index] * 4,
                        room,
                        offsets[index + 1] - offsets[index],
                        values,
                        out,
                        D,
                    )
                begin = stop


@jit
def sum_stretches(partial_sums, first, count, r, out):
    """The sum of a row over stretches, ``partial_sums`` (stretches, R, numbers), to ``out`` (numbers,)."""
    out[:] = 0
    for stretch in range(first, first + count):
        for d in range(len(out)):
            out[d] += partial_sums[stretch, r, d]


@jit
def reduce_norm(stage, partial_sums, a, eps):
    """LN of the sums over each head's stretches: ``partial_sums`` (H * stretches of a head, R, D) to a (H, R, D)."""
    H, R, D = a.shape
    per_head = partial_sums.shape[0] // H
    ones = np.ones(D, np.float32)
    for item in pieces(stage, R * H):
        r, h = item // H, item % H
        sum_stretches(partial_sums, h * per_head, per_head, r, a[h, r])
        normalise(a[h, r], ones, eps)


@jit
def mlp_by_neuron(like, encoder_v, like_decoder, decoder, x, a, sums, lists, unpacked):
    """Adds Dec (x * y) of some neurons to sums (R, D): the row of a neuron is loaded for several of its tokens at once.

    Args:
        encoder_v, decoder: the addresses of the neurons' first rows.
        x: (n, R), a: (R, D).
        lists: (5, R + LANES), unpacked: (2, D): memory to work in.
    """
    R, D = a.shape
    stored_bytes, decoder_bytes = row_bytes(like, D), row_bytes(like_decoder, D)
    firing, room = address(lists), lists.strides[0]
    values, y, kept, factors = firing + room, firing + 2 * room, firing + 3 * room, firing + 4 * room
    for n in range(x.shape[0]):
        count = list_above_0(address(x) + n * R * 4, R, firing, values)
        if count == 0:
            continue
        for line in range(0, stored_bytes, CACHE_LINE):
            prefetch(encoder_v + (n + 1) * stored_bytes + line)
        row = float_rows(like, encoder_v + n * stored_bytes, 1, address(unpacked), D)
        pad(firing, factors, count)
        index = 0
        while index < count:
            if count - index > GROUP:
                dots(row, firing + index * 4, address(a), D * 4, D, y + index * 4)
                index += DOTS
            else:
                dots_of_group(row, firing + index * 4, address(a), D * 4, D, y + index * 4)
                index += GROUP
        count = list_products(y, values, firing, count, kept, factors)
        if count > 0:
            row = float_rows(like_decoder, decoder + n * decoder_bytes, 1, address(unpacked) + D * 4, D)
            spread_list(row, kept, factors, count, address(sums), D)


@jit
def gated_mlp(stage, like, encoder_v, like_decoder, decoder, x, a, partial_sums, N):
    """The sums of each stretch, ``partial_sums`` (stretches, R, D), of Dec (x * y).

    ``encoder_v`` (H,) are the addresses of Ev, neuron by neuron, one for each head, and ``decoder`` is that of Dec.
    """
    num_stretches, R, D = partial_sums.shape
    stored_bytes, decoder_bytes = row_bytes(like, D), row_bytes(like_decoder, D)
    neurons, rows = np.empty(LISTED + R, np.int64), np.empty(LISTED + R, np.int64)
    weights, values = np.empty(LISTED + R, np.int64), np.empty(LISTED + R, np.int64)
    y = np.empty(LISTED + R, np.float32)
    lists, unpacked = np.empty((5, R + LANES), np.float32), np.empty((2, D), np.float32)
    for stretch in pieces(stage, num_stretches):
        h, first, end = bounds_of(stretch, N)
        partial_sums[stretch] = 0
        if R >= MANY_ROWS:
            mlp_by_neuron(
                like,
                encoder_v[h] + first * stored_bytes,
                like_decoder,
                decoder + (h * N + first) * decoder_bytes,
                x[h * N + first : h * N + end],
                a[h],
                partial_sums[stretch],
                lists,
                unpacked,
            )
            continue
        n = first
        while n < end:
            count = 0
            while n < end and count < LISTED:
                for r in range(R):
                    neurons[count], rows[count] = n, r
                    weights[count] = encoder_v[h] + n * stored_bytes
                    values[count] = address(a) + (h * R + r) * D * 4
                    count += x[h * N + n, r] > 0
                n += 1
            whole = count - count % 8
            for index in range(0, whole, 8):
                for ahead in range(index + 8, min(index + 16, count)):
                    if weights[ahead] != weights[ahead - 1]:
                        for line in range(0, stored_bytes, CACHE_LINE):
                            prefetch(weights[ahead] + line)
                dots_8(
                    like,
                    address(weights) + index * 8,
                    address(values) + index * 8,
                    D,
                    address(y) + index * 4,
                )
            for index in range(whole, count):
                dots_1(
                    like,
                    address(weights) + index * 8,
                    address(values) + index * 8,
                    D,
                    address(y) + index * 4,
                )
            for index in range(count):
                if y[index] > 0:
                    n_fired, r = h * N + neurons[index], rows[index]
                    if index + 8 < count and y[index + 8] > 0:
                        following = decoder + (h * N + neurons[index + 8]) * decoder_bytes
                        for line in range(0, decoder_bytes, CACHE_LINE):
                            prefetch(following + line)
                    add_scaled(
                        like_decoder,
                        address(partial_sums) + (stretch * R + r) * D * 4,
                        decoder + n_fired * decoder_bytes,
                        x[n_fired, r] * y[index],
                        D,
                    )


@jit
def residual_norm(stage, partial_sums, v, eps):
    """v (R, D) after the layer step, in place: LN(v + LN(the sum over all stretches))."""
    R, D = v.shape
    ones = np.ones(D, np.float32)
    total = np.empty(D, np.float32)
    for r in pieces(stage, R):
        sum_stretches(partial_sums, 0, partial_sums.shape[0], r, total)
        normalise(total, ones, eps)
        for d in range(D):
            v[r, d] += total[d]
        normalise(v[r], ones, eps)


@jit
def enter(progress, embed, tokens, positions, turns_per_token, v, cos, sin, eps):
    """What comes before the first layer step: two stages."""
    rotations(progress, positions, turns_per_token, cos, sin)
    begin(progress + STAGE_BYTES, embed, tokens, v, eps)


@jit
def layer_steps(
    thread, progress, embed, tokens, positions, turns_per_token, v, cos, sin, eps, first_step,
    like_encoder, encoder, like_encoder_v, encoder_v, like_decoder, decoder,
    like_states, states, starts, read_scales, write_scales, x, a, partial_sums,
):  # fmt: skip
    """Layer steps of the model over v (R, D), in place.

    Args:
        progress: of ``STAGES`` for each layer step and once more.
        embed: and what follows to eps, as of :func:`enter`, which is called where first_step is 0.
        encoder, encoder_v, decoder: the addresses of E, of the heads of Ev and of Dec.
        states: (layer steps, sequences) addresses of each one's sums, (H, N, D).
        x: (H*N, R), a: (H, R, D), partial_sums: (H * stretches of a head, R, D): memory to work in.
    """
    N, stage = x.shape[0] // a.shape[0], address(progress)
    if first_step == 0:
        enter(stage, embed, tokens, positions, turns_per_token, v, cos, sin, eps)
    for index in range(len(states)):
        stage += STAGES * STAGE_BYTES
        project(stage, like_encoder, encoder, v, x, np.bool_(True))  # for a literal it would be compiled apart
        attention_update(
            stage + STAGE_BYTES,
            like_states,
            states[index],
            starts,
            x,
            cos,
            sin,
            read_scales,
            write_scales,
            v,
            partial_sums,
            N,
        )
        reduce_norm(stage + 2 * STAGE_BYTES, partial_sums, a, eps)
        gated_mlp(stage + 3 * STAGE_BYTES, like_encoder_v, encoder_v, like_decoder, decoder, x, a, partial_sums, N)
        residual_norm(stage + 4 * STAGE_BYTES, partial_sums, v, eps)


@jit
def products(thread, progress, like, weights, v, out, relu):
    """:func:`project` alone."""
    project(address(progress), like, weights, v, out, relu)
