"""The layer steps of the model, which skip neurons that do not fire.

A *row* is a token of some sequence. The rows of a sequence are consecutive and in order. The stages of a layer step are

    project            x = relu(E v)                              for every neuron and row
    attention_update   a = q S, then S += k v^T                   for pairs of neurons that fire
    reduce_norm        LN(a)
    gated_mlp          y = relu(Ev LN(a)), and Dec (x * y)        y where x fires, Dec where y also fires
    residual_norm      v = LN(v + LN(sum))

Each stage is divided into pieces (:mod:`bdh.ops.cpu.pieces`), which are stretches of neurons, or rows. Every thread
calls the function of a stage, whose first argument is the address of the stage's counters.

A sum over neurons is computed within each stretch first, and then over the stretches in order. No sum includes more
than one sequence. The bits of a result therefore do not depend on the threads, on the other rows, or on how a text was
divided into calls.

Weights and states are passed by address. They have a row of D numbers for each neuron.
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
"""For each format of weights or states, the empty array whose dtype tells the kernels the format behind an address."""

STRETCH_NEURONS = 512
"""The number of neurons in a stretch, which are summed separately before the stretches of a head are added up; even."""
BLOCK_NEURONS = 8
"""The number of neurons in a block, whose weights stay in the L1 cache while they are multiplied with all rows. It is
the number of weight rows of ``tile_8x1``."""
AHEAD = 3  # how many pairs ahead the state's rows are prefetched
LISTED = 1024  # the number of entries at which a list of firing neurons counts as full
_PROJECTED = 256  # neurons in a piece; a multiple of BLOCK_NEURONS
_TURNED = 256  # pairs in a piece
MANY_ROWS = 16
"""With at least this many rows, a neuron usually fires in several of them, so its weights are loaded once for several
rows."""
STAGE_BYTES = 8 * STAGE_WORDS
STAGES = 6
"""The number of stages for which each layer step has counters. It uses 5 here, and 6 with a window or int16 states. The
two stages before the first layer step have the same number of counters."""


@jit
def stretches_of(N):
    """Returns the number of stretches in a head."""
    return (N + STRETCH_NEURONS - 1) // STRETCH_NEURONS


@jit
def projected_pieces(num_neurons):
    """Returns the number of pieces of :func:`project`."""
    return (num_neurons + _PROJECTED - 1) // _PROJECTED


@jit
def bounds_of(stretch, N):
    """Returns the head of a stretch, its first neuron within the head, and the neuron after its last."""
    per_head = stretches_of(N)
    first = stretch % per_head * STRETCH_NEURONS
    return stretch // per_head, first, min(N, first + STRETCH_NEURONS)


@jit
def normalise(numbers, ones, eps):
    """Applies layer norm to a row (D,), in place."""
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
    """Computes the cosine and sine (N/2, R) of each pair's angle at the rows' positions.

    The angle is computed in float64, for the reason given in :mod:`bdh.ops.attention`.
    """
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
    """Computes v (R, D) = LN(embed[tokens]), the input of the first layer step."""
    ones = np.ones(v.shape[1], np.float32)
    for r in pieces(stage, v.shape[0]):
        for d in range(v.shape[1]):  # assigning the whole row would take two seconds to compile
            v[r, d] = embed[tokens[r], d]
        normalise(v[r], ones, eps)


@jit
def products_by_row(like, weights, stored_bytes, count, v, first_row, out, first, relu):
    """Multiplies a block of weight rows with the rows of v, starting at ``first_row``.

    The block has ``count`` rows, at most ``BLOCK_NEURONS``. The products are written to ``out``, starting at neuron
    ``first``.
    """
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
    """Multiplies n rows of weights, at an address, with the rows of v (R, D). ``out`` (n, R) receives the products.

    ``relu`` sets negative products to 0. Every product is summed in the same order, whatever the number of rows.
    """
    num_neurons, R = out.shape
    D = v.shape[1]
    stored_bytes = row_bytes(like, D)
    # The next block of weights is prefetched in equal shares, one with each group of 4 rows.
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
    """Writes the pairs of a stretch that fire in the rows from ``row`` to ``last`` to ``firing``; returns their number.

    If ``states`` is not 0, it is the address of rows as in :mod:`bdh.ops.cpu.state_codes`. Pairs that have written in
    the current window are then included. With ``LANES`` rows or more, all pairs are included.
    """
    count = 0
    for i in range(first // 2, end // 2):
        fires = last - row >= LANES  # nearly every pair fires in one of these rows, and listing them is fast
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
    """Lists the tokens at which pairs fire, starting with pair ``begin``, until the lists are full.

    The tokens of pair ``index`` are the entries from ``offsets[index]`` to ``offsets[index + 1]``. Returns the index
    after the last listed pair.
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
    """Computes the sum of q S over each stretch, ``partial_sums`` (stretches, R, D), and adds the rows' k v^T to S.

    Args:
        states: the address of each sequence's S, (H, N, D).
        starts: (sequences + 1,): the rows of sequence s are ``starts[s]`` to ``starts[s + 1]``.
        read_scales, write_scales: (R, H), the factors of queries and keys.
    """
    num_stretches, R, D = partial_sums.shape
    state_bytes = row_bytes(like, D)
    firing, offsets = np.empty(STRETCH_NEURONS // 2, np.int64), np.empty(STRETCH_NEURONS // 2 + 1, np.int64)
    memory = np.empty((LIST_ARRAYS, LISTED + R + LANES), np.float32)
    read, write = np.empty(R, np.float32), np.empty(R, np.float32)
    for stretch in pieces(stage, num_stretches):
        h, first, end = bounds_of(stretch, N)
        partial_sums[stretch] = 0
        lists, room = address(memory), memory.strides[0]  # in the loop, because numba frees an array after its last use
        for r in range(R):
            read[r], write[r] = read_scales[r, h], write_scales[r, h]
        for sequence in range(states.shape[0]):
            state = states[sequence] + h * N * state_bytes
            row, last = starts[sequence], starts[sequence + 1]
            values, out = address(v) + row * D * 4, address(partial_sums) + (stretch * R + row) * D * 4
            # The pairs are gathered first, so that the next ones can be prefetched while one is computed.
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
    """Sums row r of ``partial_sums`` (stretches, R, n) over ``count`` stretches, and writes the sum to ``out`` (n,)."""
    out[:] = 0
    for stretch in range(first, first + count):
        for d in range(len(out)):
            out[d] += partial_sums[stretch, r, d]


@jit
def reduce_norm(stage, partial_sums, a, eps):
    """Sums ``partial_sums`` (H * stretches per head, R, D) over each head's stretches, and writes its LN to ``a``.

    ``a`` is (H, R, D).
    """
    H, R, D = a.shape
    per_head = partial_sums.shape[0] // H
    ones = np.ones(D, np.float32)
    for item in pieces(stage, R * H):
        r, h = item // H, item % H
        sum_stretches(partial_sums, h * per_head, per_head, r, a[h, r])
        normalise(a[h, r], ones, eps)


@jit
def mlp_by_neuron(like, encoder_v, like_decoder, decoder, x, a, sums, lists, unpacked):
    """Adds Dec (x * y) of some neurons to sums (R, D). The weights of a neuron are loaded once for several tokens.

    Args:
        encoder_v, decoder: the addresses of the weights of the first neuron.
        x: (n, R), the activations of the neurons.
        a: (R, D).
        lists: (5, R + LANES), work memory.
        unpacked: (2, D), work memory.
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
    """Computes the sum of Dec (x * y) over each stretch, ``partial_sums`` (stretches, R, D).

    ``encoder_v`` (H,) contains the address of each head's Ev, and ``decoder`` is the address of Dec. Both have a row
    for each neuron.
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
    """Computes v (R, D) after the layer step, in place: LN(v + LN(the sum over all stretches))."""
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
    """Runs the two stages before the first layer step: :func:`rotations` and :func:`begin`."""
    rotations(progress, positions, turns_per_token, cos, sin)
    begin(progress + STAGE_BYTES, embed, tokens, v, eps)


@jit
def layer_steps(
    thread, progress, embed, tokens, positions, turns_per_token, v, cos, sin, eps, first_step,
    like_encoder, encoder, like_encoder_v, encoder_v, like_decoder, decoder,
    like_states, states, starts, read_scales, write_scales, x, a, partial_sums,
):  # fmt: skip
    """Runs layer steps of the model on v (R, D), in place.

    Args:
        progress: the counters of ``STAGES`` stages for each layer step, and of ``STAGES`` stages before them.
        embed, tokens, positions, turns_per_token, cos, sin, eps: the arguments of :func:`enter`, which is called if
            ``first_step`` is 0.
        encoder, encoder_v, decoder: the address of E, the addresses of the heads' Ev, and the address of Dec.
        states: (layer steps, sequences), the addresses of the sums, (H, N, D).
        starts, read_scales, write_scales: as for :func:`attention_update`.
        x: (H*N, R), work memory. It then contains the x of the last layer step.
        a: (H, R, D), work memory.
        partial_sums: (H * stretches per head, R, D), work memory.
    """
    N, stage = x.shape[0] // a.shape[0], address(progress)
    if first_step == 0:
        enter(stage, embed, tokens, positions, turns_per_token, v, cos, sin, eps)
    for index in range(len(states)):
        stage += STAGES * STAGE_BYTES
        project(stage, like_encoder, encoder, v, x, np.bool_(True))  # a literal would be compiled separately
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
    """Runs only :func:`project`."""
    project(address(progress), like, weights, v, out, relu)
