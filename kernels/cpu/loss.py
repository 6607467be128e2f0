"""Softmax cross entropy: one pass over each row of scores forward, one back."""

from __future__ import annotations

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import exponential
from gradengine.kernels.layout import Array

# Maxima and sums run in so many interleaved parts, which fill vectors: for many classes and for few.
# A kernel must not see it as a constant: loops of a known length are unrolled, not made vectors.
STRIPS = (64, 8)
CHUNK_ROWS = 8


def softmax_cross_entropy(x: Array, target: Array) -> tuple[Array, Array]:
    scores = _kernel_rows(x)
    losses = np.empty(len(scores), x.dtype)
    shifts = np.empty((len(scores), 2), x.dtype)
    strip = STRIPS[scores.shape[1] < 4 * STRIPS[0]]
    _cross_entropy(get_num_threads(), scores, target.astype(np.int64), strip, losses, shifts)
    return losses, shifts


def softmax_cross_entropy_grad(grad: Array, x: Array, target: Array, shifts: Array) -> Array:
    scores = _kernel_rows(x)
    out = np.empty_like(scores)
    _cross_entropy_grad(
        get_num_threads(), _kernel_rows(grad), scores, target.astype(np.int64), shifts, out
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


def _kernel_rows(x: Array) -> Array:
    array = np.ascontiguousarray(x)
    return array if array.flags.writeable else array.copy()  # to Numba another type


@parallel_kernel
def _cross_entropy(worker, workers, x, target, strip, losses, shifts):
    """x (rows, classes), target and losses (rows,), shifts (rows, 2): maximum, log of the sum."""
    rows, classes = x.shape
    whole = classes // strip * strip
    for chunk in own_range(worker, workers, (rows + CHUNK_ROWS - 1) // CHUNK_ROWS):
        lanes = np.empty(strip, x.dtype)
        powers = np.empty(classes, x.dtype)
        for row in range(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, rows)):
            values = x[row]
            for lane in range(strip):
                lanes[lane] = values[0]
            for start in range(0, whole, strip):
                part = values[start : start + strip]
                for lane in range(strip):
                    lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
            peak = values[0]
            for lane in range(strip):
                peak = lanes[lane] if lanes[lane] > peak else peak
            for i in range(whole, classes):
                peak = values[i] if values[i] > peak else peak
            for i in range(classes):
                powers[i] = exponential(values[i] - peak)
            for lane in range(strip):
                lanes[lane] = 0
            for start in range(0, whole, strip):
                part = powers[start : start + strip]
                for lane in range(strip):
                    lanes[lane] += part[lane]
            total = 0.0
            for lane in range(strip):
                total += lanes[lane]
            for i in range(whole, classes):
                total += powers[i]
            shifts[row, 0] = peak
            shifts[row, 1] = np.log(total)
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
