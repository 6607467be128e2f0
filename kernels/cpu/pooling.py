"""2-D pools. A pixel or window sums its own terms in one order: equal bits on any thread count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_input
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.geometry import covering_windows, tap_positions, window_divisors
from gradengine.kernels.layout import Array, from_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry


def max_pool2d(x: Array, geometry: Pool2dGeometry) -> tuple[Array, Array]:
    out = np.empty(_nhwc(geometry.output_shape), x.dtype)
    indices = np.empty(out.shape, np.int32)
    _max_pool2d(get_num_threads(), kernel_input(x), *tap_positions(geometry), out, indices)
    return from_nhwc(out), from_nhwc(indices)


def max_pool2d_scatter(grad: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    grad_input = np.empty(_nhwc(geometry.input_shape), grad.dtype)
    tables = covering_windows(geometry)
    _max_pool2d_scatter(
        get_num_threads(), kernel_input(grad), kernel_input(indices), *tables, grad_input
    )
    return from_nhwc(grad_input)


def max_pool2d_gather(x: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    batch, channels = geometry.batch, geometry.channels
    planes = kernel_input(x).reshape(batch, geometry.height * geometry.width, channels)
    nhwc_indices = kernel_input(indices)
    windows = geometry.out_height * geometry.out_width
    positions = nhwc_indices.reshape(batch, windows, channels)
    out = np.take_along_axis(planes, positions, axis=1)
    return from_nhwc(out.reshape(nhwc_indices.shape))


def avg_pool2d(x: Array, geometry: Pool2dGeometry) -> Array:
    out = np.empty(_nhwc(geometry.output_shape), x.dtype)
    _avg_pool2d(
        get_num_threads(), kernel_input(x), *tap_positions(geometry), window_divisors(geometry), out
    )
    return from_nhwc(out)


def avg_pool2d_grad(grad: Array, geometry: Pool2dGeometry) -> Array:
    grad_input = np.empty(_nhwc(geometry.input_shape), grad.dtype)
    divisors = window_divisors(geometry).astype(grad.dtype)
    _avg_pool2d_grad(
        get_num_threads(), kernel_input(grad), *covering_windows(geometry), divisors, grad_input
    )
    return from_nhwc(grad_input)


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, channels, height, width = shape
    return batch, height, width, channels


@parallel_kernel
def _max_pool2d(worker, workers, x, row_taps, column_taps, out, indices):
    """x (N, H, W, C), row_taps (P, R), column_taps (Q, S), out and indices (N, P, Q, C)."""
    batch, out_height, out_width, channels = out.shape
    for row in own_range(worker, workers, batch * out_height):
        image = row // out_height
        out_row = row % out_height
        for out_column in range(out_width):
            best = out[image, out_row, out_column]
            index = indices[image, out_row, out_column]
            first = True
            for r in range(row_taps.shape[1]):
                height = row_taps[out_row, r]
                if height < 0:
                    continue
                for s in range(column_taps.shape[1]):
                    width = column_taps[out_column, s]
                    if width < 0:
                        continue
                    source = x[image, height, width]
                    position = np.int32(height * x.shape[2] + width)
                    for channel in range(channels):
                        value = source[channel]
                        # value != value: NaN wins, the last one, as in PyTorch
                        wins = first or value > best[channel] or value != value
                        best[channel] = value if wins else best[channel]
                        index[channel] = position if wins else index[channel]
                    first = False


@parallel_kernel
def _max_pool2d_scatter(
    worker, workers, grad, indices, covering_rows, covering_columns, grad_input
):
    """grad and indices (N, P, Q, C), covering_rows (H, R), covering_columns (W, S)."""
    batch, height, width, channels = grad_input.shape
    zero = grad.dtype.type(0)
    for row in own_range(worker, workers, batch * height):
        image = row // height
        input_row = row % height
        for column in range(width):
            target = grad_input[image, input_row, column]
            position = np.int32(input_row * width + column)
            for channel in range(channels):
                target[channel] = 0
            for r in range(covering_rows.shape[1]):
                out_row = covering_rows[input_row, r]
                if out_row < 0:
                    continue
                for s in range(covering_columns.shape[1]):
                    out_column = covering_columns[column, s]
                    if out_column < 0:
                        continue
                    source = grad[image, out_row, out_column]
                    index = indices[image, out_row, out_column]
                    for channel in range(channels):
                        target[channel] += source[channel] if index[channel] == position else zero


@parallel_kernel
def _avg_pool2d(worker, workers, x, row_taps, column_taps, divisors, out):
    """x (N, H, W, C), row_taps (P, R), column_taps (Q, S), divisors (P, Q), out (N, P, Q, C)."""
    batch, out_height, out_width, channels = out.shape
    for row in own_range(worker, workers, batch * out_height):
        image = row // out_height
        out_row = row % out_height
        # a global pool adds up tens of thousands of pixels: float32 would lose digits
        total = np.empty(channels, np.float64)
        for out_column in range(out_width):
            total[:] = 0.0
            for r in range(row_taps.shape[1]):
                height = row_taps[out_row, r]
                for s in range(column_taps.shape[1]):
                    width = column_taps[out_column, s]
                    if height >= 0 and width >= 0:
                        source = x[image, height, width]
                        for channel in range(channels):
                            total[channel] += source[channel]
            target = out[image, out_row, out_column]
            for channel in range(channels):
                target[channel] = np.divide(total[channel], divisors[out_row, out_column])


@parallel_kernel
def _avg_pool2d_grad(worker, workers, grad, covering_rows, covering_columns, divisors, grad_input):
    """grad (N, P, Q, C), covering_rows (H, R), covering_columns (W, S), divisors (P, Q)."""
    batch, height, width, channels = grad_input.shape
    for row in own_range(worker, workers, batch * height):
        image = row // height
        input_row = row % height
        for column in range(width):
            target = grad_input[image, input_row, column]
            for channel in range(channels):
                target[channel] = 0
            for r in range(covering_rows.shape[1]):
                out_row = covering_rows[input_row, r]
                for s in range(covering_columns.shape[1]):
                    out_column = covering_columns[column, s]
                    if out_row >= 0 and out_column >= 0:
                        source = grad[image, out_row, out_column]
                        divisor = divisors[out_row, out_column]
                        for channel in range(channels):  # np.divide: `/` would look for 0
                            target[channel] += np.divide(source[channel], divisor)
