"""Rectifiers, on all cores where arrays are long enough, by NumPy where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import vectorize

from gradengine.kernels import PARALLEL_SIZE
from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

# Elements of one piece of work.
ROW_ELEMENTS = 1 << 12


def relu(x: Array) -> Array:
    flat = _flat(x)
    if flat is None:
        return np.maximum(x, 0)
    out = np.empty_like(x)
    _relu(get_num_threads(), *flat, out.ravel("K"))
    return out


def relu_grad(grad: Array, out: Array) -> Array:
    flat = _flat(grad, out)
    if flat is not None:
        by_x = np.empty_like(grad)
        _relu_grad(get_num_threads(), *flat, by_x.ravel("K"))
        return by_x
    if grad.dtype.itemsize == 2:  # 16-bit floats, which Numba does not compile for CPUs
        return np.where(out == 0, np.zeros((), grad.dtype), grad)
    return _pass_where_nonzero(grad, out)


def _flat(first: Array, *others: Array) -> tuple[Array, ...] | None:
    """Give long arrays of one layout without gaps as vectors of their memory, or else None."""
    if first.size < PARALLEL_SIZE or first.dtype not in (np.float32, np.float64):
        return None
    like = (first.shape, first.strides, first.dtype)
    if any((other.shape, other.strides, other.dtype) != like for other in others):
        return None
    vectors = tuple([array.ravel("K") for array in (first, *others)])
    if not np.may_share_memory(vectors[0], first):  # there were gaps: these are copies
        return None
    # To Numba a read-only array is another type: it would compile a second time.
    return vectors if all(vector.flags.writeable for vector in vectors) else None


def _pass_grad(grad, out):
    return type(grad)(0) if out == 0 else grad  # `<=` would warn of nan


# A NumPy ufunc: any shapes, strides and sizes, at a ufunc's small cost of a call.
_pass_where_nonzero: Any = vectorize(
    ["float32(float32, float32)", "float64(float64, float64)"], cache=True
)(_pass_grad)


@parallel_kernel
def _relu(worker, workers, x, out):
    zero = x.dtype.type(0)
    for row in own_range(worker, workers, (len(x) + ROW_ELEMENTS - 1) // ROW_ELEMENTS):
        values = x[row * ROW_ELEMENTS : (row + 1) * ROW_ELEMENTS]
        target = out[row * ROW_ELEMENTS : (row + 1) * ROW_ELEMENTS]
        for i in range(len(values)):
            target[i] = zero if values[i] <= zero else values[i]  # nan passes


@parallel_kernel
def _relu_grad(worker, workers, grad, gate, out):
    zero = grad.dtype.type(0)
    for row in own_range(worker, workers, (len(grad) + ROW_ELEMENTS - 1) // ROW_ELEMENTS):
        values = grad[row * ROW_ELEMENTS : (row + 1) * ROW_ELEMENTS]
        gates = gate[row * ROW_ELEMENTS : (row + 1) * ROW_ELEMENTS]
        target = out[row * ROW_ELEMENTS : (row + 1) * ROW_ELEMENTS]
        for i in range(len(values)):
            target[i] = zero if gates[i] == zero else values[i]
