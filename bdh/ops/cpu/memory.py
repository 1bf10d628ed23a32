"""Single numbers in memory, by address."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_BYTE, _F32 = ir.IntType(8), ir.FloatType()


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
        return builder.load(builder.inttoptr(arguments[0], _BYTE.as_pointer()))

    return types.uint8(types.int64), codegen


@intrinsic
def put_byte(typingctx, address, value):
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint8), codegen
