"""Softmax cross entropy: one pass over each row of scores forward, one back."""

from __future__ import annotations

import math

import numpy as np
from numba import float32
from numba.extending import overload

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
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


def exponential(x):
    """Give exp(x) in x's dtype, within 2 units in the last place; float32 in vectors."""
    return math.exp(x)


@overload(exponential)
def _exponential(x):
    return _exponential32 if x == float32 else _exponential64


def _exponential64(x):
    return math.exp(x)


def _exponential32(x):
    # exp(x) = 2^n * exp(r) with |r| <= log(2) / 2, exp(r) by its minimax polynomial (as in Cephes)
    lowest = np.float32(-87.33654)  # below it 2^n has no normal number
    clipped = x if x > lowest else lowest
    clipped = clipped if clipped < np.float32(88.02969) else np.float32(88.02969)
    n = np.floor(clipped * np.float32(1.44269504088896341) + np.float32(0.5))
    r = clipped - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    value = p * power
    value = np.float32(0) if x < lowest else value
    return value if x == x else x


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
