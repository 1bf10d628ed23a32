"""States of half the size: a neuron's row is whole numbers of 16 bits, its codes, times a step of its own.

After each token a row is rounded to whole steps at random, up or down so that the mean is right: what many tokens add in
amounts far below a step is not lost. The random number follows from the token's position and the dimension (a table of
32 bits for each, made once a call) and from the layer step and the row (one number, which is added to the table's): so the
bits of a state do not depend on how a text was cut, nor on what was read beside it.

``scales`` has two float32 for each row: its step, 0 while it is empty, and a bound of its largest magnitude. The bound grows with
each token by what that may add. Where it would leave the range, before that token, the largest magnitude is looked up, and the
step doubled until it fills half of the range at most.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from bdh.ops.blocks.block import MULTIPLIERS, SHIFTS
from bdh.ops.cpu.entries import by_blocks
from bdh.ops.cpu.pieces import jit
from bdh.ops.cpu.vector import (
    ADDRESS,
    LANES,
    NUMBER,
    _by_vectors,
    _fma,
    _lanes,
    _load,
    _load_scalar,
    _spread,
    _store,
    _vector,
    instruction,
    put_float,
)

CODE_BYTES, SCALE_BYTES = 2, 8
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LIMIT, _HALF = np.float32(32_700), np.float32(16_384)  # codes; what the limit leaves is for the bound's own rounding
_LEAST = np.float32(1e-30)  # of a step that is chosen, so that there is its inverse
_VANISHED = np.float32(2.0**-32)  # of steps: in the larger one all codes of the smaller one are 0


def noise_of(positions: np.ndarray, D: int) -> np.ndarray:
    """What rounds the rows at these positions: int32 (R, D)."""
    bits = (positions[:, None] * D + np.arange(D)).astype(np.uint32)
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(multiplier)
    return (bits ^ (bits >> np.uint32(SHIFTS[2]))).view(np.int32)


def _call(builder: Any, name: str, *arguments: Any, result: Any = None) -> Any:
    kinds = [each.type for each in arguments]
    kind = ir.FunctionType(result or kinds[0], kinds)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _load_codes(builder: Any, address: Any, index: Any, width: int) -> Any:
    place = builder.add(address, builder.mul(index, _I64(CODE_BYTES)))
    codes = builder.load(builder.inttoptr(place, _vector(_I16, width).as_pointer()))
    codes.align = CODE_BYTES
    return builder.sitofp(builder.sext(codes, _vector(_I32, width)), _vector(_F32, width))


def _store_codes(builder: Any, value: Any, address: Any, index: Any, width: int) -> None:
    place = builder.add(address, builder.mul(index, _I64(CODE_BYTES)))
    wide = _vector(_I32, width)
    whole = _call(builder, f"llvm.fptosi.sat.v{width}i32.v{width}f32", value, result=wide)  # of NaN it makes 0
    codes = builder.trunc(whole, _vector(_I16, width))
    builder.store(codes, builder.inttoptr(place, codes.type.as_pointer())).align = CODE_BYTES


def _whole(builder: Any, value: Any) -> Any:
    """The nearest whole numbers."""
    return _call(builder, f"llvm.rint.v{value.type.count}f32", value)


@instruction(ADDRESS, NUMBER, result=types.float32)
def get_float(builder, address, index):
    return _load_scalar(builder, builder.add(address, builder.mul(index, _I64(4))), 0, _F32)


@instruction(ADDRESS, NUMBER, result=types.int64)
def get_int32(builder, address, index):
    return builder.sext(_load_scalar(builder, builder.add(address, builder.mul(index, _I64(4))), 0, _I32), _I64)


@instruction(NUMBER, result=types.int64)
def mixed(builder, number):
    """32 bits that look like chance."""
    bits = builder.trunc(number, _I32)
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        bits = builder.mul(builder.xor(bits, builder.lshr(bits, _I32(shift))), _I32(multiplier))
    return builder.zext(builder.xor(bits, builder.lshr(bits, _I32(SHIFTS[2]))), _I64)


def _make_largest(load: Any) -> Any:
    @instruction(ADDRESS, NUMBER, result=types.float32)
    def largest(builder, address, length):
        """The largest magnitude of a row; NaN where it has one."""
        slots = {width: cgutils.alloca_once_value(builder, _lanes(_F32, [0.0] * width)) for width in (LANES, 1)}

        def body(index: Any, width: int) -> None:
            value = _call(builder, f"llvm.fabs.v{width}f32", load(builder, address, index, width))
            most = _call(builder, f"llvm.maximum.v{width}f32", value, builder.load(slots[width]))
            builder.store(most, slots[width])

        _by_vectors(builder, length, body)
        of_rest = builder.extract_element(builder.load(slots[1]), _I32(0))
        most = _call(builder, f"llvm.vector.reduce.fmaximum.v{LANES}f32", builder.load(slots[LANES]), result=_F32)
        return _call(builder, "llvm.maximum.f32", most, of_rest)

    return largest


largest_number, largest_code = _make_largest(_load), _make_largest(_load_codes)


@instruction(ADDRESS, types.float32, NUMBER)
def multiply_codes(builder, row, factor, length):
    """Codes times a factor, rounded to the nearest."""

    def body(index: Any, width: int) -> None:
        value = builder.fmul(_load_codes(builder, row, index, width), _spread(builder, factor, width))
        _store_codes(builder, _whole(builder, value), row, index, width)

    _by_vectors(builder, length, body)


@instruction(*[ADDRESS] * 2, *[types.float32] * 4, NUMBER, NUMBER, ADDRESS, NUMBER, NUMBER, *[ADDRESS] * 2, NUMBER)
def attend_and_update_codes(
    builder, rows, noise, read_0, read_1, write_0, write_1, key_0, key_1, lists, room, count, values, out, length
):
    """:func:`bdh.ops.cpu.state_rows.attend_and_update` for a pair's rows of codes.

    The factors of the list are multiplied with these: to read, the rows' steps, and to write, one by them. ``noise`` is the
    table (tokens, length) of int32, to which the rows' keys are added.
    """
    second = builder.add(rows, builder.mul(length, _I64(CODE_BYTES)))
    stride = builder.mul(length, _I64(4))
    keys = [builder.trunc(key, _I32) for key in (key_0, key_1)]

    def block(first: Any, width: int) -> None:
        lanes = min(width, LANES)
        places = [builder.add(first, _I64(start)) for start in range(0, width, lanes)]
        held = [
            [cgutils.alloca_once_value(builder, _load_codes(builder, row, place, lanes)) for place in places]
            for row in (rows, second)
        ]
        wide_keys = [_spread(builder, key, lanes) for key in keys]
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
            of_entry = builder.add(lists, builder.mul(entry, _I64(4)))
            offset = builder.mul(builder.sext(_load_scalar(builder, of_entry, 0, _I32), _I64), stride)
            numbers = [
                _load_scalar(builder, builder.add(of_entry, builder.mul(room, _I64(i))), 0, _F32) for i in range(1, 5)
            ]
            factors = [
                _spread(builder, builder.fmul(number, by), lanes)
                for number, by in zip(numbers, (read_0, read_1, write_0, write_1), strict=True)
            ]
            value_row, out_row, noise_row = (builder.add(each, offset) for each in (values, out, noise))
            for place, *slots in zip(places, *held, strict=True):
                codes = [builder.load(slot) for slot in slots]
                value = _load(builder, value_row, place, lanes)
                bits = builder.bitcast(_load(builder, noise_row, place, lanes), _vector(_I32, lanes))
                total = _fma(builder, factors[0], codes[0], _load(builder, out_row, place, lanes))
                _store(builder, _fma(builder, factors[1], codes[1], total), out_row, place, lanes)
                for code, slot, factor, key in zip(codes, slots, factors[2:], wide_keys, strict=True):
                    # Within half a step of 0, evenly.
                    noisy = builder.fmul(
                        builder.sitofp(builder.add(bits, key), value.type), _lanes(_F32, [2.0**-32] * lanes)
                    )
                    builder.store(builder.fadd(code, _whole(builder, _fma(builder, factor, value, noisy))), slot)
        for row, slots in zip((rows, second), held, strict=True):
            for place, slot in zip(places, slots, strict=True):
                _store_codes(builder, builder.load(slot), row, place, lanes)

    by_blocks(builder, length, block)


@jit
def power_of_two_from(number):
    """The least one that is not below a number above 0."""
    fraction, exponent = math.frexp(number)
    return np.float32(math.ldexp(1.0, exponent - (fraction == 0.5)))


@jit
def inverse(step):
    """Of a step; 0 of one that is no longer used: a row that fits with it is empty, or has faded to nothing."""
    return np.float32(0) if step < _LEAST else np.float32(1) / step


@jit
def make_room(row, scales, added, D):
    """Doubles a row's step until it fills half of the range at most with what a token may add."""
    step = get_float(scales, 0)
    most = largest_code(row, D) * step
    wanted = (most + added) / _HALF
    if not np.isfinite(wanted):  # a state that is not of numbers: what reads it is not either
        new = np.float32(np.nan)
    elif step < _LEAST or step < wanted * _VANISHED:
        new = power_of_two_from(max(wanted, _LEAST))
    else:
        new = step * power_of_two_from(max(wanted / step, np.float32(1)))
    if new != step:
        multiply_codes(row, step / new, D)
        most = largest_code(row, D) * new
    put_float(scales, new)
    put_float(scales + 4, most)


