"""Rectifiers: one pass over memory in whatever order its elements lie."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, is_aligned, is_dense
from gradengine.kernels.layout import Array

SOURCE = "activation.cu"
# As in the source: threads of a block, and packs of a thread.
THREADS = 256
AT_ONCE = 4

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_TYPES = (
    *("float16, 8", "bfloat16, 8", "float, 4", "double, 2"),
    *("float16, 1", "bfloat16, 1", "float, 1", "double, 1"),
)
KERNELS = {SOURCE: tuple(f"{name}<{types}>" for name in ("relu", "relu_grad") for types in _TYPES)}


def relu(x: Array) -> Array:
    if x.dtype.name not in _DTYPES:
        return array_module(x).maximum(x, 0)
    x = x if is_dense(x) else x.copy()
    out = array_module(x).empty_like(x)
    _run("relu", x, out)
    return out


def relu_grad(grad: Array, out: Array) -> Array:
    xp = array_module(grad)
    out = out if is_dense(out) else out.copy()
    if grad.strides != out.strides or grad.dtype != out.dtype or not is_dense(grad):
        given, grad = grad, xp.empty_like(out)
        grad[...] = given
    grad_x = xp.empty_like(out)
    _run("relu_grad", grad, out, grad_x)
    return grad_x


def _run(name: str, *arrays: Array) -> None:
    """Run a kernel on arrays of one dtype whose elements lie in one order."""
    size, dtype = arrays[0].size, arrays[0].dtype
    if not size:
        return
    width = PACK_BYTES // dtype.itemsize
    if size % width or not is_aligned(*arrays):
        width = 1
    blocks = -(-size // (width * THREADS * AT_ONCE))
    run = kernel(SOURCE, f"{name}<{c_name(dtype)}, {width}>")
    flat = (array if array.ndim else array[None] for array in arrays)
    run((blocks,), (THREADS,), (*flat, size // width))
