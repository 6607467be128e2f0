"""Layer normalization along rows: one launch forward; back one along the rows, one along columns."""

from __future__ import annotations

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.rows import TEAMS, in_rows, run_rows
from gradengine.kernels.layout import Array

SOURCE = "layer_norm.cu"
# As in the source
COLUMNS, LANES = 32, 8
# Sums are cut into parts by size alone: always in the same order, and enough blocks for a GPU.
ROWS_OF_PART = 64
MOST_BLOCKS = 1024

_ELEMENTS = ("float16", "bfloat16", "float", "double")
KERNELS = {
    SOURCE: (
        *(
            f"{name}<{element}, {threads}>"
            for name in ("layer_norm", "layer_norm_grad")
            for element in _ELEMENTS
            for threads in TEAMS
        ),
        *(f"layer_norm_sums<{element}>" for element in _ELEMENTS),
    )
}


def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    xp, wide = array_module(x), _sum_dtype(x)
    out = xp.empty(x.shape, x.dtype)
    mean, inv_std = xp.empty(len(x), wide), xp.empty(len(x), wide)
    vectors = [None if vector is None else in_rows(vector) for vector in (weight, bias)]
    name = f"layer_norm<{c_name(x.dtype)}"
    run_rows(SOURCE, name, x.shape, in_rows(x), *vectors, float(eps), mean, inv_std, out)
    return out, mean, inv_std


def layer_norm_grad(
    grad: Array, x: Array, weight: Array | None, mean: Array, inv_std: Array, wants_vectors: bool
) -> tuple[Array, Array | None, Array | None]:
    grad, x, mean, inv_std = map(in_rows, (grad, x, mean, inv_std))
    weight = None if weight is None else in_rows(weight)
    by_x = array_module(x).empty(x.shape, x.dtype)
    name = f"layer_norm_grad<{c_name(x.dtype)}"
    run_rows(SOURCE, name, x.shape, grad, x, weight, mean, inv_std, by_x)
    return (by_x, *_sums(grad, x, mean, inv_std)) if wants_vectors else (by_x, None, None)


def _sums(grad: Array, x: Array, mean: Array, inv_std: Array) -> Array:
    """Give the gradients by weight and bias, (2, length)."""
    rows, length = x.shape
    blocks = -(-length // COLUMNS)
    count = max(1, min(-(-rows // ROWS_OF_PART), MOST_BLOCKS // max(1, blocks)))
    parts = array_module(x).zeros((count, 2, length), mean.dtype)
    if x.size:
        run = kernel(SOURCE, f"layer_norm_sums<{c_name(x.dtype)}>")
        arguments = (grad, x, mean, inv_std, parts, rows, length)
        run((blocks, count), (COLUMNS * LANES,), arguments)
    return parts.sum(axis=0).astype(x.dtype, copy=False)


def _sum_dtype(x: Array) -> np.dtype:
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
