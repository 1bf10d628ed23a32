"""Vector instructions over lists of the tokens at which a neuron fires.

A neuron has a row of D weights, and its gradient has one too. Each token has a row of D numbers, at ``base + index *
stride`` bytes, where ``index`` is an int32 entry of a list. All numbers are float32 and passed by address.

A list is processed in groups of ``GROUP`` entries, so that the neuron's row is loaded once for a group. :func:`pad`
completes the last group.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bdh.ops.blocks.block import MULTIPLIERS, SHIFTS
from bdh.ops.cpu.vector import (
    ADDRESS,
    LANES,
    NUMBER,
    _by_vectors,
    _dot_products,
    _fma,
    _lanes,
    _load,
    _load_scalar,
    _spread,
    _store,
    _store_scalar,
    instruction,
)

GROUP = 4
DOTS = 8
WIDE = 4 * LANES
"""How many numbers of a row stay in registers while all tokens of a list are processed."""
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _rows(builder: Any, indices: Any, base: Any, stride: Any, count: int = GROUP) -> list[Any]:
    """Returns the addresses of the rows of the first ``count`` indices in a list."""
    found = [builder.sext(_load_scalar(builder, indices, number, _I32), _I64) for number in range(count)]
    return [builder.add(base, builder.mul(index, stride)) for index in found]


def _factors(builder: Any, address: Any) -> list[Any]:
    return [_load_scalar(builder, address, number, _F32) for number in range(GROUP)]


def _make_dots(count: int) -> Any:
    @instruction(*[ADDRESS] * 3, NUMBER, NUMBER, ADDRESS)
    def dots(builder, row, indices, base, stride, length, out):
        """Computes the dot products of a row with the rows of ``count`` tokens, and writes them to ``out``."""
        rows = _rows(builder, indices, base, stride, count)
        products = _dot_products(builder, [row], rows, [(0, j) for j in range(count)], length, "float32")
        _store(builder, products, out, _I64(0), count)

    return dots


dots = _make_dots(DOTS)
dots_of_group = _make_dots(GROUP)


@instruction(*[ADDRESS] * 4, NUMBER, NUMBER)
def spread_row(builder, row, factors, indices, base, stride, length):
    """Adds a row, times a factor for each token, to the rows of ``GROUP`` tokens."""
    rows, numbers = _rows(builder, indices, base, stride), _factors(builder, factors)

    def body(index: Any, width: int) -> None:
        wide = _load(builder, row, index, width)
        for place, number in zip(rows, numbers, strict=True):
            total = _fma(builder, _spread(builder, number, width), wide, _load(builder, place, index, width))
            _store(builder, total, place, index, width)

    _by_vectors(builder, length, body)


@instruction(*[ADDRESS] * 3, NUMBER, ADDRESS, NUMBER)
def spread_list(builder, row, indices, factors, count, base, length):
    """Adds a row, times a factor for each token, to the rows of ``count`` tokens. All tokens' rows are contiguous."""
    stride = builder.mul(length, _I64(4))

    def block(first: Any, width: int) -> None:
        lanes = min(width, LANES)
        places = [builder.add(first, _I64(start)) for start in range(0, width, lanes)]
        held = [_load(builder, row, place, lanes) for place in places]
        with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (entry, _):
            offset = builder.mul(entry, _I64(4))
            token = builder.sext(_load_scalar(builder, builder.add(indices, offset), 0, _I32), _I64)
            factor = _spread(builder, _load_scalar(builder, builder.add(factors, offset), 0, _F32), lanes)
            target = builder.add(base, builder.mul(token, stride))
            for place, wide in zip(places, held, strict=True):
                _store(builder, _fma(builder, factor, wide, _load(builder, target, place, lanes)), target, place, lanes)

    by_blocks(builder, length, block)


@instruction(*[ADDRESS] * 5, NUMBER, NUMBER, ADDRESS)
def dots_and_gather(builder, row, gathered, factors, indices, base, stride, length, out):
    """Computes the dot products of a row with the rows of ``GROUP`` tokens, and adds the tokens' rows to ``gathered``.

    The products are written to ``out``. Each token's row is multiplied by its factor before it is added.
    """
    rows, numbers = _rows(builder, indices, base, stride), _factors(builder, factors)

    def gather(index: Any, width: int, values: list[Any]) -> None:
        total = _load(builder, gathered, index, width)
        for number, value in zip(numbers, values, strict=True):
            total = _fma(builder, _spread(builder, number, width), value, total)
        _store(builder, total, gathered, index, width)

    pairs = [(0, j) for j in range(GROUP)]
    products = _dot_products(builder, [row], rows, pairs, length, "float32", also=gather)
    _store(builder, products, out, _I64(0), GROUP)


