"""Special functions, element by element."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, THREADS, blocks, is_dense
from gradengine.kernels.layout import Array

KERNELS = {
    "special.cu": tuple(
        f"erf_elements<{name}>" for name in ("float16", "bfloat16", "float", "double")
    )
}


def erf(x: Array) -> Array:
    elements = x if is_dense(x) else x.copy(order="K")
    out = array_module(x).empty_like(elements)
    if x.size:
        packs = -(-x.size * x.dtype.itemsize // PACK_BYTES)
        run = kernel("special.cu", f"erf_elements<{c_name(x.dtype)}>")
        run((blocks(packs),), (THREADS,), (_with_axes(elements), _with_axes(out), x.size))
    return out


def _with_axes(x: Array) -> Array:
    return x if x.ndim else x.reshape(1)
