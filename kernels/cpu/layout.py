"""Conversions: to the layout in which kernels compute, and of element type."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from gradengine.kernels import PARALLEL_SIZE, has_kernels
from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.simd import lanes, pointer, transpose
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

BLOCK_ROWS, BLOCK_COLUMNS = 64, 256  # of one piece of work: what it writes stays in cache


def kernel_input(x: Array) -> Array:
    """Give x (N, C, H, W) as the (N, H, W, C) array that a compiled function takes."""
    array = x.transpose(0, 2, 3, 1)
    # To Numba a read-only array is another type: it would compile everything a second time.
    return array if array.flags.c_contiguous and array.flags.writeable else copy_in_order(array)


def kernel_rows(x: Array) -> Array:
    """Give x (..., n) as the (rows, n) array that a compiled function takes."""
    array = np.ascontiguousarray(x).reshape(prod(x.shape[:-1]), x.shape[-1])
    return array if array.flags.writeable else array.copy()


def copy_in_order(x: Array) -> Array:
    """Give a copy of x in C order; matrices that lie transposed are copied by squares on all cores."""
    found = _transposed(x) if x.size >= PARALLEL_SIZE and x.flags.writeable else None
    if found is None:
        return x.copy(order="C")
    out = np.empty(x.shape, x.dtype)
    batch, rows, columns = found.shape
    _transpose(get_num_threads(), found, out.reshape(batch, columns, rows))
    return out


def _transposed(x: Array) -> Array | None:
    """Give x as (batch, rows, columns), C-contiguous, if x is that with rows and columns swapped."""
    if not has_kernels(x):
        return None
    x = x.squeeze()
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    moved = next((axis for axis in range(x.ndim) if order[axis] != axis), None)
    if moved is None:
        return None
    row, lies = order[moved], x.transpose(order)
    swapped = [*range(moved), *range(row, x.ndim), *range(moved, row)]
    if order != swapped or not lies.flags.c_contiguous:
        return None
    return lies.reshape(prod(x.shape[:moved]), prod(x.shape[row:]), -1)


def cast_all(arrays: Sequence[Array], dtype: np.dtype) -> Sequence[Array]:
    return [array.astype(dtype) for array in arrays]


@parallel_kernel
def _transpose(worker, workers, x, out):
    """Copy x (B, R, C) to out (B, C, R)."""
    batch, rows, columns = x.shape
    down = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    across = (columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    for task in own_range(worker, workers, batch * down * across):
        matrix, block = task // (down * across), task % (down * across)
        row, column = block // across * BLOCK_ROWS, block % across * BLOCK_COLUMNS
        stop, stop_column = min(row + BLOCK_ROWS, rows), min(column + BLOCK_COLUMNS, columns)
        whole = row + (stop - row) // lanes(x) * lanes(x)
        whole_column = column + (stop_column - column) // lanes(x) * lanes(x)
        for i in range(row, whole, lanes(x)):
            for j in range(column, whole_column, lanes(x)):
                source = pointer(x, (matrix * rows + i) * columns + j)
                transpose(source, columns, pointer(out, (matrix * columns + j) * rows + i), rows)
        for i in range(row, stop):
            source = pointer(x, (matrix * rows + i) * columns)
            target = pointer(out, matrix * columns * rows + i)
            for j in range(column if i >= whole else whole_column, stop_column):
                target[j * rows] = source[j]
