"""Optimizers: one launch updates all parameters, however many and however small they are.

Each element is computed as NumPy would, operation by operation: results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_size_t
from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import intrinsic

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

# Elements of one piece of work: few, so that all cores end together.
PIECE = 1 << 14

# Where an ndarray object keeps its address: NumPy's binary interface makes it the first field after
# those of every Python object. `array.ctypes.data` takes five times as long.
ADDRESS_OFFSET = object.__basicsize__


def sgd(
    values: Sequence[Array],
    grads: Sequence[Array],
    velocities: Sequence[Array],
    fresh: Sequence[bool],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    with _Table(values, grads, velocities or values) as table:
        numbers = (lr, momentum, 1 - dampening, weight_decay, -1 if maximize else 1)
        given = (table.scalar(number) for number in numbers)
        starts = np.array(fresh or [False], np.bool_)
        _sgd(get_num_threads(), *table.arguments, starts, *given, nesterov)


def adam(
    values: Sequence[Array],
    grads: Sequence[Array],
    averages: Sequence[Array],
    squares: Sequence[Array],
    steps: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    with _Table(values, grads, averages, squares) as table:
        # both averages start at 0, too low by these factors
        factors = np.array([[1 - beta**step for beta in betas] for step in steps])
        factors[:, 0] = lr / factors[:, 0]
        factors[:, 1] **= 0.5
        shrink, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
        rest = (1 - betas[0], 1 - betas[1], eps, shrink, decay, -1 if maximize else 1)
        given = (table.scalar(number) for number in (*betas, *rest))
        _adam(get_num_threads(), *table.arguments, factors.astype(table.dtype), *given)


class _Table:
    """The addresses of arrays whose elements belong together: one row for values, grads and so on.

    Arrays that a compiled function cannot walk along with the values take part as copies, and on
    leaving those that may be written, all rows but the second, are copied back.
    """

    def __init__(self, values: Sequence[Array], *others: Sequence[Array]) -> None:
        self.dtype = np.result_type(values[0].dtype, np.float32)  # float16 is computed in float32
        self._given = (values, *others)
        dense = [_dense(array, self.dtype) for array in values]
        rows = [list(map(_alike, row, dense)) for row in others]
        self._rows = [dense, *rows]

    def __enter__(self) -> _Table:
        pieces = _pieces(tuple([array.size for array in self._rows[0]]))
        addresses = np.array([[_address(array) for array in row] for row in self._rows])
        self.arguments = (pieces, addresses, np.empty(0, self.dtype))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for place, (row, given) in enumerate(zip(self._rows, self._given, strict=True)):
            for array, target in zip(row, given, strict=True):
                if array is not target and place != 1:
                    target[...] = array

    def scalar(self, number: float) -> Any:
        """Give a number as the kernels compute with it."""
        return self.dtype.type(number)


def _dense(array: Array, dtype: np.dtype) -> Array:
    """Give the array itself if its elements fill a piece of memory, else a copy."""
    fills = array.flags.c_contiguous or _fills(array.shape, array.strides, array.itemsize)
    if fills and array.dtype == dtype and array.flags.writeable:
        return array
    return np.array(array, dtype, order="C")


def _alike(array: Array, like: Array) -> Array:
    """Give the array itself if its memory is laid out as that of `like`, else a copy that is."""
    same = array.strides == like.strides or _same_order(array.shape, array.strides, like.strides)
    # NumPy's scalars, which are no ndarray, have a dtype and strides too.
    if same and array.dtype == like.dtype and isinstance(array, np.ndarray):
        return array
    copied = np.empty_like(like)
    copied[...] = array
    return copied


@lru_cache(1024)
def _fills(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected = itemsize
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@lru_cache(1024)
def _same_order(shape: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a == b for size, a, b in zip(shape, one, other, strict=True) if size != 1)


def _address(array: Array) -> int:
    return c_size_t.from_address(id(array) + ADDRESS_OFFSET).value


@lru_cache(64)
def _pieces(sizes: tuple[int, ...]) -> Array:
    """Give (array, first element, number of elements) for each piece of arrays of these sizes."""
    found = [
        (place, start, min(PIECE, size - start))
        for place, size in enumerate(sizes)
        for start in range(0, size, PIECE)
    ]
    return np.array(found, np.int64).reshape(len(found), 3)


def _pointer_to(_context, address):
    def generate(_target, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_pointer_to)


@parallel_kernel
def _sgd(
    worker, workers, pieces, addresses, like, fresh, lr, momentum, share, weight_decay, sign,
    nesterov,
):  # fmt: skip
    """pieces (n, 3), addresses (3, arrays) of values, grads and velocities, fresh (arrays,)."""
    for piece in own_range(worker, workers, len(pieces)):
        place, start, count = pieces[piece]
        offset = start * like.itemsize
        value = carray(_pointer(addresses[0, place] + offset), (count,), like.dtype)
        grad = carray(_pointer(addresses[1, place] + offset), (count,), like.dtype)
        velocity = carray(_pointer(addresses[2, place] + offset), (count,), like.dtype)
        starts = momentum != 0 and fresh[place]
        for i in range(count):
            step = sign * grad[i]
            if weight_decay != 0:
                step += weight_decay * value[i]
            if momentum != 0:
                moved = step if starts else momentum * velocity[i] + share * step
                velocity[i] = moved
                step = step + momentum * moved if nesterov else moved
            value[i] -= lr * step


@parallel_kernel
def _adam(
    worker, workers, pieces, addresses, like, factors, keep, keep_square, add, add_square, eps,
    shrink, decay, sign,
):  # fmt: skip
    """pieces (n, 3), addresses (4, arrays), factors (arrays, 2)."""
    for piece in own_range(worker, workers, len(pieces)):
        place, start, count = pieces[piece]
        offset = start * like.itemsize
        value = carray(_pointer(addresses[0, place] + offset), (count,), like.dtype)
        grad = carray(_pointer(addresses[1, place] + offset), (count,), like.dtype)
        average = carray(_pointer(addresses[2, place] + offset), (count,), like.dtype)
        square = carray(_pointer(addresses[3, place] + offset), (count,), like.dtype)
        rate, root_factor = factors[place]
        for i in range(count):
            before = value[i] * shrink
            step = sign * grad[i]
            if decay != 0:
                step += decay * before
            mean = average[i] * keep + add * step
            mean_square = square[i] * keep_square + add_square * (step * step)
            average[i] = mean
            square[i] = mean_square
            root = np.divide(np.sqrt(mean_square), root_factor) + eps
            value[i] = before - rate * np.divide(mean, root)
