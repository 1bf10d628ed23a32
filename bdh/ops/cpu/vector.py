"""The innermost loops of the kernels, as vector instructions.

They are written explicitly and not left to the compiler's vectorizer, because a result must always have the same bits:
whether a sequence is computed alone or in a batch, and whether a token is computed alone or as part of a prompt. Every
dot product is therefore summed in the same order: ``LANES`` partial sums are folded by halves, and the sum of the rest
of the row is added. LLVM maps the vectors to the registers that the processor has.

Memory is passed by address, because the rows that fire are scattered. The dtype of an empty array ``like`` gives the
format of weights or states. All arithmetic is in float32. A weight in int8 or int4 is multiplied by its scale when it
is loaded. The product is exact (:mod:`bdh.ops.formats`), so it does not matter where it is computed.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from bdh.ops.formats import BLOCK_BYTES, GROUP, SCALE_BYTES

LANES = 16
_LOG2_GROUP = GROUP.bit_length() - 1
CACHE_LINE = 64
ADDRESS = NUMBER = types.int64
_FORMATS = {
    types.float32: "float32",
    types.uint16: "bfloat16",
    types.int8: "int8",
    types.uint8: "int4",
}
"""The format for each dtype of ``like``."""
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))


def instruction(
    *parameters: Any, result: Any = types.void, has_like: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Turns a function that emits code into an intrinsic.

    The function receives the builder and the arguments.

    Args:
        parameters: the types of the arguments.
        result: the type of the result.
        has_like: whether the first argument of the intrinsic, before these, is an array ``like``. The function receives
            the name of its format.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typingctx: Any, *found: Any) -> tuple[Any, Callable[..., Any]]:
            if has_like and found[0].dtype not in _FORMATS:
                raise TypingError(f"rows of {found[0].dtype}: none of {', '.join(map(str, _FORMATS))}")

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                if has_like:
                    arguments = [_FORMATS[found[0].dtype], *arguments[1:]]
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
    """Loads ``width`` numbers as float32 that begin ``index`` numbers after an address."""
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


_Loader = Callable[..., Any]
"""``(index, width, half=0)`` emits the load of ``width`` numbers of a row as float32. ``half`` is 1 for the second
vector of an int4 group, which must be loaded right after the first."""


def _loader(builder: Any, address: Any, length: Any, format: str) -> _Loader:
    """Returns the loader of a row of this length at an address. What all numbers of the row share is loaded now."""
    if format == "int8":
        return _int8_loader(builder, address, length)
    if format == "int4":
        return _int4_loader(builder, address)
    return lambda index, width, half=0: _load(builder, address, index, width, format == "bfloat16")


def _int8_loader(builder: Any, address: Any, length: Any) -> _Loader:
    scale = _load_bfloat16(builder, builder.add(address, length))

    def load(index: Any, width: int, half: int = 0) -> Any:
        codes = builder.sext(_load_bytes(builder, builder.add(address, index), width), _vector(_I32, width))
        return builder.fmul(builder.sitofp(codes, _vector(_F32, width)), _spread(builder, scale, width))

    return load


def _int4_loader(builder: Any, address: Any) -> _Loader:
    in_first_half: list[Any] = []  # of the group, for its second half: the bytes, the scale, and -8 times the scale

    def load(index: Any, width: int, half: int = 0) -> Any:
        wide = _vector(_I32, width)
        if half == 0:
            block = builder.add(address, builder.mul(builder.lshr(index, _I64(_LOG2_GROUP)), _I64(BLOCK_BYTES)))
            place = builder.add(block, builder.add(_I64(SCALE_BYTES), builder.and_(index, _I64(LANES - 1))))
            scale = _load_bfloat16(builder, block)
            least = builder.fmul(scale, ir.Constant(_F32, -8.0))
            both = builder.zext(_load_bytes(builder, place, width), wide)
            in_first_half[:] = both, _spread(builder, scale, width), _spread(builder, least, width)
        both, scale, least = in_first_half
        if width == 1:  # a single number anywhere in the group
            upper = builder.and_(builder.lshr(index, _I64(_LOG2_GROUP - 1)), _I64(1))
            both = builder.lshr(both, _spread(builder, builder.trunc(builder.shl(upper, _I64(2)), _I32), 1))
        elif half:
            both = builder.lshr(both, _lanes(_I32, [4] * width))
        codes = builder.and_(both, _lanes(_I32, [15] * width))
        return _fma(builder, builder.sitofp(codes, _vector(_F32, width)), scale, least)

    return load


def _load_bytes(builder: Any, address: Any, count: int) -> Any:
    value = builder.load(builder.inttoptr(address, _vector(_I8, count).as_pointer()))
    value.align = 1
    return value


def _load_bfloat16(builder: Any, address: Any) -> Any:
    """Loads a number from an address of any alignment, as float32."""
    value = builder.load(builder.inttoptr(address, _I16.as_pointer()))
    value.align = 1
    return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    )
    return builder.call(function, [a, b, c])


def _spread(builder: Any, number: Any, width: int) -> Any:
    """Returns a vector with the same number in all elements."""
    kind = _vector(number.type, width)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), _lanes(_I32, [0] * width))


def _folded(builder: Any, values: list[Any]) -> Any:
    """Returns a vector of the sums of the elements of each of 2^k vectors. There may be at most as many as elements.

    The halves of each vector are added until one element is left. Several vectors are folded together: the halves of
    two vectors are placed side by side before they are added. This takes a third of the time of folding each alone, and
    does the same additions.
    """
    width = values[0].type.count  # how many elements are left of each sum
    while width > 1:
        width //= 2
        lanes = [2 * width * sum_ + i for sum_ in range(values[0].type.count // (2 * width)) for i in range(width)]
        if len(values) > 1:
            count = values[0].type.count
            lanes += [count + lane for lane in lanes]
        values = [
            builder.fadd(
                *(builder.shuffle_vector(*pair, _lanes(_I32, [lane + half for lane in lanes])) for half in (0, width))
            )
            for pair in zip(values[::2], values[1::2] or [ir.Constant(values[0].type, ir.Undefined)], strict=True)
        ]
    return values[0]


def _by_vectors(builder: Any, length: Any, body: Callable[..., None], format: str = "float32") -> None:
    """Emits loops over whole vectors, and then over single numbers. ``body(index, width)`` emits the body of each.

    For int4, a loop over whole groups precedes them. A group is two vectors: ``body(index, width)`` emits the code for
    the first, and ``body(index, width, half=1)`` that for the second.
    """
    done = _I64(0)
    if format == "int4":
        groups = builder.and_(length, _I64(-GROUP))
        with cgutils.for_range_slice(builder, done, groups, _I64(GROUP), _I64) as (index, _):
            body(index, LANES)
            body(builder.add(index, _I64(LANES)), LANES, half=1)
        done = groups
    whole = builder.and_(length, _I64(-LANES))
    with cgutils.for_range_slice(builder, done, whole, _I64(LANES), _I64) as (index, _):
        body(index, LANES)
    with cgutils.for_range_slice(builder, whole, length, _I64(1), _I64) as (index, _):
        body(index, 1)


def _dot_products(
    builder: Any,
    weights: list[Any],
    values: list[Any],
    pairs: list[tuple[int, int]],
    length: Any,
    format: str,
    also: Callable[[Any, int, list[Any]], None] | None = None,
) -> Any:
    """Returns a vector of the dot products of pairs of rows. Each row is loaded once.

    Args:
        weights, values: the addresses of the rows.
        pairs: the indices of the weights and of the values of each product; 2^k pairs, at most ``LANES``.
        length: the length of a row.
        format: the format of the weights.
        also: ``(index, width, values)``, emits further code that uses the loaded values.
    """
    sums = [cgutils.alloca_once_value(builder, _lanes(_F32, [0.0] * LANES)) for _ in pairs]
    rest = cgutils.alloca_once_value(builder, _lanes(_F32, [0.0] * len(pairs)))  # for the rest of the rows
    first = builder.bitcast(rest, _vector(_F32, 1).as_pointer())
    slots = {LANES: sums, 1: [builder.gep(first, [_I32(number)]) for number in range(len(pairs))]}

    loaders = [_loader(builder, address, length, format) for address in weights]

    def body(index: Any, width: int, half: int = 0) -> None:
        wide_weights = [load(index, width, half) for load in loaders]
        wide_values = [_load(builder, address, index, width) for address in values]
        for (i, j), slot in zip(pairs, slots[width], strict=True):
            builder.store(_fma(builder, wide_weights[i], wide_values[j], builder.load(slot)), slot)
        if also is not None:
            also(index, width, wide_values)

    _by_vectors(builder, length, body, format)
    return builder.fadd(_folded(builder, [builder.load(each) for each in sums]), builder.load(rest))


def _load_scalar(builder: Any, address: Any, number: int, kind: ir.Type) -> Any:
    """Loads an element of an array."""
    place = builder.add(address, _I64(number * (8 if kind == _I64 else 4)))
    return builder.load(builder.inttoptr(place, kind.as_pointer()))


def _store_scalar(builder: Any, value: Any, address: Any, number: int = 0) -> None:
    place = builder.add(address, _I64(4 * number)) if number else address
    builder.store(value, builder.inttoptr(place, _F32.as_pointer())).align = 4


def _make_tile(num_weights: int, num_values: int) -> Any:
    """Makes an instruction for the dot products of ``num_weights`` weight rows with ``num_values`` rows of values."""

    @instruction(types.boolean, *[NUMBER] * 7, has_like=True)
    def tile(builder, like, relu, weight, weight_stride, value, value_stride, length, out, out_stride):
        """Writes the product of weights i and values j to ``out + i * out_stride + 4 * j``. Strides are in bytes.

        With ``relu``, negative products become 0.
        """
        weights = [builder.add(weight, builder.mul(weight_stride, _I64(i))) for i in range(num_weights)]
        values = [builder.add(value, builder.mul(value_stride, _I64(j))) for j in range(num_values)]
        pairs = [(i, j) for i in range(num_weights) for j in range(num_values)]
        products = _dot_products(builder, weights, values, pairs, length, like)
        zero = ir.Constant(products.type, [0.0] * len(pairs))
        # This comparison keeps NaN, as ReLU does.
        is_cut = builder.and_(_spread(builder, relu, len(pairs)), builder.fcmp_ordered("<", products, zero))
        products = builder.select(is_cut, zero, products)
        for i in range(num_weights):
            lanes = _lanes(_I32, list(range(i * num_values, (i + 1) * num_values)))
            row = builder.add(out, builder.mul(out_stride, _I64(i)))
            _store(builder, builder.shuffle_vector(products, products, lanes), row, _I64(0), num_values)

    return tile


tile_8x1 = _make_tile(8, 1)
tile_1x1 = _make_tile(1, 1)
tile_4x4 = _make_tile(4, 4)
tile_1x4 = _make_tile(1, 4)


def _make_dots(count: int) -> Any:
    @instruction(*[NUMBER] * 4, has_like=True)
    def dots(builder, like, weights, values, length, out):
        """Computes ``count`` dot products of rows. ``weights`` and ``values`` point to arrays of int64 addresses."""
        weights, values = ([_load_scalar(builder, each, i, _I64) for i in range(count)] for each in (weights, values))
        products = _dot_products(builder, weights, values, [(i, i) for i in range(count)], length, like)
        _store(builder, products, out, _I64(0), count)

    return dots


dots_8 = _make_dots(8)
dots_1 = _make_dots(1)


@instruction(*[NUMBER] * 3, has_like=True, result=types.float32)
def dot(builder, like, weight, value, length):
    """Returns the dot product of a row of weights and a row of values."""
    return builder.extract_element(_dot_products(builder, [weight], [value], [(0, 0)], length, like), _I32(0))


@instruction(ADDRESS, ADDRESS, types.float32, NUMBER, has_like=True)
def add_scaled(builder, like, out, row, factor, length):
    """Computes ``out += factor * row``. ``out`` is float32, and ``row`` has the format of ``like``."""
    load = _loader(builder, row, length, like)

    def body(index: Any, width: int, half: int = 0) -> None:
        loaded = load(index, width, half)
        total = _fma(builder, _spread(builder, factor, width), loaded, _load(builder, out, index, width))
        _store(builder, total, out, index, width)

    _by_vectors(builder, length, body, like)


def _row_bytes(builder: Any, format: str, length: Any) -> Any:
    if format == "int8":
        return builder.add(length, _I64(SCALE_BYTES))
    if format == "int4":
        groups = builder.lshr(builder.add(length, _I64(GROUP - 1)), _I64(_LOG2_GROUP))
        return builder.mul(groups, _I64(BLOCK_BYTES))
    return builder.mul(length, _I64(2 if format == "bfloat16" else 4))


@instruction(NUMBER, has_like=True, result=types.int64)
def row_bytes(builder, like, length):
    """Returns the size in bytes of a row of this length, as :func:`bdh.ops.formats.row_bytes`."""
    return _row_bytes(builder, like, length)


@instruction(ADDRESS, NUMBER, ADDRESS, NUMBER, has_like=True, result=types.int64)
def float_rows(builder, like, rows, count, scratch, length):
    """Returns the address of ``count`` contiguous rows as float32. Other formats are converted to ``scratch`` first."""
    if like == "float32":
        return rows
    row_bytes = _row_bytes(builder, like, length)
    out_bytes = builder.mul(length, _I64(4))
    with cgutils.for_range(builder, count, intp=_I64) as loop:
        load = _loader(builder, builder.add(rows, builder.mul(loop.index, row_bytes)), length, like)
        out = builder.add(scratch, builder.mul(loop.index, out_bytes))

        def body(index: Any, width: int, half: int = 0) -> None:
            _store(builder, load(index, width, half), out, index, width)

        _by_vectors(builder, length, body, like)
    return scratch


def _prefetch(builder: Any, address: Any, is_written: bool) -> None:
    pointer = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [pointer, _I32(int(is_written)), _I32(3), _I32(1)])


@instruction(ADDRESS)
def prefetch(builder, address):
    """Prefetches the cache line at an address. The address need not be readable."""
    _prefetch(builder, address, False)


@instruction(ADDRESS)
def prefetch_to_write(builder, address):
    """Prefetches the cache line at an address for writing, so that no other core keeps a copy."""
    _prefetch(builder, address, True)


@intrinsic
def address(typingctx: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """Returns the address of an array's first element. It is valid as long as the array exists.

    ``array.ctypes.data`` cannot be used: it is unsigned, and numba adds unsigned and signed integers as floats.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), codegen


# Loads and stores of single numbers, by address.


@instruction(ADDRESS, types.float32)
def put_float(builder, address, value):
    _store_scalar(builder, value, address)


@instruction(ADDRESS, result=types.uint8)
def get_byte(builder, address):
    return builder.load(builder.inttoptr(address, _I8.as_pointer()))


@instruction(ADDRESS, types.uint8)
def put_byte(builder, address, value):
    builder.store(value, builder.inttoptr(address, _I8.as_pointer()))
