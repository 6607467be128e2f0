"""Batch normalization in as few passes over memory as it has: each runs at the speed of a copy.

Arrays are flat here, and cut into rows of a whole number of pixels: `width` elements, long enough
for vectors where channels are few. Element i of a row belongs to channel i % channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_input
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array, from_nhwc

ROW_ELEMENTS = 256
# Rows whose sum is taken in the array's own dtype, in vectors, before float64 takes it up: with so
# few terms float32 keeps its digits.
BLOCK_ROWS = 64
# Sums are cut into parts by size alone, and the parts added in order: any thread count gives equal
# bits.
MOST_PARTS = 64
# Pixels whose mean is the origin that squares are summed about.
ORIGIN_PIXELS = 64


def batch_norm_act(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    relu: bool,
    eps: float,
    moments: tuple[Array, Array] | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, None]:
    array = kernel_input(x)
    mean, var = _moments(array) if moments is None else moments
    count = array.size // max(len(mean), 1)
    affine = as_vector(weight, x.dtype), as_vector(bias, x.dtype)
    running = as_vector(running_mean, x.dtype), as_vector(running_var, x.dtype)
    vectors = np.empty((3, _row_width(array)), x.dtype)
    inv_std = np.empty(len(mean), x.dtype)
    _prepare(
        1, mean, var, *affine, eps, *running, momentum if count else 0.0,
        count / max(count - 1, 1), vectors, inv_std,
    )  # fmt: skip
    for own, moved in zip((running_mean, running_var), running, strict=True):
        if own is not None and own is not moved:
            own[...] = moved
    if batches is not None:
        batches += 1
    return _affine_rows(array, vectors, residual, relu), vectors[0, : len(mean)], inv_std, None


def as_vector(vector: Array | None, dtype: np.dtype) -> Array:
    """Give a vector as a compiled function takes it, copied only if it is not so yet; None is empty."""
    if vector is None:
        return np.empty(0, dtype)
    if vector.dtype == dtype and vector.flags.c_contiguous and vector.flags.writeable:
        return vector
    return np.array(vector, dtype)


def batch_norm_act_grad(
    grad: Array,
    x: Array,
    out: Array | None,
    passed: None,
    weight: Array | None,
    mean: Array,
    inv_std: Array,
    relu: bool,
    wants_residual: bool,
) -> tuple[Array, Array, Array, Array | None]:
    grads, array = kernel_input(grad), kernel_input(x)
    # Without relu, grad itself says where it passes: everywhere but where it is 0 anyway.
    gate = kernel_input(out) if relu else grads
    behind_relu = np.empty_like(grads) if relu and wants_residual else None
    sums = _grad_sums(grads, gate, array, mean, behind_relu)
    if behind_relu is not None:
        grads = gate = behind_relu
    count = max(array.size // max(len(mean), 1), 1)
    vectors = np.empty((4, _row_width(array)), x.dtype)
    by_weight, by_bias = np.empty((2, len(mean)), x.dtype)
    scales = (as_vector(vector, x.dtype) for vector in (mean, inv_std, weight))
    prepare_grad(1, sums, *scales, count, vectors, by_weight, by_bias)
    grad_x = np.empty_like(array)
    _affine_pair(get_num_threads(), _flat(grads), _flat(gate), _flat(array), vectors, _flat(grad_x))
    grad_residual = from_nhwc(grads) if wants_residual else None
    return from_nhwc(grad_x), by_weight, by_bias, grad_residual


def scale_shift(x: Array, scale: Array, shift: Array, residual: Array | None, relu: bool) -> Array:
    array = kernel_input(x)
    vectors = _along_rows(array, np.zeros_like(scale), scale, shift)
    return _affine_rows(array, vectors, residual, relu)


def _affine_rows(array: Array, vectors: Array, residual: Array | None, relu: bool) -> Array:
    """Give relu((x - center) * scale + shift + residual) of x (N, H, W, C); vectors (3, width)."""
    out = np.empty_like(array)
    added = array if residual is None else kernel_input(residual)
    floor = array.dtype.type(0 if relu else -np.inf)
    flat = (_flat(array), vectors, _flat(added))
    _affine(get_num_threads(), *flat, residual is not None, floor, _flat(out))
    return from_nhwc(out)


def _moments(array: Array) -> tuple[Array, Array]:
    """Give each channel's mean and biased variance in float64; 0 and 0 of no pixels."""
    channels = array.shape[-1]
    pixels = array.reshape(array.size // max(channels, 1), channels)
    if not array.size:
        return np.zeros(channels), np.zeros(channels)
    with np.errstate(invalid="ignore", over="ignore"):  # nan and inf are what they are
        # Sums about a value among the others stay exact however far the mean is from zero.
        step = -(-len(pixels) // ORIGIN_PIXELS)
        origin = pixels[::step].mean(axis=0, dtype=np.float64).astype(array.dtype)
        (along,) = _along_rows(array, origin)
        parts = _part_sums(array, _sum_moments, _flat(array), along)
        total, squares = parts.reshape(len(parts), 2, -1, channels).sum(axis=(0, 2))
        offset = total / len(pixels)
        return origin + offset, np.maximum(squares / len(pixels) - offset * offset, 0.0)


def _grad_sums(grads: Array, gate: Array, array: Array, mean: Array, passed: Array | None) -> Array:
    """Sum g and g * (x - mean) over the pixels, g being grads where gate is not 0; fill passed with g.

    The sums are parts, as `_part_sums` gives them.
    """
    (center,) = _along_rows(array, mean)
    target = grads if passed is None else passed
    arguments = (_flat(grads), _flat(gate), _flat(array), center, passed is not None, _flat(target))
    return _part_sums(array, _sum_grads, *arguments)


def _part_sums(array: Array, kernel: Any, *arguments: Any) -> Array:
    """Give the two sums, (parts, 2, width) in float64, that a kernel makes of parts of array's rows."""
    width = _row_width(array)
    rows = -(-array.size // max(width, 1))
    parts = np.zeros((min(MOST_PARTS, -(-rows // BLOCK_ROWS)), 2, width))
    kernel(get_num_threads(), *arguments, parts)
    return parts


def _row_width(array: Array) -> int:
    channels = max(array.shape[-1], 1)
    return channels * max(1, ROW_ELEMENTS // channels)


def _along_rows(array: Array, *vectors: Array) -> Array:
    """Give vectors (C,) in array's dtype, repeated along a row: (vectors, width)."""
    channels = array.shape[-1]
    rows = np.empty((len(vectors), _row_width(array) // max(channels, 1), channels), array.dtype)
    for row, vector in zip(rows, vectors, strict=True):
        row[...] = vector
    return rows.reshape(len(vectors), rows.shape[1] * channels)


def _flat(array: Array) -> Array:
    return array.reshape(-1)


@parallel_kernel
def _sum_moments(worker, workers, x, origin, parts):
    """Sum x - origin and its square: x flat, origin (width,), parts (parts, 2, width) zeros."""
    width = len(origin)
    rows = (len(x) + width - 1) // width
    for part in own_range(worker, workers, len(parts)):
        total = np.empty(width, x.dtype)
        squares = np.empty(width, x.dtype)
        stop = (part + 1) * rows // len(parts)
        for block in range(part * rows // len(parts), stop, BLOCK_ROWS):
            for i in range(width):
                total[i] = 0
                squares[i] = 0
            for row in range(block, min(block + BLOCK_ROWS, stop)):
                values = x[row * width : (row + 1) * width]
                for i in range(len(values)):
                    value = values[i] - origin[i]
                    total[i] += value
                    squares[i] += value * value
            for i in range(width):
                parts[part, 0, i] += total[i]
                parts[part, 1, i] += squares[i]


@parallel_kernel
def _sum_grads(worker, workers, grad, gate, x, center, stores, passed, parts):
    """Sum g and g * (x - center), g being grad where gate is not 0; all flat but parts."""
    width = len(center)
    rows = (len(x) + width - 1) // width
    for part in own_range(worker, workers, len(parts)):
        total = np.empty(width, x.dtype)
        products = np.empty(width, x.dtype)
        stop = (part + 1) * rows // len(parts)
        for block in range(part * rows // len(parts), stop, BLOCK_ROWS):
            for i in range(width):
                total[i] = 0
                products[i] = 0
            for row in range(block, min(block + BLOCK_ROWS, stop)):
                grads = grad[row * width : (row + 1) * width]
                gates = gate[row * width : (row + 1) * width]
                values = x[row * width : (row + 1) * width]
                if stores:
                    target = passed[row * width : (row + 1) * width]
                    for i in range(len(values)):
                        target[i] = grads[i] if gates[i] != 0 else 0
                    grads = target
                for i in range(len(values)):
                    value = grads[i] if gates[i] != 0 else 0
                    total[i] += value
                    products[i] += value * (values[i] - center[i])
            for i in range(width):
                parts[part, 0, i] += total[i]
                parts[part, 1, i] += products[i]


@parallel_kernel
def _prepare(
    worker, workers, mean, var, weight, bias, eps, running_mean, running_var, momentum, unbiased,
    vectors, inv_std,
):  # fmt: skip
    """Write center, scale and shift along a row, and 1 / standard deviation; move running statistics.

    weight, bias and the running statistics are empty where there are none.
    """
    for c in range(len(mean)):
        scale = 1.0 / np.sqrt(var[c] + eps)
        inv_std[c] = scale
        if len(weight):
            scale *= weight[c]
        vectors[0, c] = mean[c]
        vectors[1, c] = scale
        shift = (vectors[0, c] - mean[c]) * scale
        vectors[2, c] = shift + bias[c] if len(bias) else shift
        if len(running_mean):
            running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean[c]
        if len(running_var):
            running_var[c] = (1.0 - momentum) * running_var[c] + momentum * unbiased * var[c]
    _repeat(vectors, len(mean))


@parallel_kernel
def prepare_grad(worker, workers, parts, mean, inv_std, weight, count, vectors, by_weight, by_bias):
    """Write scale, center, slope and shift along a row, and the gradients by weight and bias.

    Of the sums g and g * (x - mean) in parts (parts, 2, width), which this adds up in parts[0]:
    grad_x = scale * (g - mean(g) - (x - mean) * inv_std * mean(g * x_hat)).
    """
    channels, width = len(mean), vectors.shape[1]
    for part in range(1, len(parts)):
        for i in range(width):
            parts[0, 0, i] += parts[part, 0, i]
            parts[0, 1, i] += parts[part, 1, i]
    for c in range(channels):
        total, products = 0.0, 0.0
        if len(parts):
            for i in range(c, width, channels):
                total += parts[0, 0, i]
                products += parts[0, 1, i]
        inverse = np.float64(inv_std[c])
        scale = inverse * weight[c] if len(weight) else inverse
        by_weight[c] = products * inverse
        by_bias[c] = total
        vectors[0, c] = scale
        vectors[1, c] = mean[c]
        vectors[2, c] = -scale * inverse * inverse * products / count
        vectors[3, c] = -scale * total / count
    _repeat(vectors, channels)


@kernel_part
def _repeat(vectors, channels):
    """Repeat the first `channels` of each vector along a row."""
    for i in range(channels, vectors.shape[1]):
        for vector in range(len(vectors)):
            vectors[vector, i] = vectors[vector, i - channels]


@parallel_kernel
def _affine(worker, workers, x, vectors, residual, adds, floor, out):
    """Fill out with (x - center) * scale + shift, plus residual if `adds`, at least floor."""
    width = vectors.shape[1]
    center, scale, shift = vectors[0], vectors[1], vectors[2]
    for row in own_range(worker, workers, (len(x) + width - 1) // width):
        values = x[row * width : (row + 1) * width]
        target = out[row * width : (row + 1) * width]
        if adds:
            added = residual[row * width : (row + 1) * width]
            for i in range(len(values)):
                value = (values[i] - center[i]) * scale[i] + shift[i] + added[i]
                target[i] = floor if value < floor else value  # nan passes
        else:
            for i in range(len(values)):
                value = (values[i] - center[i]) * scale[i] + shift[i]
                target[i] = floor if value < floor else value


@parallel_kernel
def _affine_pair(worker, workers, grad, gate, x, vectors, out):
    """Fill out with g * scale + (x - center) * slope + shift, g being grad where gate is not 0."""
    width = vectors.shape[1]
    scale, center, slope, shift = vectors[0], vectors[1], vectors[2], vectors[3]
    for row in own_range(worker, workers, (len(x) + width - 1) // width):
        grads = grad[row * width : (row + 1) * width]
        gates = gate[row * width : (row + 1) * width]
        values = x[row * width : (row + 1) * width]
        target = out[row * width : (row + 1) * width]
        for i in range(len(values)):
            value = grads[i] if gates[i] != 0 else 0
            target[i] = value * scale[i] + (values[i] - center[i]) * slope[i] + shift[i]
