"""Instructions for attention: list the tokens at which a pair of neurons fires, and let them read and write a state.

The state has two rows for a pair. The pair's tokens are listed with the factors by which they read and write these
rows. An entry has the token's number, int32, and four float32 factors. They are in five consecutive arrays of ``room``
bytes each. An array must have space for one vector more than its entries.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bdh.ops.cpu.entries import _numbers_from, append, by_blocks
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
)

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
LIST_ARRAYS = 5


@instruction(*[ADDRESS] * 6, NUMBER, ADDRESS, NUMBER, result=types.int64)
def list_pair(builder, x_0, x_1, cos, sin, read, write, count, lists, room):
    """Lists those of ``count`` tokens at which a neuron of a pair fires, and returns their number.

    The factors are ``x_0`` and ``x_1`` (count,), rotated by the angles of ``cos`` and ``sin``, and multiplied by
    ``read`` for queries and by ``write`` for keys.
    """
    found = cgutils.alloca_once_value(builder, _I64(0))

    def body(index: Any, width: int) -> None:
        a, b, wide_cos, wide_sin, by_read, by_write = (
            _load(builder, each, index, width) for each in (x_0, x_1, cos, sin, read, write)
        )
        q_0 = builder.fsub(builder.fmul(a, wide_cos), builder.fmul(b, wide_sin))
        q_1 = builder.fadd(builder.fmul(b, wide_cos), builder.fmul(a, wide_sin))
        zero = ir.Constant(a.type, [0.0] * width)
        keep = builder.or_(builder.fcmp_ordered(">", a, zero), builder.fcmp_ordered(">", b, zero))
        values = [
            _numbers_from(builder, index, width),
            *(builder.fmul(q, by) for by in (by_read, by_write) for q in (q_0, q_1)),
        ]
        places = [builder.add(lists, builder.mul(room, _I64(number))) for number in range(LIST_ARRAYS)]
        append(builder, keep, list(zip(values, places, strict=True)), found)

    _by_vectors(builder, count, body)
    return builder.load(found)


def _rounded(builder: Any, value: Any) -> Any:
    """Rounds a float32 vector to the nearest bfloat16 numbers, ties to even."""
    width = value.type.count
    bits = builder.bitcast(value, _vector(_I32, width))
    odd = builder.and_(builder.lshr(bits, _lanes(_I32, [16] * width)), _lanes(_I32, [1] * width))
    bits = builder.add(bits, builder.add(odd, _lanes(_I32, [0x7FFF] * width)))
    return builder.bitcast(builder.and_(bits, _lanes(_I32, [0xFFFF0000] * width)), value.type)


@instruction(ADDRESS, ADDRESS, *[NUMBER] * 2, ADDRESS, ADDRESS, NUMBER, has_like=True)
def attend_and_update(builder, like, rows, lists, room, count, values, out, length):
    """Lets the listed tokens, in order, read the state's two rows of a pair of neurons and add their values to them.

    For each token, ``out[token] += read_0 * rows[0] + read_1 * rows[1]``, and then ``rows[i] += write_i *
    values[token]``. The rows are contiguous and have the dtype of ``like``. They are rounded to it after each token.
    """
    is_bfloat16 = like == "bfloat16"
    second = builder.add(rows, builder.mul(length, _I64(2 if is_bfloat16 else 4)))
    stride = builder.mul(length, _I64(4))

    def block(first: Any, width: int) -> None:
        """Emits the code for ``width`` numbers of each row, starting at ``first``."""
        lanes = min(width, LANES)
        places = [builder.add(first, _I64(start)) for start in range(0, width, lanes)]
        held = [
            [cgutils.alloca_once_value(builder, _load(builder, row, place, lanes, is_bfloat16)) for place in places]
            for row in (rows, second)
        ]
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
            of_entry = builder.add(lists, builder.mul(entry, _I64(4)))
            offset = builder.mul(builder.sext(_load_scalar(builder, of_entry, 0, _I32), _I64), stride)
            read_0, read_1, write_0, write_1 = (
                _spread(
                    builder, _load_scalar(builder, builder.add(of_entry, builder.mul(room, _I64(i))), 0, _F32), lanes
                )
                for i in range(1, LIST_ARRAYS)
            )
            value_row, out_row = builder.add(values, offset), builder.add(out, offset)
            for place, slot_0, slot_1 in zip(places, *held, strict=True):
                row_0, row_1 = builder.load(slot_0), builder.load(slot_1)
                value = _load(builder, value_row, place, lanes)
                total = _fma(builder, read_0, row_0, _load(builder, out_row, place, lanes))
                _store(builder, _fma(builder, read_1, row_1, total), out_row, place, lanes)
                for factor, row, slot in ((write_0, row_0, slot_0), (write_1, row_1, slot_1)):
                    updated = _fma(builder, factor, value, row)
                    builder.store(_rounded(builder, updated) if is_bfloat16 else updated, slot)
        for row, slots in zip((rows, second), held, strict=True):
            for place, slot in zip(places, slots, strict=True):
                _store(builder, builder.load(slot), row, place, lanes, is_bfloat16)

    by_blocks(builder, length, block)
