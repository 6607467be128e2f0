"""Batch normalization: per-channel sums and per-channel affine maps, each in one pass."""

from __future__ import annotations

import numpy as np
from numba import prange

from gradengine.kernels.cpu.launch import kernel_input, parallel_kernel
from gradengine.kernels.layout import Array, from_nhwc

# Fixed, and the parts are added in order: any thread count gives equal bits.
SUM_PARTS = 64


def batch_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    array = kernel_input(x)
    mean, variance = _moments(_as_pixels(array))
    scale = 1.0 / np.sqrt(variance + eps)
    if weight is not None:
        scale *= weight
    shift = np.zeros_like(mean) if bias is None else bias
    out = np.empty_like(array)
    vectors = (vector.astype(x.dtype) for vector in (mean, scale, shift))
    _affine(_as_pixels(array), *vectors, _as_pixels(out))
    return from_nhwc(out), mean.astype(x.dtype), variance.astype(x.dtype)


def batch_norm_grad(
    grad: Array, x: Array, weight: Array | None, mean: Array, inv_std: Array
) -> tuple[Array, Array, Array]:
    grads, pixels = _as_pixels(kernel_input(grad)), _as_pixels(kernel_input(x))
    center = mean.astype(np.float64)
    total, products = _channel_sums(grads, np.zeros_like(center), pixels, center)
    count = max(len(pixels), 1)
    grad_weight = products * inv_std
    # grad_x = scale * (grad - mean(grad) - (x - mean) * inv_std * mean(grad * x_hat))
    scale = inv_std.astype(np.float64) if weight is None else inv_std.astype(np.float64) * weight
    slope = -scale * inv_std * grad_weight / count
    shift = -scale * total / count
    out = np.empty(x.transpose(0, 2, 3, 1).shape, x.dtype)
    vectors = (vector.astype(x.dtype) for vector in (scale, center, slope, shift))
    _affine_pair(grads, pixels, *vectors, _as_pixels(out))
    return from_nhwc(out), grad_weight.astype(x.dtype), total.astype(x.dtype)


def scale_shift(x: Array, scale: Array, shift: Array) -> Array:
    array = kernel_input(x)
    out = np.empty_like(array)
    center = np.zeros(array.shape[-1], x.dtype)
    vectors = (center, scale.astype(x.dtype), shift.astype(x.dtype))
    _affine(_as_pixels(array), *vectors, _as_pixels(out))
    return from_nhwc(out)


def _moments(pixels: Array) -> tuple[Array, Array]:
    """Give each channel's mean and biased variance in float64; 0 and 0 of no pixels."""
    count, channels = pixels.shape
    # Sums about one of the values stay exact however far the mean is from zero: since
    # (value - mean)^2 <= count * variance, they lose at most log10(count) of 16 digits.
    origin = pixels[0].astype(np.float64) if count else np.zeros(channels)
    total, squares = _channel_sums(pixels, origin, pixels, origin)
    count = max(count, 1)
    with np.errstate(invalid="ignore"):  # inf - inf: nan is the answer
        offset = total / count
        return origin + offset, np.maximum(squares / count - offset * offset, 0.0)


def _channel_sums(
    first: Array, first_center: Array, second: Array, second_center: Array
) -> tuple[Array, Array]:
    """Sum first - first_center, and its product with second - second_center, over the pixels."""
    parts = np.zeros((SUM_PARTS, 2, first.shape[1]))
    _sum_parts(first, first_center, second, second_center, parts)
    total, products = parts.sum(axis=0)
    return total, products


def _as_pixels(array: Array) -> Array:
    # (N, H, W, C) -> (N * H * W, C)
    return array.reshape(array.size // max(array.shape[-1], 1), array.shape[-1])


@parallel_kernel
def _sum_parts(first, first_center, second, second_center, parts):
    """first and second (pixels, C), centers (C,), parts (SUM_PARTS, 2, C) zeros."""
    pixels, channels = first.shape
    part_count = len(parts)
    for part in prange(part_count):
        total = parts[part, 0]
        products = parts[part, 1]
        for pixel in range(part * pixels // part_count, (part + 1) * pixels // part_count):
            for channel in range(channels):
                value = first[pixel, channel] - first_center[channel]
                total[channel] += value
                products[channel] += value * (second[pixel, channel] - second_center[channel])


@parallel_kernel
def _affine(x, center, scale, shift, out):
    """x and out (pixels, C), the others (C,)."""
    pixels, channels = x.shape
    for pixel in prange(pixels):
        for channel in range(channels):
            value = x[pixel, channel] - center[channel]
            out[pixel, channel] = value * scale[channel] + shift[channel]


@parallel_kernel
def _affine_pair(grad, x, scale, center, slope, shift, out):
    """grad, x and out (pixels, C), the others (C,)."""
    pixels, channels = x.shape
    for pixel in prange(pixels):
        for channel in range(channels):
            value = grad[pixel, channel] * scale[channel] + shift[channel]
            out[pixel, channel] = value + (x[pixel, channel] - center[channel]) * slope[channel]
