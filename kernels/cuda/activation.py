"""Rectifiers."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.layout import Array


def relu(x: Array) -> Array:
    return array_module(x).maximum(x, 0)


def relu_grad(grad: Array, out: Array) -> Array:
    xp = array_module(grad)
    passed = xp.where(out == 0, xp.zeros((), grad.dtype), grad)
    return passed.astype(grad.dtype, copy=False)  # CuPy's where makes bfloat16 float32
