"""Batch normalization in as few passes over memory as it has: each runs at the speed of a copy.

Arrays are flat here, and cut into rows of a whole number of pixels: `width` elements, long enough
for vectors where channels are few. Element i of a row belongs to channel i % channels. What follows
from the vectors of channels, each worker computes for itself: a launch more would take longer.
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
    kept_mean, inv_std = np.empty((2, len(mean)), x.dtype)
    out = np.empty_like(array)
    _normalize(
        get_num_threads(), _flat(array), mean, var, *affine, eps, *running,
        momentum if count else 0.0, count / max(count - 1, 1), kept_mean, inv_std,
        *_epilogue(array, residual, relu), _row_width(array), _flat(out),
    )  # fmt: skip
    for own, moved in zip((running_mean, running_var), running, strict=True):
        if own is not None and own is not moved:
            own[...] = moved
    if batches is not None:
        batches += 1
    return from_nhwc(out), kept_mean, inv_std, None


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
    by_weight, by_bias = np.empty((2, len(mean)), x.dtype)
    scales = (as_vector(vector, x.dtype) for vector in (mean, inv_std, weight))
    grad_x = np.empty_like(array)
    _affine_pair(
        get_num_threads(), _flat(grads), _flat(gate), _flat(array), sums, *scales,
        array.size // max(len(mean), 1), by_weight, by_bias, _flat(grad_x),
    )  # fmt: skip
    grad_residual = from_nhwc(grads) if wants_residual else None
    return from_nhwc(grad_x), by_weight, by_bias, grad_residual


def scale_shift(x: Array, scale: Array, shift: Array, residual: Array | None, relu: bool) -> Array:
    array = kernel_input(x)
    out = np.empty_like(array)
    epilogue = _epilogue(array, residual, relu)
    vectors = as_vector(scale, x.dtype), as_vector(shift, x.dtype)
    _scale(get_num_threads(), _flat(array), *vectors, *epilogue, _row_width(array), _flat(out))
    return from_nhwc(out)


def _epilogue(array: Array, residual: Array | None, relu: bool) -> tuple[Array, bool, Any]:
    """Give what is added to array and whether it is, and the least that a result may be."""
    added = array if residual is None else kernel_input(residual)
    return _flat(added), residual is not None, array.dtype.type(0 if relu else -np.inf)


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
        parts = _part_sums(array, _sum_moments, _flat(array), origin)
        total, squares = parts.reshape(len(parts), 2, -1, channels).sum(axis=(0, 2))
        offset = total / len(pixels)
        return origin + offset, np.maximum(squares / len(pixels) - offset * offset, 0.0)


def _grad_sums(grads: Array, gate: Array, array: Array, mean: Array, passed: Array | None) -> Array:
    """Sum g and g * (x - mean) over the pixels, g being grads where gate is not 0; fill passed with g.

    The sums are parts, as `_part_sums` gives them.
    """
    target = grads if passed is None else passed
    center = as_vector(mean, array.dtype)
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


def _flat(array: Array) -> Array:
    return array.reshape(-1)


@kernel_part
def _along_row(vector, row):
    """Repeat a vector of channels along a row."""
    for i in range(len(row)):
        row[i] = vector[i] if i < len(vector) else row[i - len(vector)]


@parallel_kernel
def _sum_moments(worker, workers, x, origin, parts):
    """Sum x - origin and its square: x flat, origin (C,), parts (parts, 2, width) zeros."""
    width = parts.shape[2]
    own = np.empty((3, width), x.dtype)
    center, total, squares = own[0], own[1], own[2]
    _along_row(origin, center)
    rows = (len(x) + width - 1) // width
    for part in own_range(worker, workers, len(parts)):
        stop = (part + 1) * rows // len(parts)
        for block in range(part * rows // len(parts), stop, BLOCK_ROWS):
            for i in range(width):
                total[i] = 0
                squares[i] = 0
            for row in range(block, min(block + BLOCK_ROWS, stop)):
                values = x[row * width : (row + 1) * width]
                for i in range(len(values)):
                    value = values[i] - center[i]
                    total[i] += value
                    squares[i] += value * value
            for i in range(width):
                parts[part, 0, i] += total[i]
                parts[part, 1, i] += squares[i]


@parallel_kernel
def _sum_grads(worker, workers, grad, gate, x, mean, stores, passed, parts):
    """Sum g and g * (x - mean), g being grad where gate is not 0; all flat but parts."""
    width = parts.shape[2]
    own, zero = np.empty((3, width), x.dtype), x.dtype.type(0)
    center, total, products = own[0], own[1], own[2]
    _along_row(mean, center)
    rows = (len(x) + width - 1) // width
    for part in own_range(worker, workers, len(parts)):
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
                        target[i] = grads[i] if gates[i] != zero else zero
                    grads = target
                for i in range(len(values)):
                    value = grads[i] if gates[i] != zero else zero
                    total[i] += value
                    products[i] += value * (values[i] - center[i])
            for i in range(width):
                parts[part, 0, i] += total[i]
                parts[part, 1, i] += products[i]


@parallel_kernel
def _normalize(
    worker, workers, x, mean, var, weight, bias, eps, running_mean, running_var, momentum, unbiased,
    kept_mean, inv_std, residual, adds, floor, width, out,
):  # fmt: skip
    """Fill out with the normalized x, residual added if `adds`, at least floor; worker 0 keeps statistics.

    It writes mean and 1 / standard deviation, and moves the running statistics. These, weight and
    bias are empty where there are none.
    """
    vectors = np.empty((3, width), x.dtype)
    center, scale, shift = vectors[0], vectors[1], vectors[2]
    for c in range(len(mean)):
        inverse = 1.0 / np.sqrt(var[c] + eps)
        by_channel = inverse * weight[c] if len(weight) else inverse
        center[c] = mean[c]
        scale[c] = by_channel
        rounded = (center[c] - mean[c]) * by_channel
        shift[c] = rounded + bias[c] if len(bias) else rounded
        if worker > 0:
            continue
        kept_mean[c] = mean[c]
        inv_std[c] = inverse
        if len(running_mean):
            running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean[c]
        if len(running_var):
            running_var[c] = (1.0 - momentum) * running_var[c] + momentum * unbiased * var[c]
    for vector in vectors:
        _along_row(vector[: len(mean)], vector)
    _affine(worker, workers, x, vectors, residual, adds, floor, out)


@parallel_kernel
def _scale(worker, workers, x, scale, shift, residual, adds, floor, width, out):
    """Fill out with x * scale + shift by channel, plus residual if `adds`, at least floor."""
    vectors = np.zeros((3, width), x.dtype)
    _along_row(scale, vectors[1])
    _along_row(shift, vectors[2])
    _affine(worker, workers, x, vectors, residual, adds, floor, out)


@kernel_part
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


@kernel_part
def affine_of_grad(worker, parts, mean, inv_std, weight, count, by_weight, by_bias):
    """Give scale, center, slope and shift along a row; worker 0 writes the gradients by weight and bias.

    Of the sums g and g * (x - mean) in parts (parts, 2, width):
    grad_x = scale * (g - mean(g) - (x - mean) * inv_std * mean(g * x_hat)).
    """
    channels, width = len(mean), parts.shape[2]
    sums = np.zeros((2, width))
    for part in range(len(parts)):
        for i in range(width):
            sums[0, i] += parts[part, 0, i]
            sums[1, i] += parts[part, 1, i]
    vectors = np.empty((4, width), mean.dtype)
    scale, center, slope, shift = vectors[0], vectors[1], vectors[2], vectors[3]
    for c in range(channels):
        total, products = 0.0, 0.0
        for i in range(c, width, channels):
            total += sums[0, i]
            products += sums[1, i]
        inverse = np.float64(inv_std[c])
        by_channel = inverse * weight[c] if len(weight) else inverse
        if worker == 0:
            by_weight[c] = products * inverse
            by_bias[c] = total
        scale[c] = by_channel
        center[c] = mean[c]
        slope[c] = -by_channel * inverse * inverse * products / max(count, 1)
        shift[c] = -by_channel * total / max(count, 1)
    for vector in vectors:
        _along_row(vector[:channels], vector)
    return scale, center, slope, shift


@parallel_kernel
def _affine_pair(
    worker, workers, grad, gate, x, parts, mean, inv_std, weight, count, by_weight, by_bias, out
):
    """Fill out with the gradient by x, flat, g being grad where gate is not 0: see `affine_of_grad`."""
    width, zero = parts.shape[2], x.dtype.type(0)
    scale, center, slope, shift = affine_of_grad(
        worker, parts, mean, inv_std, weight, count, by_weight, by_bias
    )
    for row in own_range(worker, workers, (len(x) + width - 1) // width):
        grads = grad[row * width : (row + 1) * width]
        gates = gate[row * width : (row + 1) * width]
        values = x[row * width : (row + 1) * width]
        target = out[row * width : (row + 1) * width]
        for i in range(len(values)):
            value = grads[i] if gates[i] != zero else zero
            target[i] = value * scale[i] + (values[i] - center[i]) * slope[i] + shift[i]
