"""What one number is made of a row in cache: in vectors, and alike on any number of threads."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from gradengine.kernels.cpu.launch import kernel_part, summing_part
from gradengine.kernels.cpu.simd import intrinsic

# Terms that are added in the row's own dtype before float64 takes them up: in the lanes of vectors so
# few keep float32's digits.
TERMS = 1024


@intrinsic
def _ordered(typing_context, value):
    """Give a float's bits as an integer, ordered as floats are: those of negative ones turned round."""
    kind: Any = types.int32 if value == types.float32 else types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _turned(builder, builder.bitcast(arguments[0], ir.IntType(kind.bitwidth)))

    return kind(value), generate


@intrinsic
def _value_of(typing_context, ordered):
    """Give the float that `_ordered` made an integer of."""
    kind = types.float32 if ordered == types.int32 else types.float64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_turned(builder, arguments[0]), context.get_value_type(kind))

    return kind(ordered), generate


def _turned(builder: Any, bits: Any) -> Any:
    """Turn round, where the sign's bit is set, all the others."""
    signs = builder.ashr(bits, bits.type(bits.type.width - 1))
    return builder.xor(bits, builder.lshr(signs, bits.type(1)))


@kernel_part
def largest(values):
    """Give the largest of floats, of which there is one at least; with nan among them, any number.

    A maximum of floats becomes no vectors, since nan makes it depend on the order; of integers it does.
    """
    most = _ordered(values[0])
    for i in range(len(values)):
        bits = _ordered(values[i])
        most = bits if bits > most else most
    return _value_of(most)


@summing_part
def sum_of(values):
    total = 0.0
    for start in range(0, len(values), TERMS):
        piece, part = values[start : start + TERMS], values.dtype.type(0)
        for i in range(len(piece)):
            part += piece[i]
        total += part
    return total


@summing_part
def sum_of_products(values, others):
    total = 0.0
    for start in range(0, len(values), TERMS):
        piece, factors = values[start : start + TERMS], others[start : start + TERMS]
        part = values.dtype.type(0)
        for i in range(len(piece)):
            part += piece[i] * factors[i]
        total += part
    return total


@summing_part
def sum_of_squares(values, center):
    """Sum the squared distances from a number."""
    total = 0.0
    for start in range(0, len(values), TERMS):
        piece, part = values[start : start + TERMS], values.dtype.type(0)
        for i in range(len(piece)):
            distance = piece[i] - center
            part += distance * distance
        total += part
    return total
