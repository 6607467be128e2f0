"""Elementwise formulas: one pass over memory, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from gradengine.kernels import PARALLEL_SIZE, has_kernels
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import (
    exponential,
    exponential_minus_1,
    full_exponential,
    normal,
)
from gradengine.kernels.layout import Array

PIECE = 1 << 12  # elements of one piece of work
SHORTEST = 16  # elements of rows: NumPy is as good for shorter ones
# Elements from which on a formula of one operation is worth a launch: below, one core's cache has all.
ARITHMETIC_SIZE = 1 << 18

_KERNELS: dict[str, tuple[Any, int]] = {}  # and from how many elements on


def elementwise(name: str, *operands: Any) -> Array | None:
    kernel, least = _KERNELS.get(name, (None, 0))
    if kernel is None:
        return None
    given = _alike(operands)
    if given is None:
        return _spread(kernel, least, operands)
    first = given[0]
    if first.size < least or not has_kernels(first):
        return None
    out = np.empty(first.shape, first.dtype)
    rows = [array.reshape(1, -1) for array in (*given, out)]
    kernel(get_num_threads(), *rows)
    return out


def _alike(operands: Sequence[Any]) -> Sequence[Array] | None:
    """Give operands of one shape and dtype that lie in C order: the common case, for which all is said."""
    first = operands[0]
    for operand in operands:
        if not isinstance(operand, np.ndarray) or operand.shape != first.shape:
            return None
        flags = operand.flags
        # To Numba a read-only array is another type: it would compile a second time.
        if operand.dtype != first.dtype or not (flags.c_contiguous and flags.writeable):
            return None
    return operands


def _spread(kernel: Any, least: int, operands: Sequence[Any]) -> Array | None:
    """Compute with operands that are broadcast, or lie in another order, or give None."""
    arrays = [operand for operand in operands if isinstance(operand, np.ndarray)]
    largest = max(arrays, key=_extent, default=np.empty(0))
    if largest.size < least or not has_kernels(largest):
        return None
    order = sorted(range(largest.ndim), key=lambda axis: -largest.strides[axis])
    in_order = largest.transpose(order)
    if any(array.dtype != largest.dtype for array in arrays) or not in_order.flags.c_contiguous:
        return None
    parts = [_part(operand, largest, order) for operand in operands]
    given = [part for part in parts if part is not None]
    length = _row_length(given, largest.size)
    if len(given) < len(parts) or length < SHORTEST:
        return None
    out = np.empty(in_order.shape, largest.dtype)
    rows = [part.reshape(-1, length) if part.size == out.size else part for part in given]
    kernel(get_num_threads(), *rows, out.reshape(-1, length))
    return out.transpose(sorted(order, key=order.__getitem__))


def _extent(array: Array) -> tuple[int, int]:
    return array.size, sum(map(abs, array.strides))  # what is expanded has smaller strides


def _part(operand: Any, largest: Array, order: Sequence[int]) -> Array | None:
    """Give what an operand repeats, as (rows, n): (1, n), (rows, 1), (1, 1), or (1, size) for all of it.

    None where it is neither that nor laid out as the largest operand, whose shape the result has.
    """
    if not isinstance(operand, np.ndarray):
        return np.full((1, 1), operand, largest.dtype)
    sizes = (1,) * (largest.ndim - operand.ndim) + operand.shape
    if len(sizes) > largest.ndim or any(
        n not in (1, most) for n, most in zip(sizes, largest.shape, strict=True)
    ):
        return None  # the largest repeats as well, or they do not fit
    operand = operand.reshape(sizes).transpose(order)
    if operand.size == largest.size and operand.flags.c_contiguous:
        return operand.reshape(1, -1) if operand.flags.writeable else None
    repeats = [n == 1 or not step for n, step in zip(operand.shape, operand.strides, strict=True)]
    if all(repeats):
        return operand[(slice(1),) * operand.ndim].reshape(1, 1).copy()
    shape = tuple([largest.shape[axis] for axis in order])
    first, last = repeats.index(False), len(shape) - repeats[::-1].index(False)
    row, column = prod(shape[first:]), prod(shape[:last])
    if 4 * min(row, column) > largest.size:
        return None
    if row <= column:
        return _expanded(operand[(0,) * first], shape[first:]).reshape(1, -1).copy()
    return (
        _expanded(operand[(..., *(0,) * (len(shape) - last))], shape[:last]).reshape(-1, 1).copy()
    )


def _expanded(array: Array, shape: tuple[int, ...]) -> Array:
    return array if array.shape == shape else np.broadcast_to(array, shape)


def _row_length(parts: Sequence[Array], size: int) -> int:
    """Give the n of the part that is (1, n) or (size / n, 1), or of all of it; of two parts one is all."""
    for part in parts:
        if 1 < part.size < size:
            return part.shape[1] if len(part) == 1 else size // len(part)
    return size


# ---- kernels -------------------------------------------------------------------------------------


@kernel_part
def _piece(x, row, start, room):
    """Give as many elements of a row of x, which may repeat, as there is room for."""
    values = x[row if len(x) > 1 else 0]
    if len(values) > 1:
        return values[start : start + len(room)]
    room[:] = values[0]
    return room


def _of_one(formula: Any, name: str) -> Any:
    def kernel(worker, workers, x, out):
        own = own_range(worker, workers, x.size)
        values, made = x[0, own.start : own.stop], out[0, own.start : own.stop]
        for i in range(len(made)):
            made[i] = formula(values[i])

    return parallel_kernel(kernel, variant=name)


def _of_two(formula: Any, name: str) -> Any:
    def kernel(worker, workers, x, y, out):
        rows, length = out.shape
        blocks = (length + PIECE - 1) // PIECE
        rooms = np.empty((2, min(length, PIECE)), out.dtype)
        for task in own_range(worker, workers, rows * blocks):
            row, start = task // blocks, task % blocks * PIECE
            made = out[row, start : start + PIECE]
            xs = _piece(x, row, start, rooms[0, : len(made)])
            ys = _piece(y, row, start, rooms[1, : len(made)])
            for i in range(len(made)):
                made[i] = formula(xs[i], ys[i])

    return parallel_kernel(kernel, variant=name)


def _formula(least: int = PARALLEL_SIZE) -> Callable[[Callable[..., Any]], None]:
    """Make a kernel of a function of one or two numbers of one dtype, under the function's name."""

    def keep(function: Callable[..., Any]) -> None:
        name = function.__name__.lstrip("_")
        make = _of_one if function.__code__.co_argcount == 1 else _of_two
        _KERNELS[name] = make(kernel_part(function), name), least

    return keep


