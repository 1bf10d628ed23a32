"""Stages of work in pieces that threads take as they come.

The threads of a team run the same function, stage after stage. In each stage every thread takes the next piece that nobody
has taken, until there is none left, and then waits until all are done. So a thread that comes late, because another
program holds its core, holds up the others by the piece that it has in hand, and not by its share; one that does not come
at all is not missed, since nobody waits for threads, but for pieces. Who does which piece is left to chance: the result of a
piece must not depend on it.

Waiting costs the core of whoever waits only for a moment. Then the thread sleeps, on Linux, until the last piece is done: the
core is free for the thread that has it in hand, which another program may keep from its own.

numba has no public name for what calls a compiled function by its address from another one, for what tells fast which types
arguments have, nor for what sets the number of threads in a function that is cached: this file uses its ``call_conv``,
``overloads``, ``compute_fingerprint`` and symbol ``set_num_threads`` (checked with 0.68; every test of the kernels fails where
they change).

The counters of a stage are int64, in the ``progress`` (stages, STAGE_WORDS) of a call (:meth:`bdh.ops.cpu.runtime.Team.new_progress`).
"""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import njit, prange, typeof, types
from numba._dispatcher import compute_fingerprint
from numba.core import cgutils
from numba.extending import intrinsic

from bdh.ops.cpu.vector import ADDRESS, NUMBER, instruction

STAGE_WORDS = 16  # two lines of the cache
SPINS_WORD = 1
"""Where it stands how often a thread that waits looks, before it sleeps."""
_TAKEN, _DONE, _SLEEPERS = 0, 8, 9
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # within a process
_FUTEX = {"x86_64": 202, "aarch64": 98}  # the number of the system call
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}
_ARCHITECTURE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
_I32, _I64 = ir.IntType(32), ir.IntType(64)

jit = njit(cache=True, nogil=True, error_model="numpy")


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


@instruction(ADDRESS, NUMBER, result=types.int64)
def _add(builder, address, number):
    """Adds to a counter, for all threads at once, and returns what it was before."""
    return builder.atomic_rmw("add", _pointer(builder, address), number, "seq_cst")


@instruction(ADDRESS, result=types.int64)
def _get(builder, address):
    """What a counter is."""
    return builder.load_atomic(_pointer(builder, address), "seq_cst", 8)


@instruction()
def _pause(builder):
    """Tells the processor that this is a loop that waits."""
    name, numbers = _PAUSES.get(_ARCHITECTURE, (None, ()))
    if name is not None:
        kind = ir.FunctionType(ir.VoidType(), [_I32] * len(numbers))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [_I32(n) for n in numbers])


def _call_futex(builder: Any, address: Any, operation: int, number: Any) -> None:
    """Where there is none, nothing. A counter is a futex by its lower half, which comes first."""
    if sys.platform == "linux" and sys.byteorder == "little" and _ARCHITECTURE in _FUTEX:
        kind = ir.FunctionType(_I64, [_I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
        builder.call(function, [_I64(_FUTEX[_ARCHITECTURE]), address, _I64(operation), number, *[_I64(0)] * 3])


@instruction(ADDRESS, NUMBER)
def _sleep(builder, address, number):
    """Sleeps until somebody calls :func:`_wake`; not if the counter is another number already."""
    _call_futex(builder, address, _FUTEX_WAIT, number)


@instruction(ADDRESS)
def _wake(builder, address):
    """Wakes all who sleep at a counter."""
    _call_futex(builder, address, _FUTEX_WAKE, _I64(2**31 - 1))


@jit
def take(stage, count):
    """A piece of a stage, at an address, of ``count`` pieces; -1 where none is left, and then all are done."""
    piece = _add(stage + 8 * _TAKEN, 1)
    if piece < count:
        return piece
    done = stage + 8 * _DONE
    for _ in range(_get(stage + 8 * SPINS_WORD)):
        if _get(done) >= count:
            return -1
        _pause()
    while True:
        _add(stage + 8 * _SLEEPERS, 1)
        so_far = _get(done)
        if so_far >= count:
            return -1
        _sleep(done, so_far)


@jit
def next_piece(stage, count):
    """What :func:`take` gives, when the piece that it gave before is done."""
    done = stage + 8 * _DONE
    if _add(done, 1) == count - 1 and _get(stage + 8 * _SLEEPERS) > 0:
        _wake(done)
    return take(stage, count)


@njit(nogil=True, error_model="numpy")  # of a generator that numba has loaded from the disk it does not know the code
def pieces(stage, count):
    """The pieces of a stage, at an address, that this thread does; after the last of them all of the stage are done."""
    piece = take(stage, count)
    while piece >= 0:
        yield piece
        piece = next_piece(stage, count)


@intrinsic
def _call(typingctx, address, number, arguments):
    """Calls a compiled function by its address, with a number and a tuple, of the types that it was compiled for."""

    def codegen(context, builder, signature, values):
        kinds, convention = (types.int64, *signature.args[2].types), context.call_conv
        function = builder.inttoptr(values[0], convention.get_function_type(types.none, kinds).as_pointer())
        own = context.cast(builder, values[1], signature.args[1], types.int64)
        each = [own, *cgutils.unpack_tuple(builder, values[2], len(kinds) - 1)]
        status, _ = convention.call_function(builder, function, types.none, kinds, each)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(address, number, arguments), codegen


@instruction(NUMBER)
def _set_num_threads(builder, count):
    """``numba.set_num_threads``, which cannot be cached within a compiled function, and from Python takes microseconds."""
    kind = ir.FunctionType(ir.VoidType(), [_I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "set_num_threads")
    builder.call(function, [builder.trunc(count, _I32)])


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def launch(num_calls, num_threads, function, arguments):
    """Calls the function at an address with each number below ``num_calls`` and the arguments, on so many threads."""
    if num_calls == 1:  # without OpenMP, whose threads take longer to wake up than a small model to compute a token
        _call(function, 0, arguments)
    else:
        _set_num_threads(num_threads)
        for number in prange(num_calls):
            _call(function, number, arguments)


def address_of(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """Of a function of :data:`jit` that returns nothing, compiled or loaded for a thread's number and such arguments."""
    kinds = (types.int64, *map(typeof, arguments))
    kernel.compile(kinds)
    found = kernel.overloads[kinds]
    address: int = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
    return address


types_of = compute_fingerprint
"""Bytes that tell which types arguments have."""
