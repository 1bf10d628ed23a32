"""States of half the size: a neuron's row is stored as 16-bit integer codes, times a step of its own.

A row is rewritten once per window of ``WINDOW`` tokens. Until the window ends, the keys that the neuron writes are kept
in the row's head, which precedes the codes. The tokens of the window read them from there, as (q . k) v. The last key
of a window is only stored while the window is merged. Its place otherwise contains the step.

When a window ends, it is merged: the row becomes the sum of the codes and of what was written in the window. The new
step is the smallest with which the row's largest magnitude fits. Each number is rounded to a whole step stochastically,
up or down so that the mean is right. The sum of many contributions far below a step is thus not lost.

The random number is the XOR of an entry of a table, by dimension, and of a number that depends on the row, the layer
step and the position where the window ends. Windows end at absolute positions. The bits of a state therefore do not
depend on how a text was divided, or on what was read in the same batch.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from bdh.ops.blocks.block import MULTIPLIERS, SHIFTS
from bdh.ops.cpu.entries import _numbers_from, append, by_blocks
from bdh.ops.cpu.pieces import jit
from bdh.ops.cpu.vector import (
    ADDRESS,
    LANES,
    NUMBER,
    _fma,
    _lanes,
    _load,
    _load_scalar,
    _spread,
    _store,
    _store_scalar,
    _vector,
    instruction,
)

WINDOW = LANES
"""The number of tokens in a window."""
WRITTEN_ARRAYS = 3  # in a list of what a pair has written: the token, and two keys
HEAD_BYTES = 4 * WINDOW
_LAST = WINDOW - 1
CODE_BYTES = 2
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LIMIT = np.float32(32_766)  # the largest code before rounding, which may add 1
_LEAST = np.float32(1e-30)  # the smallest step, so that its inverse is finite
_FRACTION = np.float32(2.0**16)  # units in a step before rounding: a code and its fraction, 16 bits each, fit an int32


def row_numbers(D: int) -> int:
    """Returns the size of a stored row in int16 numbers: its head, its codes, and padding to a multiple of 4 bytes."""
    return HEAD_BYTES // CODE_BYTES + D + D % 2


def rounding_table(D: int) -> np.ndarray:
    """Returns 16 pseudorandom bits for each dimension, int32 (D,)."""
    bits = np.arange(D, dtype=np.uint32)
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(multiplier)
    return (bits >> np.uint32(16)).astype(np.int32)


def _call(builder: Any, name: str, *arguments: Any, result: Any = None) -> Any:
    kinds = [each.type for each in arguments]
    kind = ir.FunctionType(result or kinds[0], kinds)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _code_pointer(builder: Any, address: Any, index: Any, width: int) -> Any:
    place = builder.add(address, builder.mul(index, _I64(CODE_BYTES)))
    return builder.inttoptr(place, _vector(_I16, width).as_pointer())


def _load_codes(builder: Any, address: Any, index: Any, width: int) -> Any:
    codes = builder.load(_code_pointer(builder, address, index, width))
    codes.align = CODE_BYTES
    return builder.sitofp(builder.sext(codes, _vector(_I32, width)), _vector(_F32, width))


@instruction(ADDRESS, NUMBER, result=types.float32)
def get_float(builder, address, index):
    return _load_scalar(builder, builder.add(address, builder.mul(index, _I64(4))), 0, _F32)


@instruction(ADDRESS, NUMBER, result=types.int64)
def get_int32(builder, address, index):
    return builder.sext(_load_scalar(builder, builder.add(address, builder.mul(index, _I64(4))), 0, _I32), _I64)


@instruction(NUMBER, result=types.int64)
def mixed(builder, number):
    """Returns the hash of a number, 32 pseudorandom bits."""
    bits = builder.trunc(number, _I32)
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        bits = builder.mul(builder.xor(bits, builder.lshr(bits, _I32(shift))), _I32(multiplier))
    return builder.zext(builder.xor(bits, builder.lshr(bits, _I32(SHIFTS[2]))), _I64)


def _heads(builder: Any, rows: Any, row_bytes: Any) -> list[Any]:
    """Loads the heads of a pair's two rows."""
    return [_load(builder, each, _I64(0), WINDOW) for each in (rows, builder.add(rows, row_bytes))]