@instruction(*[ADDRESS] * 6, NUMBER, NUMBER)
def gather_and_spread(builder, row, gathered, factors, indices, source, target, stride, length):
    """Adds the rows of ``GROUP`` tokens in ``source``, times a factor for each, to ``gathered``.

    It also adds ``row``, times the same factors, to the rows of these tokens in ``target``.
    """
    sources, targets = _rows(builder, indices, source, stride), _rows(builder, indices, target, stride)
    numbers = _factors(builder, factors)

    def body(index: Any, width: int) -> None:
        wide, total = _load(builder, row, index, width), _load(builder, gathered, index, width)
        for from_row, to_row, number in zip(sources, targets, numbers, strict=True):
            factor = _spread(builder, number, width)
            total = _fma(builder, factor, _load(builder, from_row, index, width), total)
            added = _fma(builder, factor, wide, _load(builder, to_row, index, width))
            _store(builder, added, to_row, index, width)
        _store(builder, total, gathered, index, width)

    _by_vectors(builder, length, body)


def _compressed(builder: Any, value: Any, keep: Any, address: Any) -> None:
    """Stores the selected elements of a vector of 32-bit numbers contiguously. It always writes a whole vector."""
    kind = value.type
    name = "f32" if kind.element == _F32 else "i32"
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind, keep.type, kind]),
        f"llvm.experimental.vector.compress.v{LANES}{name}",
    )
    packed = builder.call(function, [value, keep, ir.Constant(kind, ir.Undefined)])
    builder.store(packed, builder.inttoptr(address, kind.as_pointer())).align = 4


def _count(builder: Any, keep: Any) -> Any:
    bits = builder.bitcast(keep, ir.IntType(LANES))
    kind = ir.FunctionType(bits.type, [bits.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.i{LANES}")
    return builder.zext(builder.call(function, [bits]), _I64)


def by_blocks(builder: Any, length: Any, block: Callable[[Any, int], None]) -> None:
    """Emits loops over blocks of ``WIDE`` numbers, then whole vectors, then single numbers.

    ``block(first, width)`` emits the body of each loop.
    """
    whole = builder.and_(length, _I64(-WIDE))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(WIDE), _I64) as (first, _):
        block(first, WIDE)
    _by_vectors(builder, builder.sub(length, whole), lambda index, width: block(builder.add(whole, index), width))


def append(builder: Any, keep: Any, lists: list[tuple[Any, Any]], found: Any) -> None:
    """Appends the selected elements of vectors to lists at addresses. The slot ``found`` contains the lists' length."""
    so_far, width = builder.load(found), keep.type.count
    offset = builder.mul(so_far, _I64(4))
    for value, address in lists:
        place = builder.add(address, offset)
        if width > 1:
            _compressed(builder, value, keep, place)
        else:
            builder.store(value, builder.inttoptr(place, value.type.as_pointer())).align = 4
    more = _count(builder, keep) if width > 1 else builder.zext(builder.extract_element(keep, _I32(0)), _I64)
    builder.store(builder.add(so_far, more), found)


@instruction(ADDRESS, NUMBER, ADDRESS, ADDRESS, result=types.int64)
def list_above_0(builder, flags, count, indices, values):
    """Lists those of ``count`` tokens at which ``flags`` is above 0, with its values. Returns their number."""
    found = cgutils.alloca_once_value(builder, _I64(0))

    def body(index: Any, width: int) -> None:
        value = _load(builder, flags, index, width)
        keep = builder.fcmp_ordered(">", value, ir.Constant(value.type, [0.0] * width))
        append(builder, keep, [(_numbers_from(builder, index, width), indices), (value, values)], found)

    _by_vectors(builder, count, body)
    return builder.load(found)


@instruction(*[ADDRESS] * 3, NUMBER, ADDRESS, ADDRESS, result=types.int64)
def list_products(builder, y, x, indices, count, kept, products):
    """Lists those of a list's tokens at which ``y`` is above 0, with x * y. Returns their number."""
    found = cgutils.alloca_once_value(builder, _I64(0))

    def body(index: Any, width: int) -> None:
        own, others = (_load(builder, each, index, width) for each in (y, x))
        keep = builder.fcmp_ordered(">", own, ir.Constant(own.type, [0.0] * width))
        tokens = builder.bitcast(_load(builder, indices, index, width), ir.VectorType(_I32, width))
        append(builder, keep, [(tokens, kept), (builder.fmul(others, own), products)], found)

    _by_vectors(builder, count, body)
    return builder.load(found)


def _positive(builder: Any, value: Any) -> Any:
    """Returns a mask of the elements of a vector that are above 0 or NaN. NaN counts as firing."""
    return builder.fcmp_unordered(">", value, ir.Constant(value.type, [0.0] * LANES))


def _numbers_from(builder: Any, index: Any, width: int = LANES) -> Any:
    """Returns a vector of consecutive integers that starts at ``index``."""
    return builder.add(_spread(builder, builder.trunc(index, _I32), width), _lanes(_I32, list(range(width))))


def _list(builder: Any, flags: Any, count: Any, indices: Any, values: Any, others: list[tuple[Any, Any]]) -> Any:
    """Emits the code of :func:`list_firing_1` for any number of sources, and returns the number of listed tokens."""
    found = cgutils.alloca_once_value(builder, _I64(0))
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(LANES), _I64) as (index, _):
        value = _load(builder, flags, index, LANES)
        keep = _positive(builder, value)
        offset = builder.mul(builder.load(found), _I64(4))
        _compressed(builder, _numbers_from(builder, index), keep, builder.add(indices, offset))
        _compressed(builder, value, keep, builder.add(values, offset))
        for source, target in others:
            _compressed(builder, _load(builder, source, index, LANES), keep, builder.add(target, offset))
        builder.store(builder.add(builder.load(found), _count(builder, keep)), found)
    return builder.load(found)