@jit
def attend_to_codes(rows, scales, noise, key, lists, room, count, values, maxima, out, D):
    """What the tokens of a list do to a pair's rows.

    Args:
        scales: the address of the pair's.
        key: of the first row.
        maxima: the address of the largest magnitude of each token's values.
    """
    first = 0
    while first < count:
        last, is_short = first, False
        step_0, step_1 = get_float(scales, 0), get_float(scales, 2)
        bound_0, bound_1 = get_float(scales, 1), get_float(scales, 3)
        while last < count and not is_short:
            most = get_float(maxima, get_int32(lists, last))
            added_0 = abs(get_float(lists + 3 * room, last)) * most
            added_1 = abs(get_float(lists + 4 * room, last)) * most
            new_0, new_1 = bound_0 + added_0 + step_0, bound_1 + added_1 + step_1
            fits_0, fits_1 = new_0 <= _LIMIT * step_0, new_1 <= _LIMIT * step_1
            is_short = not (fits_0 and fits_1)
            if not is_short:
                bound_0, bound_1 = new_0, new_1
                last += 1
        read_0, read_1, entries = step_0, step_1, lists + first * 4
        if last == first:  # the token reads the rows as they are before there is room for what it adds
            nothing = np.float32(0)
            attend_and_update_codes(
                rows, noise, read_0, read_1, nothing, nothing, 0, 0, entries, room, 1, values, out, D
            )
            read_0 = read_1 = nothing
            if not fits_0:
                make_room(rows, scales, added_0, D)
            if not fits_1:
                make_room(rows + D * CODE_BYTES, scales + SCALE_BYTES, added_1, D)
            step_0, step_1 = get_float(scales, 0), get_float(scales, 2)
            bound_0, bound_1 = get_float(scales, 1) + added_0 + step_0, get_float(scales, 3) + added_1 + step_1
            last = first + 1
        attend_and_update_codes(
            rows,
            noise,
            read_0,
            read_1,
            inverse(step_0),
            inverse(step_1),
            mixed(key),
            mixed(key + 1),
            entries,
            room,
            last - first,
            values,
            out,
            D,
        )
        put_float(scales + 4, bound_0)
        put_float(scales + 12, bound_1)
        first = last
