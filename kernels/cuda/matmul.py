"""Matrix products: cuBLAS through CuPy."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.layout import Array


def matmul(x: Array, y: Array) -> Array:
    return array_module(x).matmul(x, y)
