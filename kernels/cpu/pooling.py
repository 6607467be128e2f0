"""2-D pools. A pixel or window sums its own terms in one order: equal bits on any thread count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_input
from gradengine.kernels.cpu.simd import clear_run, pointer
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
    if _is_whole(geometry) and x.flags.c_contiguous and x.flags.writeable:
        planes = x.reshape(-1, geometry.height, geometry.width)
        means = np.empty(len(planes), x.dtype)
        _average_planes(get_num_threads(), planes, window_divisors(geometry).item(), means)
        return means.reshape(geometry.output_shape)
    out = np.empty(_nhwc(geometry.output_shape), x.dtype)
    _avg_pool2d(
        get_num_threads(), kernel_input(x), *tap_positions(geometry), window_divisors(geometry), out
    )
    return from_nhwc(out)


def avg_pool2d_grad(grad: Array, geometry: Pool2dGeometry) -> Array:
    grad_input = np.empty(_nhwc(geometry.input_shape), grad.dtype)
    shares = kernel_input(grad) / window_divisors(geometry)[..., None].astype(grad.dtype)
    _avg_pool2d_grad(get_num_threads(), shares, *covering_windows(geometry), grad_input)
    return from_nhwc(grad_input)


def _is_whole(geometry: Pool2dGeometry) -> bool:
    """Whether there is one window, of all pixels and nothing else."""
    kernel = geometry.kernel_height, geometry.kernel_width
    return kernel == (geometry.height, geometry.width) and not any(map(any, geometry.padding))


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
def _average_planes(worker, workers, planes, divisor, means):
    """Write to means (N,) the sum of each of planes (N, H, W), by columns first, over divisor."""
    total = np.empty(planes.shape[2], np.float64)
    for number in own_range(worker, workers, len(planes)):
        total[:] = 0.0
        for row in planes[number]:
            for column in range(len(total)):
                total[column] += row[column]
        means[number] = np.divide(total.sum(), divisor)


@parallel_kernel
def _avg_pool2d_grad(worker, workers, shares, covering_rows, covering_columns, grad_input):
    """shares (N, P, Q, C), covering_rows (H, R), covering_columns (W, S)."""
    batch, height, width, channels = grad_input.shape
    for row in own_range(worker, workers, batch * height):
        image = row // height
        input_row = row % height
        for column in range(width):
            target = pointer(grad_input, (row * width + column) * channels)
            clear_run(target, channels)
            for r in range(covering_rows.shape[1]):
                out_row = covering_rows[input_row, r]
                for s in range(covering_columns.shape[1]):
                    out_column = covering_columns[column, s]
                    if out_row < 0 or out_column < 0:
                        continue
                    window = (image * shares.shape[1] + out_row) * shares.shape[2] + out_column
                    source = pointer(shares, window * channels)
                    for channel in range(channels):
                        target[channel] += source[channel]
