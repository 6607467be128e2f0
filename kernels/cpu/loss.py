"""Softmax cross entropy: one pass over each row of scores forward, one back."""

from __future__ import annotations

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_rows
from gradengine.kernels.cpu.normalization import as_vector
from gradengine.kernels.cpu.reductions import largest, sum_of
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import exponential
from gradengine.kernels.layout import Array


def softmax_cross_entropy(x: Array, target: Array) -> tuple[Array, Array]:
    scores = kernel_rows(x)
    losses = np.empty(len(scores), x.dtype)
    shifts = np.empty((len(scores), 2), x.dtype)
    _cross_entropy(get_num_threads(), scores, target.astype(np.int64), losses, shifts)
    return losses, shifts


def softmax_cross_entropy_grad(grad: Array, x: Array, target: Array, shifts: Array) -> Array:
    scores = kernel_rows(x)
    out = np.empty_like(scores)
    _cross_entropy_grad(
        get_num_threads(), as_vector(grad, x.dtype), scores, target.astype(np.int64), shifts, out
    )
    return out


def class_scale(
    target: Array, weight: Array | None, ignore_index: int, classes: int, dtype: np.dtype
) -> tuple[Array, Array]:
    ignored = target == ignore_index
    known = (target >= 0) & (target < classes) & ~ignored
    safe = np.where(known, target, 0).astype(target.dtype, copy=False)
    scale = np.ones(target.shape, dtype) if weight is None else weight[safe]
    unknown = np.where(ignored, 0, np.nan).astype(dtype)
    return safe, np.where(known, scale, unknown)


@parallel_kernel
def _cross_entropy(worker, workers, x, target, losses, shifts):
    """x (rows, classes), target and losses (rows,), shifts (rows, 2): maximum, log of the sum."""
    powers = np.empty(x.shape[1], x.dtype)
    for row in own_range(worker, workers, len(x)):
        values = x[row]
        peak = largest(values)
        for i in range(len(values)):
            powers[i] = exponential(values[i] - peak)
        shifts[row, 0] = peak
        shifts[row, 1] = np.log(sum_of(powers))
        losses[row] = shifts[row, 1] - (values[target[row]] - peak)


@parallel_kernel
def _cross_entropy_grad(worker, workers, grad, x, target, shifts, out):
    """grad and target (rows,), x and out (rows, classes), shifts (rows, 2)."""
    for row in own_range(worker, workers, len(x)):
        values = x[row]
        found = out[row]
        peak = shifts[row, 0]
        log_sum = shifts[row, 1]
        share = grad[row]
        for i in range(len(values)):
            found[i] = share * exponential(values[i] - peak - log_sum)
        found[target[row]] -= share
