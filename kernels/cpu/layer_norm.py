"""Layer normalization along rows: each is read from memory once, then stays in cache."""

from __future__ import annotations

import numpy as np

from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel, summing_part
from gradengine.kernels.cpu.layout import kernel_rows
from gradengine.kernels.cpu.normalization import BLOCK_ROWS, MOST_PARTS, as_vector
from gradengine.kernels.cpu.reductions import TERMS, sum_of, sum_of_squares
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

LEAST_ROWS = 32  # of a part that sums are cut into: of fewer, the sums would be much of the work


def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    rows, length = kernel_rows(x), x.shape[-1]
    out = np.empty_like(rows)
    mean, inv_std = np.empty((2, len(rows)), x.dtype)
    weight = np.ones(length, x.dtype) if weight is None else as_vector(weight, x.dtype)
    bias = np.zeros(length, x.dtype) if bias is None else as_vector(bias, x.dtype)
    _normalize(get_num_threads(), rows, weight, bias, eps, mean, inv_std, out)
    return out.reshape(x.shape), mean, inv_std


def layer_norm_grad(
    grad: Array, x: Array, weight: Array | None, mean: Array, inv_std: Array, wants_vectors: bool
) -> tuple[Array, Array | None, Array | None]:
    grads, rows, length = kernel_rows(grad), kernel_rows(x), x.shape[-1]
    by_x = np.empty_like(rows)
    weight = np.ones(length, x.dtype) if weight is None else as_vector(weight, x.dtype)
    statistics = as_vector(mean, x.dtype), as_vector(inv_std, x.dtype)
    # Cut by size alone, and added in order: any thread count gives equal bits.
    count = min(MOST_PARTS, -(-len(rows) // LEAST_ROWS))
    parts = np.zeros((count, 2, length if wants_vectors else 0))
    _grad(get_num_threads(), grads, rows, weight, *statistics, by_x, parts)
    by_x = by_x.reshape(x.shape)
    return (by_x, *parts.sum(axis=0).astype(x.dtype)) if wants_vectors else (by_x, None, None)


@parallel_kernel
def _normalize(worker, workers, x, weight, bias, eps, mean, inv_std, out):
    for row in own_range(worker, workers, len(x)):
        values, made, length = x[row], out[row], x.shape[1]
        center = x.dtype.type(np.divide(sum_of(values), length))
        variance = np.divide(sum_of_squares(values, center), length)
        scale = x.dtype.type(np.divide(1.0, np.sqrt(variance + eps)))
        for i in range(length):
            made[i] = (values[i] - center) * scale * weight[i] + bias[i]
        mean[row], inv_std[row] = center, scale


@parallel_kernel
def _grad(worker, workers, grad, x, weight, mean, inv_std, by_x, parts):
    """Fill by_x (rows, length); add to parts (parts, 2, length) what each gives by weight and bias.

    Where these are not wanted, parts is (parts, 2, 0).
    """
    rows, length = len(x), parts.shape[2]
    sums = np.empty((2, length), x.dtype)
    for part in own_range(worker, workers, len(parts)):
        stop = (part + 1) * rows // len(parts)
        for block in range(part * rows // len(parts), stop, BLOCK_ROWS):
            sums[:] = 0
            for row in range(block, min(block + BLOCK_ROWS, stop)):
                _row_grad(grad[row], x[row], weight, mean[row], inv_std[row], by_x[row], sums)
            for i in range(length):
                parts[part, 0, i] += sums[0, i]
                parts[part, 1, i] += sums[1, i]


@kernel_part
def _row_grad(grad, x, weight, mean, inv_std, by_x, sums):
    """Fill by_x with inv_std * (g - mean(g) - x_hat * mean(g * x_hat)), of g = grad * weight."""
    by_weight, by_bias = sums[0], sums[1]
    total, along = _grad_sums(grad, x, weight, mean)
    mean_grad = x.dtype.type(np.divide(total, len(x)))
    mean_along = x.dtype.type(np.divide(along * inv_std, len(x)))
    for i in range(len(x)):
        normal = (x[i] - mean) * inv_std
        by_x[i] = inv_std * (grad[i] * weight[i] - mean_grad - normal * mean_along)
    for i in range(len(by_weight)):
        by_weight[i] += grad[i] * ((x[i] - mean) * inv_std)
        by_bias[i] += grad[i]


@summing_part
def _grad_sums(grad, x, weight, mean):
    """Sum g = grad * weight, and g * (x - mean)."""
    total, along = 0.0, 0.0
    for start in range(0, len(x), TERMS):
        stop = start + TERMS
        grads, values, scales = grad[start:stop], x[start:stop], weight[start:stop]
        part, part_along = x.dtype.type(0), x.dtype.type(0)
        for i in range(len(values)):
            weighted = grads[i] * scales[i]
            part += weighted
            part_along += weighted * (values[i] - mean)
        total += part
        along += part_along
    return total, along
