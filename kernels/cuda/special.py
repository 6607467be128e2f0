"""Special functions, element by element."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, THREADS, blocks, is_dense
from gradengine.kernels.layout import Array

SOURCE = "special.cu"
_ELEMENTS = ("float16", "bfloat16", "float", "double")
KERNELS = {
    SOURCE: tuple(
        f"{name}_elements<{element}>" for name in ("erf", "sigmoid") for element in _ELEMENTS
    )
}


def erf(x: Array) -> Array:
    return _of_elements("erf", x)


def sigmoid(x: Array) -> Array:
    return _of_elements("sigmoid", x)


def _of_elements(name: str, x: Array) -> Array:
    """Give what a kernel makes of the elements, in memory as they lie."""
    elements = x if is_dense(x) else x.copy(order="K")
    out = array_module(x).empty_like(elements)
    if x.size:
        packs = -(-x.size * x.dtype.itemsize // PACK_BYTES)
        run = kernel(SOURCE, f"{name}_elements<{c_name(x.dtype)}>")
        run((blocks(packs),), (THREADS,), (_with_axes(elements), _with_axes(out), x.size))
    return out


def _with_axes(x: Array) -> Array:
    return x if x.ndim else x.reshape(1)
