"""The innermost loops of the kernels, as vector instructions.

They are spelled out, and not left to the compiler's vectoriser, because every result has to have the same bits
wherever it is computed: alone or beside other sequences, as one token or within a prompt. So each dot product is summed
in one order: ``LANES`` partial sums, folded by halves, then what is left of a row. LLVM maps the vectors to whatever
registers the processor has.

Memory is passed by address, since the rows that fire lie scattered. Weights and states are float32, or bfloat16 kept
as uint16, which the dtype of an (empty) array ``like`` says; all arithmetic is float32.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16
CACHE_LINE = 64
ADDRESS = NUMBER = types.int64
_IS_BFLOAT16 = {types.float32: False, types.uint16: True}
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))


def instruction(
    *parameters: Any, result: Any = types.void, has_like: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Makes an intrinsic of a function that emits it, from the builder and an argument of each of these types.

    Args:
        has_like: the intrinsic's first argument is an array ``like``, of which the function gets whether it is of bfloat16.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typingctx: Any, *found: Any) -> tuple[Any, Callable[..., Any]]:
            if has_like and found[0].dtype not in _IS_BFLOAT16:
                raise TypingError(f"rows of {found[0].dtype}: they must be float32, or bfloat16 kept as uint16")

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                if has_like:
                    arguments = [_IS_BFLOAT16[found[0].dtype], *arguments[1:]]
                value = emit(builder, *arguments)
                return context.get_dummy_value() if value is None else value

            return result(*found[:has_like], *parameters), codegen

        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        names = [inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        names += list(inspect.signature(emit).parameters.values())[1:]
        typed.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]  # numba counts the arguments by it
        return intrinsic(typed)

    return decorate


def _vector(element: ir.Type, width: int) -> ir.Type:
    return ir.VectorType(element, width)


def _lanes(element: ir.Type, numbers: list[Any]) -> ir.Constant:
    return ir.Constant(_vector(element, len(numbers)), numbers)


def _load(builder: Any, address: Any, index: Any, width: int, is_bfloat16: bool = False) -> Any:
    """``width`` numbers as float32, ``index`` numbers after an address."""
    size, element = (2, _I16) if is_bfloat16 else (4, _F32)
    place = builder.add(address, builder.mul(index, _I64(size)))
    value = builder.load(builder.inttoptr(place, _vector(element, width).as_pointer()))
    value.align = size
    if not is_bfloat16:
        return value
    bits = builder.shl(builder.zext(value, _vector(_I32, width)), _lanes(_I32, [16] * width))
    return builder.bitcast(bits, _vector(_F32, width))


def _store(builder: Any, value: Any, address: Any, index: Any, width: int, is_bfloat16: bool = False) -> None:
    size = 2 if is_bfloat16 else 4
    if is_bfloat16:
        bits = builder.bitcast(value, _vector(_I32, width))
        odd = builder.and_(builder.lshr(bits, _lanes(_I32, [16] * width)), _lanes(_I32, [1] * width))
        rounded = builder.add(bits, builder.add(odd, _lanes(_I32, [0x7FFF] * width)))  # to the nearest, ties to even
        value = builder.trunc(builder.lshr(rounded, _lanes(_I32, [16] * width)), _vector(_I16, width))
    place = builder.add(address, builder.mul(index, _I64(size)))
    builder.store(value, builder.inttoptr(place, value.type.as_pointer())).align = size


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    )
    return builder.call(function, [a, b, c])


def _spread(builder: Any, number: Any, width: int) -> Any:
    """A vector of one number."""
    kind = _vector(number.type, width)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), _lanes(_I32, [0] * width))


def _folded(builder: Any, value: Any) -> Any:
    """The sum of a vector's elements: halves are added until one is left."""
    width = value.type.count
    while width > 1:
        width //= 2
        nothing = ir.Constant(value.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(value, nothing, _lanes(_I32, list(range(start, start + width))))
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
    is_bfloat16: bool,
    also: Callable[[Any, int, list[Any]], None] | None = None,
) -> list[Any]:
    """The products of rows of weights and values at these addresses, as scalars; each row is loaded once.

    ``also(index, width, values)`` emits what else is to be done with the loaded values.
    """
    sums: dict[int, list[Any]] = {width: [] for width in (LANES, 1)}
    for width, slots in sums.items():
        for _ in pairs:
            slots.append(cgutils.alloca_once_value(builder, _lanes(_F32, [0.0] * width)))

    def body(index: Any, width: int) -> None:
        wide_weights = [_load(builder, address, index, width, is_bfloat16) for address in weights]
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


def _load_scalar(builder: Any, address: Any, number: int, kind: ir.Type) -> Any:
    """A number of an array."""
    place = builder.add(address, _I64(number * (8 if kind == _I64 else 4)))
    return builder.load(builder.inttoptr(place, kind.as_pointer()))


def _store_scalar(builder: Any, value: Any, address: Any, number: int = 0) -> None:
    place = builder.add(address, _I64(4 * number)) if number else address
    builder.store(value, builder.inttoptr(place, _F32.as_pointer())).align = 4


