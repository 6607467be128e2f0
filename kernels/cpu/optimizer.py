"""Optimizers: one launch updates all parameters, however many and however small they are.

Each element is computed as NumPy would, operation by operation: results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from gradengine.kernels.rows import Rows

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
    options: Mapping[str, Any],
) -> None:
    dtype = _computed_in(values[0].dtype)
    numbers = [options[name] for name in ("lr", "momentum", "dampening", "weight_decay")]
    numbers[2] = 1 - numbers[2]
    given = map(dtype.type, (*numbers, -1 if options["maximize"] else 1))
    starts = np.array(fresh or [False], np.bool_)
    with Rows(dtype, values, grads, velocities or values) as rows:
        _sgd(get_num_threads(), *_table(rows), starts, *given, bool(options["nesterov"]))


def adam(
    values: Sequence[Array],
    grads: Sequence[Array],
    averages: Sequence[Array],
    squares: Sequence[Array],
    states: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    decoupled: bool,
) -> None:
    dtype = _computed_in(values[0].dtype)
    lr, betas, weight_decay = options["lr"], options["betas"], options["weight_decay"]
    # both averages start at 0, too low by these factors
    factors = np.array([[1 - beta ** state["step"] for beta in betas] for state in states])
    factors[:, 0] = lr / factors[:, 0]
    factors[:, 1] **= 0.5
    shrink, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
    sign = -1 if options["maximize"] else 1
    rest = (1 - betas[0], 1 - betas[1], options["eps"], shrink, decay, sign)
    given = map(dtype.type, (*betas, *rest))
    with Rows(dtype, values, grads, averages, squares) as rows:
        _adam(get_num_threads(), *_table(rows), factors.astype(dtype), *given)


def unscale(grads: Sequence[Array], factor: float) -> Array:
    found = np.zeros(1, np.float32)
    for grad in grads:
        found[0] = found[0] or not np.isfinite(grad).all()
        grad *= factor
    return found


def _computed_in(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.float32)  # float16 is computed in float32


def _table(rows: list[list[Array]]) -> tuple[Array, Array, Array]:
    """Give pieces of work, the rows' addresses, and an empty array that tells the dtype."""
    pieces = _pieces(tuple([array.size for array in rows[0]]))
    addresses = np.array([[_address(array) for array in row] for row in rows])
    return pieces, addresses, np.empty(0, rows[0][0].dtype)


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
