"""Batch normalization in as few passes over memory as it has: each runs at the speed of a copy.

Arrays are flat here, and cut into rows of a whole number of pixels: `width` elements, long enough
for vectors where channels are few. Element i of a row belongs to channel i % channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.kernels.cpu.launch import kernel_input, own_range, parallel_kernel
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
    with np.errstate(invalid="ignore"):  # inf - inf: nan is the answer
        inv_std = scale = 1.0 / np.sqrt(var + eps)
        if weight is not None:
            scale = inv_std * weight
        center = mean.astype(x.dtype)
        shift = (center - mean) * scale
        if bias is not None:
            shift += bias
        out = _scale_shift(array, center, scale, shift, residual, relu)
        count = array.size // max(len(mean), 1)
        if count:
            _move(running_mean, mean, momentum)
            _move(running_var, var * (count / max(count - 1, 1)), momentum)
    if batches is not None:
        batches += 1
    return out, center, inv_std.astype(x.dtype), None


def _move(running: Array | None, found: Array, momentum: float) -> None:
    if running is not None:
        running *= 1 - momentum
        running += momentum * found


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
    total, products = _grad_sums(grads, gate, array, mean, behind_relu)
    if behind_relu is not None:
        grads = gate = behind_relu
    count = max(array.size // max(len(mean), 1), 1)
    grad_weight = products * inv_std
    # grad_x = scale * (g - mean(g) - (x - mean) * inv_std * mean(g * x_hat))
    scale = inv_std.astype(np.float64) if weight is None else inv_std.astype(np.float64) * weight
    slope = -scale * inv_std * grad_weight / count
    shift = -scale * total / count
    grad_x = np.empty_like(array)
    vectors = _along_rows(array, scale, mean, slope, shift)
    _affine_pair(get_num_threads(), _flat(grads), _flat(gate), _flat(array), vectors, _flat(grad_x))
    grad_residual = from_nhwc(grads) if wants_residual else None
    sums = grad_weight.astype(x.dtype), total.astype(x.dtype)
    return from_nhwc(grad_x), *sums, grad_residual


def scale_shift(x: Array, scale: Array, shift: Array, residual: Array | None, relu: bool) -> Array:
    return _scale_shift(kernel_input(x), np.zeros_like(scale), scale, shift, residual, relu)


def _scale_shift(
    array: Array, center: Array, scale: Array, shift: Array, residual: Array | None, relu: bool
) -> Array:
    """Give relu((x - center) * scale + shift + residual) of the (N, H, W, C) array x."""
    out = np.empty_like(array)
    vectors = _along_rows(array, center, scale, shift)
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
        total, squares = _part_sums(array, _sum_moments, _flat(array), along)
        offset = total / len(pixels)
        return origin + offset, np.maximum(squares / len(pixels) - offset * offset, 0.0)


def _grad_sums(
    grads: Array, gate: Array, array: Array, mean: Array, passed: Array | None
) -> tuple[Array, Array]:
    """Sum g and g * (x - mean) over the pixels, g being grads where gate is not 0; fill passed with g."""
    (center,) = _along_rows(array, mean)
    target = grads if passed is None else passed
    arguments = (_flat(grads), _flat(gate), _flat(array), center, passed is not None, _flat(target))
    return _part_sums(array, _sum_grads, *arguments)


def _part_sums(array: Array, kernel: Any, *arguments: Any) -> tuple[Array, Array]:
    """Give the two sums by channel, in float64, that a kernel leaves in parts of array's rows."""
    channels = array.shape[-1]
    width = _row_width(array)
    rows = -(-array.size // max(width, 1))
    parts = np.zeros((min(MOST_PARTS, -(-rows // BLOCK_ROWS)), 2, width))
    kernel(get_num_threads(), *arguments, parts)
    sums = parts.reshape(len(parts), 2, width // max(channels, 1), channels).sum(axis=(0, 2))
    return sums[0], sums[1]


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
