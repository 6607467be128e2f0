"""Elementwise formulas that CuPy has no function for: one pass over memory, whatever its order."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, is_dense
from gradengine.kernels.layout import Array
from gradengine.kernels.rows import alike

SOURCE = "elementwise.cu"
# As in the source: threads of a block, and packs of a thread, of all inputs together.
THREADS = 256
AT_ONCE = 4

_FORMULAS = (
    *("relu", "relu_grad", "erf", "sigmoid", "sigmoid_grad", "tanh_grad", "silu", "silu_grad"),
    *("gelu", "gelu_grad", "gelu_tanh", "gelu_tanh_grad"),
)
_ELEMENTS = ("float16", "bfloat16", "float", "double")
KERNELS = {
    SOURCE: tuple(f"{name}_elements<{element}>" for name in _FORMULAS for element in _ELEMENTS)
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def elementwise(name: str, *operands: Array) -> Array | None:
    served = name in _FORMULAS and operands[0].dtype.name in _DTYPES
    return formula(name, *operands) if served else None


def formula(name: str, *operands: Array) -> Array:
    """Compute one of the formulas of floating point arrays of one shape."""
    like = next((array for array in operands if is_dense(array)), None)
    like = operands[0].copy() if like is None else like
    given = [alike(array, like) for array in operands]
    out = array_module(like).empty_like(like)
    size = out.size
    if size:
        of_block = THREADS * (AT_ONCE // len(operands)) * PACK_BYTES
        blocks = -(-out.nbytes // of_block)
        run = kernel(SOURCE, f"{name}_elements<{c_name(out.dtype)}>")
        flat = [array if array.ndim else array[None] for array in (*given, out)]
        run((blocks,), (THREADS,), (*flat, size))
    return out
