"""Batch normalization, ReLU and a max pool: forward one after the other, back in two passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_input
from gradengine.kernels.cpu.normalization import (
    MOST_PARTS,
    affine_of_grad,
    as_vector,
    batch_norm_act,
)
from gradengine.kernels.cpu.pooling import max_pool2d
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.geometry import covering_windows
from gradengine.kernels.layout import Array, from_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry


def batch_norm_relu_max_pool(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    geometry: Pool2dGeometry,
    moments: tuple[Array, Array] | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, Array, None]:
    normalized, mean, inv_std, _ = batch_norm_act(
        *(x, weight, bias, None, True, eps, moments, running_mean, running_var, momentum, batches)
    )
    out, indices = max_pool2d(normalized, geometry)
    return out, mean, inv_std, indices, None


def batch_norm_relu_max_pool_grad(
    grad: Array,
    x: Array,
    out: Array,
    winners: Array,
    peaks: None,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    inv_std: Array,
    geometry: Pool2dGeometry,
) -> tuple[Array, Array, Array]:
    pixels, channels = kernel_input(x), len(mean)
    # Where the largest pixel of a window is 0, relu lets nothing through.
    windows = kernel_input(grad), kernel_input(out), kernel_input(winners)
    center = as_vector(mean, x.dtype)
    sums = np.zeros((min(MOST_PARTS, geometry.batch * geometry.out_height), 2, channels))
    _sum_windows(get_num_threads(), *windows, pixels, center, sums)
    by_weight, by_bias = np.empty((2, channels), x.dtype)
    scales = center, as_vector(inv_std, x.dtype), as_vector(weight, x.dtype)
    by_x = np.empty_like(pixels)
    _scatter(
        get_num_threads(), *windows, pixels, *covering_windows(geometry), sums, *scales, by_weight,
        by_bias, by_x,
    )  # fmt: skip
    return from_nhwc(by_x), by_weight, by_bias


@parallel_kernel
def _sum_windows(worker, workers, grad, gate, winners, x, center, parts):
    """Sum g and g * (x - center) at the winners, g being grad where gate is not 0, by channel.

    grad, gate and winners (N, P, Q, C), x (N, H, W, C), parts (parts, 2, C) zeros.
    """
    batch, height, width, channels = grad.shape
    zero = grad.dtype.type(0)
    plane = x.shape[1] * x.shape[2] * channels
    for part in own_range(worker, workers, len(parts)):
        total, products = parts[part, 0], parts[part, 1]
        rows = batch * height
        for row in range(part * rows // len(parts), (part + 1) * rows // len(parts)):
            values = x.reshape(x.size)[row // height * plane : (row // height + 1) * plane]
            for column in range(width):
                at = row // height, row % height, column
                grads, passes, index = grad[at], gate[at], winners[at]
                for channel in range(channels):
                    value = grads[channel] if passes[channel] != zero else zero
                    total[channel] += value
                    peak = values[np.int64(index[channel]) * channels + channel]
                    products[channel] += value * (peak - center[channel])


@parallel_kernel
def _scatter(
    worker, workers, grad, gate, winners, x, covering_rows, covering_columns, parts, mean, inv_std,
    weight, by_weight, by_bias, out,
):  # fmt: skip
    """Fill out with the gradient by x, g being what windows pass to a pixel: see `affine_of_grad`.

    grad, gate and winners (N, P, Q, C), covering_rows (H, R), covering_columns (W, S), x and out
    (N, H, W, C).
    """
    batch, height, width, channels = out.shape
    zero = out.dtype.type(0)
    scale, center, slope, shift = affine_of_grad(
        worker, parts, mean, inv_std, weight, out.size // max(channels, 1), by_weight, by_bias
    )
    for row in own_range(worker, workers, batch * height):
        image, input_row = row // height, row % height
        for column in range(width):
            target, values = out[image, input_row, column], x[image, input_row, column]
            position = np.int32(input_row * width + column)
            for channel in range(channels):
                target[channel] = 0
            for r in range(covering_rows.shape[1]):
                out_row = covering_rows[input_row, r]
                for s in range(covering_columns.shape[1]):
                    out_column = covering_columns[column, s]
                    if out_row >= 0 and out_column >= 0:
                        source = grad[image, out_row, out_column]
                        passes = gate[image, out_row, out_column]
                        index = winners[image, out_row, out_column]
                        for channel in range(channels):
                            wins = (index[channel] == position) & (passes[channel] != zero)
                            target[channel] += source[channel] if wins else zero
            for channel in range(channels):
                value = target[channel] * scale[channel] + shift[channel]
                target[channel] = value + (values[channel] - center[channel]) * slope[channel]


def winning_positions(winners: Array, geometry: Pool2dGeometry) -> Array:
    return winners
