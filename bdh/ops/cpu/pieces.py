"""Divides stages of work into pieces, which threads take dynamically.

All threads of a team run the same function, stage by stage. In each stage, a thread takes the next piece that no thread
has taken, until none is left, and then waits until all pieces are done. If another program holds the core of a thread,
the others wait only for the piece that this thread is working on, not for a fixed share of the work. If a thread never
starts, nothing is delayed, because threads wait for pieces and not for each other. Which thread does a piece is not
deterministic, so the result of a piece must not depend on it.

A waiting thread spins only for a moment. On Linux, it then sleeps until the last piece is done. This frees its core for
the thread that is working on that piece, whose own core another program may hold.

numba has no public API for calling a compiled function by its address from another one, for quickly finding the types
of arguments, or for setting the number of threads in a cached function. This file therefore uses numba's ``call_conv``,
``overloads``, ``compute_fingerprint`` and the symbol ``set_num_threads``. They were checked with numba 0.68, and every
test of the kernels fails if they change.

The counters of a stage are int64. They are a row of the ``progress`` (stages, STAGE_WORDS) of a call
(:meth:`bdh.ops.cpu.runtime.Team.new_progress`).
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

STAGE_WORDS = 16  # two cache lines
SPINS_WORD = 1
"""The index of the word that says how often a waiting thread checks the counter before it sleeps."""
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
    """Atomically adds to a counter, and returns its previous value."""
    return builder.atomic_rmw("add", _pointer(builder, address), number, "seq_cst")


@instruction(ADDRESS, result=types.int64)
def _get(builder, address):
    """Returns the value of a counter."""
    return builder.load_atomic(_pointer(builder, address), "seq_cst", 8)


@instruction()
def _pause(builder):
    """Tells the processor that this is a spin loop."""
    name, numbers = _PAUSES.get(_ARCHITECTURE, (None, ()))
    if name is not None:
        kind = ir.FunctionType(ir.VoidType(), [_I32] * len(numbers))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [_I32(n) for n in numbers])


def _call_futex(builder: Any, address: Any, operation: int, number: Any) -> None:
    """Emits a futex call, or nothing if the system has no futexes.

    A futex has 32 bits: the lower half of the counter, which comes first in memory.
    """
    if sys.platform == "linux" and sys.byteorder == "little" and _ARCHITECTURE in _FUTEX:
        kind = ir.FunctionType(_I64, [_I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
        builder.call(function, [_I64(_FUTEX[_ARCHITECTURE]), address, _I64(operation), number, *[_I64(0)] * 3])


@instruction(ADDRESS, NUMBER)
def _sleep(builder, address, number):
    """Sleeps until another thread calls :func:`_wake`. Returns at once if the counter is no longer ``number``."""
    _call_futex(builder, address, _FUTEX_WAIT, number)


@instruction(ADDRESS)
def _wake(builder, address):
    """Wakes all threads that sleep on a counter."""
    _call_futex(builder, address, _FUTEX_WAKE, _I64(2**31 - 1))


@jit
def take(stage, count):
    """Takes a piece of the stage of ``count`` pieces whose counters are at the address ``stage``.

    If none is left, it waits until all are done, and returns -1.
    """
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
    """Marks the thread's current piece as done, and takes the next one as :func:`take` does."""
    done = stage + 8 * _DONE
    if _add(done, 1) == count - 1 and _get(stage + 8 * _SLEEPERS) > 0:
        _wake(done)
    return take(stage, count)


@njit(nogil=True, error_model="numpy")  # not cached: numba lacks the code of a generator loaded from disk
def pieces(stage, count):
    """Yields the pieces of a stage that this thread has to do. When it ends, all pieces of the stage are done."""
    piece = take(stage, count)
    while piece >= 0:
        yield piece
        piece = next_piece(stage, count)


@intrinsic
def _call(typingctx, address, number, arguments):
    """Calls a compiled function by its address, with a number and the elements of a tuple.

    Their types must be those that the function was compiled for.
    """

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
    """Does what ``numba.set_num_threads`` does.

    A compiled function that calls the original cannot be cached, and calling it from Python takes microseconds.
    """
    kind = ir.FunctionType(ir.VoidType(), [_I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "set_num_threads")
    builder.call(function, [builder.trunc(count, _I32)])


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def launch(num_calls, num_threads, function, arguments):
    """Calls the function at an address with each number below ``num_calls`` and the arguments, on ``num_threads``."""
    if num_calls == 1:  # without OpenMP: waking its threads takes longer than a token of a small model
        _call(function, 0, arguments)
    else:
        _set_num_threads(num_threads)
        for number in prange(num_calls):
            _call(function, number, arguments)


def address_of(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """Compiles or loads a function for a thread number and arguments of these types, and returns its address.

    The function must be decorated with :data:`jit` and return nothing.
    """
    kinds = (types.int64, *map(typeof, arguments))
    kernel.compile(kinds)
    found = kernel.overloads[kinds]
    address: int = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
    return address


types_of = compute_fingerprint
"""Returns bytes that identify the types of arguments."""
