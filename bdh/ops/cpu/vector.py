"""The innermost loops of the kernels, as vector instructions.

They are spelled out, and not left to the compiler's vectoriser, because every result has to have the same bits
wherever it is computed: alone or beside other sequences, as one token or within a prompt. So each dot product is summed
in one order: ``LANES`` partial sums, folded by halves, then what is left of a row. LLVM maps the vectors to whatever
registers the processor has.

Memory is passed by address, since the rows that fire lie scattered. Weights and states are float32, or bfloat16 kept
as uint16, which the dtype of an (empty) array ``like`` says; all arithmetic is float32.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
CACHE_LINE = 64
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))


def _vector(element: ir.Type, width: int) -> ir.Type:
    return ir.VectorType(element, width)


def _pointer(builder: Any, address: Any, element: ir.Type, index: Any, width: int) -> Any:
    """A pointer to ``width`` elements, ``index`` elements after ``address``."""
    size = builder.mul(index, _I64(element.width // 8 if isinstance(element, ir.IntType) else 4))
    return builder.inttoptr(builder.add(address, size), _vector(element, width).as_pointer())


def _load(builder: Any, address: Any, index: Any, width: int, is_half: bool = False) -> Any:
    """``width`` numbers as float32."""
    if not is_half:
        value = builder.load(_pointer(builder, address, _F32, index, width))
        value.align = 4
        return value
    halves = builder.load(_pointer(builder, address, _I16, index, width))
    halves.align = 2
    wide = builder.zext(halves, _vector(_I32, width))
    shift = ir.Constant(_vector(_I32, width), [16] * width)
    return builder.bitcast(builder.shl(wide, shift), _vector(_F32, width))


def _store(builder: Any, value: Any, address: Any, index: Any, width: int, is_half: bool = False) -> None:
    if not is_half:
        stored = builder.store(value, _pointer(builder, address, _F32, index, width))
        stored.align = 4
        return
    ints = _vector(_I32, width)

    def constant(number: int) -> ir.Constant:
        return ir.Constant(ints, [number] * width)

    bits = builder.bitcast(value, ints)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))  # to the nearest, ties to even
    halves = builder.trunc(builder.lshr(rounded, constant(16)), _vector(_I16, width))
    stored = builder.store(halves, _pointer(builder, address, _I16, index, width))
    stored.align = 2


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    )
    return builder.call(function, [a, b, c])


def _spread(builder: Any, number: Any, width: int) -> Any:
    """A vector of one number."""
    kind = _vector(number.type, width)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(
        single, ir.Constant(kind, ir.Undefined), ir.Constant(_vector(_I32, width), [0] * width)
    )


def _folded(builder: Any, value: Any) -> Any:
    """The sum of a vector's elements: halves are added until one is left."""
    width = value.type.count
    while width > 1:
        width //= 2
        nothing = ir.Constant(value.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(value, nothing, ir.Constant(_vector(_I32, width), list(range(start, start + width))))
            for start in (0, width)
        ]
        value = builder.fadd(*halves)
    return builder.extract_element(value, _I32(0))


def _by_vectors(builder: Any, length: Any, body: Callable[[Any, int], None]) -> None:
    """Calls ``body(index, width)`` to emit the loop over whole vectors, and the one over what is left."""
    whole = builder.and_(length, _I64(-LANES))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(LANES), _I64) as (index, _):
        body(index, LANES)
    with cgutils.for_range_slice(builder, whole, length, _I64(1), _I64) as (index, _):
        body(index, 1)


def _dot_products(
    builder: Any,
    weights: list[Any],
    values: list[Any],
    pairs: list[tuple[int, int]],
    length: Any,
    is_half: bool,
    also: Callable[[Any, int, list[Any]], None] | None = None,
) -> list[Any]:
    """The products of rows of weights and values at these addresses, as scalars; each row is loaded once.

    ``also(index, width, values)`` emits what else is to be done with the loaded values.
    """
    sums: dict[int, list[Any]] = {width: [] for width in (LANES, 1)}
    for width, slots in sums.items():
        zero = ir.Constant(_vector(_F32, width), [0.0] * width)
        for _ in pairs:
            slot = cgutils.alloca_once(builder, zero.type)
            builder.store(zero, slot)
            slots.append(slot)

    def body(index: Any, width: int) -> None:
        wide_weights = [_load(builder, address, index, width, is_half) for address in weights]
        wide_values = [_load(builder, address, index, width) for address in values]
        for (i, j), slot in zip(pairs, sums[width], strict=True):
            builder.store(_fma(builder, wide_weights[i], wide_values[j], builder.load(slot)), slot)
        if also is not None:
            also(index, width, wide_values)

    _by_vectors(builder, length, body)
    return [
        builder.fadd(_folded(builder, builder.load(whole)), _folded(builder, builder.load(rest)))
        for whole, rest in zip(sums[LANES], sums[1], strict=True)
    ]


def _is_half(like: Any) -> bool:
    return like.dtype == types.uint16


def _store_scalar(builder: Any, value: Any, address: Any) -> None:
    stored = builder.store(value, builder.inttoptr(address, _F32.as_pointer()))
    stored.align = 4


