"""The gradient of relu where arrays are small, or lie unlike each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import vectorize

from gradengine.kernels.layout import Array


def relu_grad(grad: Array, out: Array) -> Array:
    if grad.dtype.itemsize == 2:  # 16-bit floats, which Numba does not compile for CPUs
        return np.where(out == 0, np.zeros((), grad.dtype), grad)
    return _pass_where_nonzero(grad, out)


def _pass_grad(grad, out):
    return type(grad)(0) if out == 0 else grad  # `<=` would warn of nan


# A NumPy ufunc: any shapes, strides and sizes, at a ufunc's small cost of a call.
_pass_where_nonzero: Any = vectorize(
    ["float32(float32, float32)", "float64(float64, float64)"], cache=True
)(_pass_grad)