# ---- formulas ------------------------------------------------------------------------------------
# Numbers that are written out would be float64, at half the speed: `type(x)(1)` is a one of x's dtype.


@_formula(ARITHMETIC_SIZE)
def _add(x, y):
    return x + y


@_formula(ARITHMETIC_SIZE)
def _sub(x, y):
    return x - y


@_formula(ARITHMETIC_SIZE)
def _rsub(x, y):
    return y - x


@_formula(ARITHMETIC_SIZE)
def _mul(x, y):
    return x * y


@_formula(ARITHMETIC_SIZE)
def _div(x, y):
    return np.divide(x, y)


@_formula(ARITHMETIC_SIZE)
def _square(x):
    return x * x


@_formula(ARITHMETIC_SIZE)
def _square_grad(grad, x):
    return grad * (type(x)(2) * x)


@_formula()
def _relu(x):
    return type(x)(0) if x <= type(x)(0) else x  # nan passes


@_formula()
def _relu_grad(grad, out):
    return type(grad)(0) if out == type(out)(0) else grad


@_formula()
def _exp(x):
    return full_exponential(x)


@_formula()
def _sigmoid(x):
    return _logistic(x)


@kernel_part
def _logistic(x):
    """Give 1 / (1 + exp(-x)), in terms of exp(-|x|), which does not overflow."""
    one = type(x)(1)
    decay = exponential(-abs(x))
    return np.divide(one if x >= type(x)(0) else decay, one + decay)


@_formula()
def _sigmoid_grad(grad, out):
    return grad * (out - out * out)


@_formula()
def _silu(x):
    return x * _logistic(x)


@_formula()
def _silu_grad(grad, x):
    one, share = type(x)(1), _logistic(x)
    return grad * (share * (one + x * (one - share)))


@_formula()
def _tanh(x):
    return _hyperbolic_tangent(x)


@kernel_part
def _hyperbolic_tangent(x):
    # exp(-2 |x|) - 1 does not overflow and is exact near 0
    fall = exponential_minus_1(type(x)(-2) * abs(x))
    size = np.divide(-fall, type(x)(2) + fall)
    signed = size if x > type(x)(0) else -size
    return x if x == type(x)(0) else signed


@_formula()
def _tanh_grad(grad, out):
    return grad - grad * out * out


@_formula()
def _gelu(x):
    below, _ = normal(x)
    return x * below


@_formula()
def _gelu_grad(grad, x):
    below, density = normal(x)
    return grad * (below + x * density)


@_formula()
def _gelu_tanh(x):
    return type(x)(0.5) * x * (type(x)(1) + _hyperbolic_tangent(_gelu_inner(x)))


@_formula()
def _gelu_tanh_grad(grad, x):
    one, half, square = type(x)(1), type(x)(0.5), x * x
    curve = _hyperbolic_tangent(_gelu_inner(x))
    slope = type(x)(0.7978845608028654) * (one + type(x)(3 * 0.044715) * square)
    return grad * (half * (one + curve) + half * x * ((one - curve * curve) * slope))


@kernel_part
def _gelu_inner(x):
    return type(x)(0.7978845608028654) * (x + type(x)(0.044715) * (x * x * x))