def _are_written(builder: Any, heads: list[Any], count: int) -> Any:
    """Returns a mask of the window's first ``count`` tokens at which a pair has written. NaN counts as written."""
    zero = _lanes(_F32, [0.0] * WINDOW)
    is_written = builder.or_(*(builder.fcmp_unordered("!=", each, zero) for each in heads))
    return builder.and_(is_written, _lanes(ir.IntType(1), [token < count for token in range(WINDOW)]))


@instruction(ADDRESS, NUMBER, result=types.boolean)
def has_written(builder, rows, row_bytes):
    """Returns whether a pair has written in the current window."""
    is_written = _are_written(builder, _heads(builder, rows, row_bytes), _LAST)
    return _call(builder, f"llvm.vector.reduce.or.v{WINDOW}i1", is_written, result=ir.IntType(1))


@instruction(ADDRESS, NUMBER, ADDRESS, NUMBER, result=types.int64)
def list_written(builder, rows, row_bytes, lists, room):
    """Lists the tokens of a completed window at which a pair has written, with its two keys. Returns their number."""
    found = cgutils.alloca_once_value(builder, _I64(0))
    heads = _heads(builder, rows, row_bytes)
    places = [builder.add(lists, builder.mul(room, _I64(number))) for number in range(WRITTEN_ARRAYS)]
    values = [_numbers_from(builder, _I64(0)), *heads]
    append(builder, _are_written(builder, heads, WINDOW), list(zip(values, places, strict=True)), found)
    return builder.load(found)


@instruction(ADDRESS, types.float32)
def begin_window(builder, row, step):
    """Initializes a row's head for a new window: no keys, and the step."""
    head = builder.insert_element(_lanes(_F32, [0.0] * WINDOW), step, _I32(_LAST))
    _store(builder, head, row, _I64(0), WINDOW)


def _entry(builder: Any, lists: Any, room: Any, entry: Any, count: int) -> tuple[Any, list[Any]]:
    """Returns the token of a list entry, and its first ``count`` numbers."""
    place = builder.add(lists, builder.mul(entry, _I64(4)))
    token = builder.sext(_load_scalar(builder, place, 0, _I32), _I64)
    numbers = [_load_scalar(builder, builder.add(place, builder.mul(room, _I64(i + 1))), 0, _F32) for i in range(count)]
    return token, numbers


@instruction(ADDRESS, NUMBER, NUMBER, types.boolean, ADDRESS, NUMBER, NUMBER, ADDRESS)
def score(builder, rows, row_bytes, begin, ends, lists, room, count, scores):
    """Adds the products of a pair's queries and earlier keys to the scores (T, WINDOW), and stores the new keys.

    A token's score with the last token of the window is never used.

    Args:
        rows, row_bytes: the address of the pair's first row, and the size of a row.
        begin: the first token of the window.
        ends: whether the window ends with these tokens. The last token's key then replaces the step.
        lists, room, count: the listed tokens of the window, as of :mod:`bdh.ops.cpu.state_rows`.
        scores: the address of the scores of token 0.
    """
    heads, numbers = _heads(builder, rows, row_bytes), _numbers_from(builder, _I64(0))
    nothing = ir.Constant(_F32, 0.0)
    kept = [builder.select(ends, nothing, builder.extract_element(head, _I32(_LAST))) for head in heads]
    heads = [builder.insert_element(head, each, _I32(_LAST)) for head, each in zip(heads, kept, strict=True)]
    slots = [cgutils.alloca_once_value(builder, head) for head in heads]
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
        token, factors = _entry(builder, lists, room, entry, 4)
        place = builder.add(scores, builder.mul(token, _I64(HEAD_BYTES)))
        total = _load(builder, place, _I64(0), WINDOW)
        own = _spread(builder, builder.trunc(builder.sub(token, begin), _I32), WINDOW)
        is_own = builder.icmp_signed("==", numbers, own)
        for slot, query, key in zip(slots, factors[:2], factors[2:], strict=True):
            head = builder.load(slot)
            total = _fma(builder, _spread(builder, query, WINDOW), head, total)
            builder.store(builder.select(is_own, _spread(builder, key, WINDOW), head), slot)
        _store(builder, total, place, _I64(0), WINDOW)
    for row, slot in zip((rows, builder.add(rows, row_bytes)), slots, strict=True):
        _store(builder, builder.load(slot), row, _I64(0), WINDOW)