@instruction(ADDRESS, NUMBER, *[ADDRESS] * 4, result=types.int64)
def list_firing_1(builder, flags, count, indices, values, source, target):
    """Lists those of ``count`` tokens, a multiple of ``LANES``, at which ``flags`` is above 0 or NaN.

    The tokens' indices are written to ``indices``, their flags to ``values``, and their elements of ``source``, 32 bits
    each, to ``target``. Returns the number of tokens. Lists must have space for one vector more than their entries.
    """
    return _list(builder, flags, count, indices, values, [(source, target)])


@instruction(ADDRESS, NUMBER, *[ADDRESS] * 6, result=types.int64)
def list_firing_2(builder, flags, count, indices, values, source_1, target_1, source_2, target_2):
    """Does the same as :func:`list_firing_1`, with two sources."""
    return _list(builder, flags, count, indices, values, [(source_1, target_1), (source_2, target_2)])


@instruction(ADDRESS, ADDRESS, NUMBER)
def pad(builder, indices, factors, count):
    """Completes the last group of a list with entries that add nothing: the first token, with a factor of 0."""
    first = _load_scalar(builder, indices, 0, _I32)
    for address, value in ((indices, first), (factors, ir.Constant(_F32, 0.0))):
        _store(builder, _spread(builder, value, LANES), address, count, LANES)


@instruction(ADDRESS, ADDRESS, NUMBER, ADDRESS)
def scatter(builder, values, indices, count, row):
    """Writes the values of a list to the elements of a row that belong to its tokens."""
    with cgutils.for_range_slice(builder, _I64(0), count, _I64(1), _I64) as (index, _):
        offset = builder.mul(index, _I64(4))
        token = builder.sext(_load_scalar(builder, builder.add(indices, offset), 0, _I32), _I64)
        value = _load_scalar(builder, builder.add(values, offset), 0, _F32)
        _store_scalar(builder, value, builder.add(row, builder.mul(token, _I64(4))))


@instruction(ADDRESS, ADDRESS, *[NUMBER] * 3)
def gate(builder, y, keys, key, threshold, count):
    """Sets ``y`` to 0 where it is 0 or negative, where dropout drops it, and from ``count`` to the end of the vector.

    ``keys`` are the keys of the tokens, and ``key`` that of the neuron, as in :mod:`bdh.ops.blocks.block`. With a
    ``threshold`` of 0, nothing is dropped.
    """
    zero = _lanes(_F32, [0.0] * LANES)
    own, least, end = (_spread(builder, builder.trunc(number, _I32), LANES) for number in (key, threshold, count))

    def mixed(bits: Any) -> Any:
        for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
            bits = builder.xor(bits, builder.lshr(bits, _lanes(_I32, [shift] * LANES)))
            bits = builder.mul(bits, _lanes(_I32, [multiplier] * LANES))
        return builder.xor(bits, builder.lshr(bits, _lanes(_I32, [SHIFTS[2]] * LANES)))

    with cgutils.for_range_slice(builder, _I64(0), count, _I64(LANES), _I64) as (index, _):
        value = _load(builder, y, index, LANES)
        bits = builder.bitcast(_load(builder, keys, index, LANES), ir.VectorType(_I32, LANES))
        stays = builder.icmp_unsigned(">=", mixed(builder.add(bits, own)), least)
        is_listed = builder.icmp_signed("<", _numbers_from(builder, index), end)
        keep = builder.and_(builder.and_(_positive(builder, value), stays), is_listed)
        _store(builder, builder.select(keep, value, zero), y, index, LANES)