def _make_tile(num_weights: int, num_values: int) -> Any:
    """Products of ``num_weights`` rows of weights with ``num_values`` rows of values."""

    @instruction(types.boolean, *[NUMBER] * 7, has_like=True)
    def tile(builder, like, relu, weight, weight_stride, value, value_stride, length, out, out_stride):
        """Addresses and strides in bytes; the product of weights i and values j goes to ``out + i * stride + 4 j``.

        With ``relu``, negative ones go there as 0.
        """
        weights = [builder.add(weight, builder.mul(weight_stride, _I64(i))) for i in range(num_weights)]
        values = [builder.add(value, builder.mul(value_stride, _I64(j))) for j in range(num_values)]
        pairs = [(i, j) for i in range(num_weights) for j in range(num_values)]
        zero = ir.Constant(_F32, 0.0)
        products = _dot_products(builder, weights, values, pairs, length, like)
        for (i, j), product in zip(pairs, products, strict=True):
            # Written so that NaN stays NaN, as ReLU keeps it.
            is_cut = builder.and_(relu, builder.fcmp_ordered("<", product, zero))
            row = builder.add(out, builder.mul(out_stride, _I64(i)))
            _store_scalar(builder, builder.select(is_cut, zero, product), row, j)

    return tile


tile_8x1 = _make_tile(8, 1)
tile_1x1 = _make_tile(1, 1)
tile_4x4 = _make_tile(4, 4)
tile_1x4 = _make_tile(1, 4)


def _make_dots(count: int) -> Any:
    @instruction(*[NUMBER] * 4, has_like=True)
    def dots(builder, like, weights, values, length, out):
        """``count`` products of rows whose addresses stand in int64 arrays at ``weights`` and ``values``."""
        weights, values = ([_load_scalar(builder, each, i, _I64) for i in range(count)] for each in (weights, values))
        products = _dot_products(builder, weights, values, [(i, i) for i in range(count)], length, like)
        for i, product in enumerate(products):
            _store_scalar(builder, product, out, i)

    return dots


dots_8 = _make_dots(8)
dots_1 = _make_dots(1)


@instruction(*[NUMBER] * 3, has_like=True, result=types.float32)
def dot(builder, like, weight, value, length):
    """The product of a row of weights with one of values."""
    return _dot_products(builder, [weight], [value], [(0, 0)], length, like)[0]


@instruction(ADDRESS, ADDRESS, types.float32, NUMBER, has_like=True)
def add_scaled(builder, like, out, row, factor, length):
    """``out += factor * row``; ``out`` is float32, ``row`` of the dtype of ``like``."""

    def body(index: Any, width: int) -> None:
        loaded = _load(builder, row, index, width, like)
        total = _fma(builder, _spread(builder, factor, width), loaded, _load(builder, out, index, width))
        _store(builder, total, out, index, width)

    _by_vectors(builder, length, body)


@instruction(ADDRESS, *[types.float32] * 4, ADDRESS, ADDRESS, NUMBER, has_like=True)
def attend_and_update(builder, like, rows, read_0, read_1, write_0, write_1, value, out, length):
    """One sweep over the state's two rows of a pair of neurons: reads them, then adds the value to them.

    ``out += read_0 * rows[0] + read_1 * rows[1]``, then ``rows[i] += write_i * value``. The rows lie one after the other
    and have the dtype of ``like``.
    """
    factors, second = (read_0, read_1, write_0, write_1), builder.add(rows, builder.mul(length, _I64(2 if like else 4)))

    def body(index: Any, width: int) -> None:
        read_0, read_1, write_0, write_1 = (_spread(builder, factor, width) for factor in factors)
        row_0, row_1 = (_load(builder, row, index, width, like) for row in (rows, second))
        wide_value = _load(builder, value, index, width)
        total = _fma(builder, read_0, row_0, _load(builder, out, index, width))
        _store(builder, _fma(builder, read_1, row_1, total), out, index, width)
        _store(builder, _fma(builder, write_0, wide_value, row_0), rows, index, width, like)
        _store(builder, _fma(builder, write_1, wide_value, row_1), second, index, width, like)

    _by_vectors(builder, length, body)


@instruction(ADDRESS)
def prefetch(builder, address):
    """Asks for the cache line at an address, which need not be read."""
    pointer = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


@intrinsic
def address(typingctx: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """Of an array's first number; the array must outlive it.

    ``array.ctypes.data`` is unsigned, which numba adds to a signed integer as floats.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), codegen


# Single numbers, by address.


@instruction(ADDRESS, types.float32)
def put_float(builder, address, value):
    _store_scalar(builder, value, address)


@instruction(ADDRESS, result=types.uint8)
def get_byte(builder, address):
    return builder.load(builder.inttoptr(address, _I8.as_pointer()))


@instruction(ADDRESS, types.uint8)
def put_byte(builder, address, value):
    builder.store(value, builder.inttoptr(address, _I8.as_pointer()))