def _code_rows(builder: Any, rows: Any, row_bytes: Any) -> list[Any]:
    """Returns the addresses of the codes of a pair's two rows."""
    first = builder.add(rows, _I64(HEAD_BYTES))
    return [first, builder.add(first, row_bytes)]


def _places(builder: Any, first: Any, width: int) -> tuple[int, list[Any]]:
    """Returns the width of a block's vectors, and the index at which each begins."""
    lanes = min(width, LANES)
    return lanes, [builder.add(first, _I64(start)) for start in range(0, width, lanes)]


@instruction(ADDRESS, NUMBER, *[types.float32] * 2, ADDRESS, NUMBER, NUMBER, ADDRESS, NUMBER)
def read_codes(builder, rows, row_bytes, step_0, step_1, lists, room, count, out, length):
    """Adds what the queries of the listed tokens read from a pair's codes to the tokens' rows of ``out``."""
    steps = step_0, step_1

    def block(first: Any, width: int) -> None:
        lanes, places = _places(builder, first, width)
        held = [
            [_load_codes(builder, row, place, lanes) for place in places]
            for row in _code_rows(builder, rows, row_bytes)
        ]
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
            token, queries = _entry(builder, lists, room, entry, 2)
            factors = [
                _spread(builder, builder.fmul(query, step), lanes) for query, step in zip(queries, steps, strict=True)
            ]
            out_row = builder.add(out, builder.mul(token, builder.mul(length, _I64(4))))
            for place, *codes in zip(places, *held, strict=True):
                total = _load(builder, out_row, place, lanes)
                for factor, code in zip(factors, codes, strict=True):
                    total = _fma(builder, factor, code, total)
                _store(builder, total, out_row, place, lanes)

    by_blocks(builder, length, block)


@instruction(ADDRESS, NUMBER, *[types.float32] * 2, ADDRESS, NUMBER, NUMBER, *[ADDRESS] * 3, NUMBER)
def sum_up(builder, rows, row_bytes, step_0, step_1, lists, room, count, values, sums, largest, length):
    """Adds what a pair has written in a window to its rows.

    Args:
        step_0, step_1: the steps of the rows.
        lists, room, count: what has been written, as listed by :func:`list_written`.
        values: the address of the addresses of the window's values, int64 (WINDOW,).
        sums: where to write the sums, float32 (2, length).
        largest: where to write the largest magnitude of each row, float32 (2,).
    """
    sum_rows = [sums, builder.add(sums, builder.mul(length, _I64(4)))]
    # Magnitudes are compared as the bits without the sign. Those of NaN are larger than those of any number.
    slots = {
        width: [cgutils.alloca_once_value(builder, _lanes(_I32, [0] * width)) for _ in range(2)] for width in (LANES, 1)
    }

    def block(first: Any, width: int) -> None:
        lanes, places = _places(builder, first, width)
        held = []
        for row, step in zip(_code_rows(builder, rows, row_bytes), (step_0, step_1), strict=True):
            wide_step = _spread(builder, step, lanes)
            codes = [_load_codes(builder, row, place, lanes) for place in places]
            held.append([cgutils.alloca_once_value(builder, builder.fmul(code, wide_step)) for code in codes])
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
            token, keys = _entry(builder, lists, room, entry, 2)
            value_row = _load_scalar(builder, builder.add(values, builder.mul(token, _I64(8))), 0, _I64)
            factors = [_spread(builder, key, lanes) for key in keys]
            for place, *of_rows in zip(places, *held, strict=True):
                value = _load(builder, value_row, place, lanes)
                for factor, slot in zip(factors, of_rows, strict=True):
                    builder.store(_fma(builder, factor, value, builder.load(slot)), slot)
        for sum_row, of_row, most in zip(sum_rows, held, slots[lanes], strict=True):
            for place, slot in zip(places, of_row, strict=True):
                value = builder.load(slot)
                _store(builder, value, sum_row, place, lanes)
                bits = builder.bitcast(value, _vector(_I32, lanes))
                bits = builder.and_(bits, _lanes(_I32, [0x7FFFFFFF] * lanes))
                builder.store(_call(builder, f"llvm.smax.v{lanes}i32", bits, builder.load(most)), most)

    by_blocks(builder, length, block)
    for number, (of_vectors, of_rest) in enumerate(zip(slots[LANES], slots[1], strict=True)):
        most = _call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", builder.load(of_vectors), result=_I32)
        most = _call(builder, "llvm.smax.i32", most, builder.extract_element(builder.load(of_rest), _I32(0)))
        _store_scalar(builder, builder.bitcast(most, _F32), largest, number)


