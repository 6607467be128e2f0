"""Softmax cross entropy: one pass over each row of scores forward, one back."""

from __future__ import annotations

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.rows import BLOCK, TEAMS, in_rows, run_rows
from gradengine.kernels.layout import Array

_TARGETS = {
    np.dtype(np.int64): "long long",
    np.dtype(np.int32): "int",
    np.dtype(np.int16): "short",
    np.dtype(np.int8): "signed char",
    np.dtype(np.uint64): "unsigned long long",
    np.dtype(np.uint32): "unsigned int",
    np.dtype(np.uint16): "unsigned short",
    np.dtype(np.uint8): "unsigned char",
}
_PAIRS = tuple(
    f"{dtype}, {target}"
    for dtype in ("float16", "bfloat16", "float", "double")
    for target in ("long long", "int", "unsigned char")
)
KERNELS = {
    "loss.cu": (
        *(
            f"{name}<{pair}, {threads}>"
            for name in ("softmax_cross_entropy", "softmax_cross_entropy_grad")
            for pair in _PAIRS
            for threads in TEAMS
        ),
        *(f"class_scale<{pair}>" for pair in _PAIRS),
    )
}


def softmax_cross_entropy(x: Array, target: Array) -> tuple[Array, Array]:
    xp = array_module(x)
    losses = xp.empty(len(x), x.dtype)
    shifts = xp.empty((len(x), 2), np.float64 if x.dtype == np.float64 else np.float32)
    _run("softmax_cross_entropy", x, target, (in_rows(x), in_rows(target), losses, shifts))
    return losses, shifts


def softmax_cross_entropy_grad(grad: Array, x: Array, target: Array, shifts: Array) -> Array:
    out = array_module(x).empty(x.shape, x.dtype)
    arrays = (*map(in_rows, (grad, x, target, shifts)), out)
    _run("softmax_cross_entropy_grad", x, target, arrays)
    return out


def class_scale(
    target: Array, weight: Array | None, ignore_index: int, classes: int, dtype: np.dtype
) -> tuple[Array, Array]:
    xp = array_module(target)
    flat = xp.ascontiguousarray(target).reshape(-1)
    safe, scale = xp.empty(flat.shape, flat.dtype), xp.empty(flat.shape, dtype)
    if flat.size:
        weight = None if weight is None else xp.ascontiguousarray(weight)
        run = kernel("loss.cu", f"class_scale<{c_name(dtype)}, {_TARGETS[flat.dtype]}>")
        arguments = (flat, weight, safe, scale, flat.size, classes, ignore_index)
        run((-(-flat.size // BLOCK),), (BLOCK,), arguments)
    return safe.reshape(target.shape), scale.reshape(target.shape)


def _run(name: str, x: Array, target: Array, arrays: tuple[Array, ...]) -> None:
    run_rows("loss.cu", f"{name}<{c_name(x.dtype)}, {_TARGETS[target.dtype]}", x.shape, *arrays)