def _make_tile(num_weights: int, num_values: int) -> Any:
    """Products of ``num_weights`` rows of weights with ``num_values`` rows of values."""

    @intrinsic
    def tile(typingctx, like, relu, weight, weight_stride, value, value_stride, length, out, out_stride):
        """Addresses and strides in bytes; the product of weights i and values j goes to ``out + i * stride + 4 j``.

        With ``relu``, negative ones go there as 0.
        """
        half = _is_half(like)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, relu, weight, weight_stride, value, value_stride, length, out, out_stride = arguments
            weights = [builder.add(weight, builder.mul(weight_stride, _I64(i))) for i in range(num_weights)]
            values = [builder.add(value, builder.mul(value_stride, _I64(j))) for j in range(num_values)]
            pairs = [(i, j) for i in range(num_weights) for j in range(num_values)]
            zero = ir.Constant(_F32, 0.0)
            products = _dot_products(builder, weights, values, pairs, length, half)
            for (i, j), product in zip(pairs, products, strict=True):
                # Written so that NaN stays NaN, as ReLU keeps it.
                is_cut = builder.and_(relu, builder.fcmp_ordered("<", product, zero))
                kept = builder.select(is_cut, zero, product)
                place = builder.add(builder.add(out, builder.mul(out_stride, _I64(i))), _I64(4 * j))
                _store_scalar(builder, kept, place)
            return context.get_dummy_value()

        return types.void(like, types.boolean, *[types.int64] * 7), codegen

    return tile


tile_8x1 = _make_tile(8, 1)
tile_1x1 = _make_tile(1, 1)
tile_4x4 = _make_tile(4, 4)
tile_1x4 = _make_tile(1, 4)


def _make_dots(count: int) -> Any:
    @intrinsic
    def dots(typingctx, like, weights, values, length, out):
        """``count`` products of rows whose addresses stand in int64 arrays at ``weights`` and ``values``."""
        half = _is_half(like)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, weights, values, length, out = arguments

            def addresses(array: Any) -> list[Any]:
                places = [builder.inttoptr(builder.add(array, _I64(8 * i)), _I64.as_pointer()) for i in range(count)]
                return [builder.load(place) for place in places]

            pairs = [(i, i) for i in range(count)]
            products = _dot_products(builder, addresses(weights), addresses(values), pairs, length, half)
            for i, product in enumerate(products):
                _store_scalar(builder, product, builder.add(out, _I64(4 * i)))
            return context.get_dummy_value()

        return types.void(like, *[types.int64] * 4), codegen

    return dots


dots_8 = _make_dots(8)
dots_1 = _make_dots(1)


@intrinsic
def dot(typingctx, like, weight, value, length):
    """The product of a row of weights with one of values."""
    half = _is_half(like)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, weight, value, length = arguments
        return _dot_products(builder, [weight], [value], [(0, 0)], length, half)[0]

    return types.float32(like, *[types.int64] * 3), codegen


@intrinsic
def add_scaled(typingctx, like, out, row, factor, length):
    """``out += factor * row``; ``out`` is float32, ``row`` of the dtype of ``like``."""
    half = _is_half(like)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, out, row, factor, length = arguments

        def body(index: Any, width: int) -> None:
            loaded = _load(builder, row, index, width, half)
            total = _fma(builder, _spread(builder, factor, width), loaded, _load(builder, out, index, width))
            _store(builder, total, out, index, width)

        _by_vectors(builder, length, body)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def attend_and_update(typingctx, like, rows, read_0, read_1, write_0, write_1, value, out, length):
    """One sweep over the state's two rows of a pair of neurons: reads them, then adds the value to them.

    ``out += read_0 * rows[0] + read_1 * rows[1]``, then ``rows[i] += write_i * value``. The rows lie one after the other
    and have the dtype of ``like``.
    """
    half = _is_half(like)
    size = 2 if half else 4

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, first, *factors, value, out, length = arguments
        second = builder.add(first, builder.mul(length, _I64(size)))

        def body(index: Any, width: int) -> None:
            read_0, read_1, write_0, write_1 = (_spread(builder, factor, width) for factor in factors)
            row_0, row_1 = (_load(builder, row, index, width, half) for row in (first, second))
            wide_value = _load(builder, value, index, width)
            total = _fma(builder, read_0, row_0, _load(builder, out, index, width))
            _store(builder, _fma(builder, read_1, row_1, total), out, index, width)
            _store(builder, _fma(builder, write_0, wide_value, row_0), first, index, width, half)
            _store(builder, _fma(builder, write_1, wide_value, row_1), second, index, width, half)

        _by_vectors(builder, length, body)
        return context.get_dummy_value()

    signature = types.void(like, types.int64, *[types.float32] * 4, types.int64, types.int64, types.int64)
    return signature, codegen


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at an address, which need not be read."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# Single numbers, by address.


@intrinsic
def put_float(typingctx, address, value):
    """Writes a float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = builder.store(arguments[1], builder.inttoptr(arguments[0], _F32.as_pointer()))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def get_byte(typingctx, address):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _I8.as_pointer()))

    return types.uint8(types.int64), codegen


@intrinsic
def put_byte(typingctx, address, value):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint8), codegen