@instruction(ADDRESS, types.float32, ADDRESS, NUMBER, ADDRESS, NUMBER)
def round_row(builder, sums, inverse, table, key, row, length):
    """Rounds the numbers ``sums`` of a row to codes.

    Args:
        inverse: the inverse of the row's step, times ``_FRACTION``.
        table: the address of the table of :func:`rounding_table`.
        key: the row's random number.
        row: where to write the codes.
    """
    own = builder.and_(builder.trunc(key, _I32), _I32(0xFFFF))

    def block(first: Any, width: int) -> None:
        lanes, places = _places(builder, first, width)
        factor, wide_key = _spread(builder, inverse, lanes), _spread(builder, own, lanes)
        kind, bits_of_fraction = _vector(_I32, lanes), _lanes(_I32, [16] * lanes)
        for place in places:
            value = builder.fptosi(builder.fmul(_load(builder, sums, place, lanes), factor), kind)
            noise = builder.xor(builder.bitcast(_load(builder, table, place, lanes), kind), wide_key)
            code = builder.trunc(builder.ashr(builder.add(value, noise), bits_of_fraction), _vector(_I16, lanes))
            builder.store(code, _code_pointer(builder, row, place, lanes)).align = CODE_BYTES

    by_blocks(builder, length, block)


@jit
def merge(rows, row_bytes, step_0, step_1, lists, room, count, values, sums, table, key, D):
    """Adds what a pair has written in a window to its rows, and begins the next window. Returns the rows' new steps.

    Args:
        lists, room, count, values: as for :func:`sum_up`.
        sums: work memory for 2 * D + 2 numbers.
        key: the key of the first row, for rounding.
    """
    largest = sums + 8 * D
    sum_up(rows, row_bytes, step_0, step_1, lists, room, count, values, sums, largest, D)
    for number in range(2):
        row = rows + number * row_bytes
        step = get_float(largest, number) / _LIMIT
        if np.isfinite(step):
            step = max(step, _LEAST)
            round_row(sums + number * D * 4, _FRACTION / step, table, mixed(key + number), row + HEAD_BYTES, D)
        else:  # the row contains infinity or NaN, so everything read from it has to be NaN
            step = np.float32(np.nan)
        begin_window(row, step)
    return get_float(rows, _LAST), get_float(rows + row_bytes, _LAST)


@jit
def sweep_windows(
    rows, row_bytes, position, first_end, num_tokens, lists, room, count, values, scores, out, memory, table, key, D
):
    """Lets the listed tokens of ``num_tokens`` read from a pair and write to it, and merges the windows that end.

    Args:
        position: the position of token 0.
        first_end: the token after the end of the first window.
        values: the address of the addresses of the windows' values, int64 (windows, WINDOW).
        scores, out: the addresses of the results of token 0.
        memory: work memory for the sums, and for the lists of what has been written.
        table: the address of the table of :func:`rounding_table`.
        key: a number for the layer step, head and first row, for rounding.
    """
    written, written_room = memory + (2 * D + 2) * 4, 2 * HEAD_BYTES
    step_0, step_1 = get_float(rows, _LAST), get_float(rows + row_bytes, _LAST)
    first, end = 0, first_end
    while first < count or end <= num_tokens:
        last, ends = first, end <= num_tokens
        while last < count and get_int32(lists, last) < end:
            last += 1
        entries, listed = lists + first * 4, last - first
        if listed > 0 or ends:
            score(rows, row_bytes, end - WINDOW, ends, entries, room, listed, scores)
        if listed > 0:
            read_codes(rows, row_bytes, step_0, step_1, entries, room, listed, out, D)
        if ends:
            num_written = list_written(rows, row_bytes, written, written_room)
            if num_written > 0:
                own = mixed(position + end) + key
                step_0, step_1 = merge(
                    rows, row_bytes, step_0, step_1, written, written_room, num_written, values, memory, table, own, D
                )
            else:
                begin_window(rows, step_0)
                begin_window(rows + row_bytes, step_1)
        first, end, values = last, end + WINDOW, values + 8 * WINDOW
