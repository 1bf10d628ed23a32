"""Vector instructions over lists of tokens at which a neuron fires.

A neuron has a row of D weights, and so has its gradient; the tokens at which it fires have rows of D numbers each, at
``base + index * stride`` bytes for the int32 indices of a list. All is float32 and passed by address.

A list is worked off ``GROUP`` entries at a time, so that the neuron's row is loaded once for all of them. What is missing
in the last group is filled up by :func:`pad`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bdh.ops.blocks.block import MULTIPLIERS, SHIFTS
from bdh.ops.cpu.vector import LANES, _by_vectors, _dot_products, _fma, _load, _spread, _store, _store_scalar, _vector

GROUP = 4
DOTS = 8
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_ADDRESS = types.int64


def _rows(builder: Any, indices: Any, base: Any, stride: Any, count: int) -> list[Any]:
    """The addresses of the rows of the first ``count`` indices at an address."""
    found = []
    for number in range(count):
        place = builder.inttoptr(builder.add(indices, _I64(4 * number)), _I32.as_pointer())
        index = builder.sext(builder.load(place), _I64)
        found.append(builder.add(base, builder.mul(index, stride)))
    return found


def _scalars(builder: Any, address: Any, count: int) -> list[Any]:
    places = [builder.inttoptr(builder.add(address, _I64(4 * i)), _F32.as_pointer()) for i in range(count)]
    return [builder.load(place) for place in places]


@intrinsic
def dots(typingctx, row, indices, base, stride, length, out):
    """The products of a row with those of ``DOTS`` tokens, to ``out``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, indices, base, stride, length, out = arguments
        rows = _rows(builder, indices, base, stride, DOTS)
        products = _dot_products(builder, [row], rows, [(0, j) for j in range(DOTS)], length, False)
        for j, product in enumerate(products):
            _store_scalar(builder, product, builder.add(out, _I64(4 * j)))
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 6), codegen


@intrinsic
def spread_row(typingctx, row, factors, indices, base, stride, length):
    """Adds a row, times a factor each, to those of ``GROUP`` tokens."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, factors, indices, base, stride, length = arguments
        rows, numbers = _rows(builder, indices, base, stride, GROUP), _scalars(builder, factors, GROUP)

        def body(index: Any, width: int) -> None:
            wide = _load(builder, row, index, width)
            for place, number in zip(rows, numbers, strict=True):
                total = _fma(builder, _spread(builder, number, width), wide, _load(builder, place, index, width))
                _store(builder, total, place, index, width)

        _by_vectors(builder, length, body)
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 6), codegen


@intrinsic
def dots_and_gather(typingctx, row, gathered, factors, indices, base, stride, length, out):
    """The products of a row with those of ``GROUP`` tokens; and these, times a factor each, are added to ``gathered``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, gathered, factors, indices, base, stride, length, out = arguments
        rows, numbers = _rows(builder, indices, base, stride, GROUP), _scalars(builder, factors, GROUP)

        def gather(index: Any, width: int, values: list[Any]) -> None:
            total = _load(builder, gathered, index, width)
            for number, value in zip(numbers, values, strict=True):
                total = _fma(builder, _spread(builder, number, width), value, total)
            _store(builder, total, gathered, index, width)

        pairs = [(0, j) for j in range(GROUP)]
        products = _dot_products(builder, [row], rows, pairs, length, False, also=gather)
        for j, product in enumerate(products):
            _store_scalar(builder, product, builder.add(out, _I64(4 * j)))
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 8), codegen


@intrinsic
def gather_and_spread(typingctx, row, gathered, factors, indices, source, target, stride, length):
    """Rows of ``GROUP`` tokens of ``source``, times a factor each, are added to ``gathered``; the row, times the same
    factors, to those of ``target``.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, gathered, factors, indices, source, target, stride, length = arguments
        sources = _rows(builder, indices, source, stride, GROUP)
        targets = _rows(builder, indices, target, stride, GROUP)
        numbers = _scalars(builder, factors, GROUP)

        def body(index: Any, width: int) -> None:
            wide, total = _load(builder, row, index, width), _load(builder, gathered, index, width)
            for from_row, to_row, number in zip(sources, targets, numbers, strict=True):
                factor = _spread(builder, number, width)
                total = _fma(builder, factor, _load(builder, from_row, index, width), total)
                added = _fma(builder, factor, wide, _load(builder, to_row, index, width))
                _store(builder, added, to_row, index, width)
            _store(builder, total, gathered, index, width)

        _by_vectors(builder, length, body)
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 8), codegen


def _compressed(builder: Any, value: Any, keep: Any, address: Any) -> None:
    """Stores the elements of a vector of 32 bits that are to be kept, one after the other; a whole vector is written."""
    kind = value.type
    name = "f32" if kind.element == _F32 else "i32"
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind, keep.type, kind]),
        f"llvm.experimental.vector.compress.v{LANES}{name}",
    )
    packed = builder.call(function, [value, keep, ir.Constant(kind, ir.Undefined)])
    stored = builder.store(packed, builder.inttoptr(address, kind.as_pointer()))
    stored.align = 4


def _count(builder: Any, keep: Any) -> Any:
    bits = builder.bitcast(keep, ir.IntType(LANES))
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(bits.type, [bits.type]), f"llvm.ctpop.i{LANES}"
    )
    return builder.zext(builder.call(function, [bits]), _I64)


def _positive(builder: Any, value: Any) -> Any:
    """Where a vector is above 0, or not a number: NaN counts as firing."""
    return builder.fcmp_unordered(">", value, ir.Constant(value.type, [0.0] * LANES))


def _lanes(numbers: list[int]) -> ir.Constant:
    return ir.Constant(_vector(_I32, LANES), numbers)


def _list(builder: Any, flags: Any, count: Any, indices: Any, values: Any, others: list[tuple[Any, Any]]) -> Any:
    """Emits the listing; returns the number of tokens in the lists."""
    found = cgutils.alloca_once_value(builder, _I64(0))
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(LANES), _I64) as (index, _):
        value = _load(builder, flags, index, LANES)
        keep = _positive(builder, value)
        offset = builder.mul(builder.load(found), _I64(4))
        here = builder.add(_spread(builder, builder.trunc(index, _I32), LANES), _lanes(list(range(LANES))))
        _compressed(builder, here, keep, builder.add(indices, offset))
        _compressed(builder, value, keep, builder.add(values, offset))
        for source, target in others:
            _compressed(builder, _load(builder, source, index, LANES), keep, builder.add(target, offset))
        builder.store(builder.add(builder.load(found), _count(builder, keep)), found)
    return builder.load(found)


@intrinsic
def list_firing_1(typingctx, flags, count, indices, values, source, target):
    """Lists the tokens of ``count``, a multiple of the lanes, at which ``flags`` is above 0 or not a number.

    Their indices go to ``indices``, their flags to ``values``, and what ``source`` has for them, 32 bits each, to
    ``target``. Returns how many there are. Lists need room for a vector more than they hold.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags, count, indices, values, source, target = arguments
        return _list(builder, flags, count, indices, values, [(source, target)])

    return types.int64(*[_ADDRESS] * 6), codegen


@intrinsic
def list_firing_2(typingctx, flags, count, indices, values, source_1, target_1, source_2, target_2):
    """:func:`list_firing_1` with two sources."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags, count, indices, values, source_1, target_1, source_2, target_2 = arguments
        return _list(builder, flags, count, indices, values, [(source_1, target_1), (source_2, target_2)])

    return types.int64(*[_ADDRESS] * 8), codegen


@intrinsic
def pad(typingctx, indices, factors, count):
    """Completes the last group of a list with entries that add nothing: the first token, times 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        indices, factors, count = arguments
        first = builder.load(builder.inttoptr(indices, _I32.as_pointer()))
        for address, value in ((indices, first), (factors, ir.Constant(_F32, 0.0))):
            place = builder.inttoptr(
                builder.add(address, builder.mul(count, _I64(4))), _vector(value.type, LANES).as_pointer()
            )
            stored = builder.store(_spread(builder, value, LANES), place)
            stored.align = 4
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 3), codegen


@intrinsic
def scatter(typingctx, values, indices, count, row):
    """Writes the values of a list to the tokens' places in a row."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, indices, count, row = arguments
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (index, _):
            offset = builder.mul(index, _I64(4))
            place = builder.inttoptr(builder.add(indices, offset), _I32.as_pointer())
            target = builder.mul(builder.sext(builder.load(place), _I64), _I64(4))
            value = builder.load(builder.inttoptr(builder.add(values, offset), _F32.as_pointer()))
            _store_scalar(builder, value, builder.add(row, target))
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 4), codegen


@intrinsic
def gate(typingctx, y, keys, key, threshold, count):
    """Sets ``y`` to 0 where it is not above 0, where dropout leaves out the token, and in the vector after ``count``.

    ``keys`` are those of the tokens, ``key`` the neuron's, as in :mod:`bdh.ops.blocks.block`; with a ``threshold`` of 0
    nothing is left out.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y, keys, key, threshold, count = arguments
        zero = ir.Constant(_vector(_F32, LANES), [0.0] * LANES)
        own, least, end = (_spread(builder, builder.trunc(number, _I32), LANES) for number in (key, threshold, count))

        def mixed(bits: Any) -> Any:
            for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
                bits = builder.xor(bits, builder.lshr(bits, _lanes([shift] * LANES)))
                bits = builder.mul(bits, _lanes([multiplier] * LANES))
            return builder.xor(bits, builder.lshr(bits, _lanes([SHIFTS[2]] * LANES)))

        with cgutils.for_range_slice(builder, _I64(0), count, _I64(LANES), _I64) as (index, _):
            value = _load(builder, y, index, LANES)
            bits = builder.bitcast(_load(builder, keys, index, LANES), _vector(_I32, LANES))
            stays = builder.icmp_unsigned(">=", mixed(builder.add(bits, own)), least)
            here = builder.add(_spread(builder, builder.trunc(index, _I32), LANES), _lanes(list(range(LANES))))
            keep = builder.and_(builder.and_(_positive(builder, value), stays), builder.icmp_signed("<", here, end))
            _store(builder, builder.select(keep, value, zero), y, index, LANES)
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 5), codegen
