"""2-D convolution as matrix products over columns: the input pixels that each output pixel reads.

In comments: N images, C input channels, K output channels, H x W pixels in, P x Q pixels out,
R x S kernel taps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import prange

from gradengine.kernels.cpu.launch import kernel_input, parallel_kernel
from gradengine.kernels.geometry import covering_windows, tap_positions
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradengine.kernels.geometry import Conv2dGeometry

# A chunk's columns are written once and read back by the product: they should stay in cache.
# Smaller chunks would switch too often between Numba's threads and those of the BLAS.
COLUMN_BYTES = 16 << 20


def conv2d(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    weight = weight.data if isinstance(weight, tuple) else weight
    matrices = _weight_matrices(weight, geometry)
    out = _empty_output(geometry, x.dtype)
    pixels = _group_pixels(out, geometry.groups)
    for group, rows, columns in _column_chunks(kernel_input(x), geometry):
        np.matmul(columns, matrices[group].T, out=pixels[rows, group])
    if bias is not None:
        out += bias
    if residual is not None:
        out += residual.transpose(0, 2, 3, 1)
    if relu:
        np.maximum(out, 0, out=out)
    return from_nhwc(out)


def conv2d_moments(
    x: Array, weight: Any, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    out = conv2d(x, weight, bias, geometry)
    values = out.astype(np.float64)
    if not out.size:
        return out, np.zeros(out.shape[1]), np.zeros(out.shape[1])
    return out, values.mean(axis=(0, 2, 3)), values.var(axis=(0, 2, 3))


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> Array:
    return weight.copy()


def conv2d_grad_input(grad: Array, weight: Array, geometry: Conv2dGeometry) -> Array:
    matrices = _weight_matrices(weight, geometry)
    pixels = _group_pixels(kernel_input(grad), geometry.groups)
    shape = (geometry.batch, geometry.height, geometry.width, geometry.in_channels)
    if _is_pointwise(geometry):
        grad_input = np.empty(shape, grad.dtype)
        inputs = _group_pixels(grad_input, geometry.groups)
        for group in range(geometry.groups):
            np.matmul(pixels[:, group], matrices[group], out=inputs[:, group])
        return from_nhwc(grad_input)
    grad_input = np.zeros(shape, grad.dtype)
    tables = covering_windows(geometry)
    channels = geometry.in_channels // geometry.groups
    buffer = _column_buffer(geometry, grad.dtype)
    for first, stop in _row_chunks(geometry, buffer):
        rows = slice(first * geometry.out_width, stop * geometry.out_width)
        columns = buffer[: stop - first]
        for group in range(geometry.groups):
            np.matmul(pixels[rows, group], matrices[group], out=_as_matrix(columns))
            _add_columns(columns, *tables, first, geometry.out_height, group * channels, grad_input)
    return from_nhwc(grad_input)


def conv2d_grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    pixels = _group_pixels(kernel_input(grad), geometry.groups)
    grad_weight = np.zeros(_nhwc_weight_shape(geometry), grad.dtype)
    matrices = _as_group_matrices(grad_weight, geometry)
    for group, rows, columns in _column_chunks(kernel_input(x), geometry):
        matrices[group] += np.matmul(pixels[rows, group].T, columns)
    return from_nhwc(grad_weight)


def _column_chunks(x: Array, geometry: Conv2dGeometry) -> Iterator[tuple[int, slice, Array]]:
    """Give (group, output pixels, columns of those pixels (pixels, R * S * C / groups))."""
    if _is_pointwise(geometry):
        pixels = _group_pixels(x, geometry.groups)
        for group in range(geometry.groups):
            yield group, slice(None), pixels[:, group]
        return
    tables = tap_positions(geometry)
    channels = geometry.in_channels // geometry.groups
    buffer = _column_buffer(geometry, x.dtype)
    for first, stop in _row_chunks(geometry, buffer):
        rows = slice(first * geometry.out_width, stop * geometry.out_width)
        columns = buffer[: stop - first]
        for group in range(geometry.groups):
            _fill_columns(x, *tables, first, group * channels, columns)
            yield group, rows, _as_matrix(columns)


def _column_buffer(geometry: Conv2dGeometry, dtype: np.dtype) -> Array:
    """Make room for the columns of as many output rows as the cache should hold, at least one."""
    _, channels, kernel_height, kernel_width = geometry.weight_shape
    row_shape = (geometry.out_width, kernel_height, kernel_width, channels)
    row_bytes = int(np.prod(row_shape)) * dtype.itemsize
    rows = min(max(COLUMN_BYTES // row_bytes, 1), geometry.batch * geometry.out_height)
    return np.empty((rows, *row_shape), dtype)


def _row_chunks(geometry: Conv2dGeometry, buffer: Array) -> Iterator[tuple[int, int]]:
    """Split the N * P output rows into ranges that fit the buffer."""
    rows = geometry.batch * geometry.out_height
    for first in range(0, rows, max(len(buffer), 1)):
        yield first, min(first + len(buffer), rows)


@parallel_kernel
def _fill_columns(x, row_taps, column_taps, first_row, first_channel, columns):
    """Copy the pixels that the output rows from first_row on read; padding becomes zero.

    x (N, H, W, C), row_taps (P, R), column_taps (Q, S), columns (rows, Q, R, S, group channels).
    """
    row_count, out_width, kernel_height, kernel_width, channels = columns.shape
    out_height = row_taps.shape[0]
    stop_channel = first_channel + channels
    for row in prange(row_count):
        image = (first_row + row) // out_height
        out_row = (first_row + row) % out_height
        for out_column in range(out_width):
            for r in range(kernel_height):
                height = row_taps[out_row, r]
                for s in range(kernel_width):
                    width = column_taps[out_column, s]
                    target = columns[row, out_column, r, s]
                    if height < 0 or width < 0:
                        target[:] = 0
                    else:
                        source = x[image, height, width, first_channel:stop_channel]
                        for channel in range(channels):
                            target[channel] = source[channel]


@parallel_kernel
def _add_columns(
    columns, covering_rows, covering_columns, first_row, out_height, first_channel, grad_input
):
    """Add to each input pixel the columns' entries that were read from it: _fill_columns' adjoint.

    Every pixel gathers its own sum, in one order: no two threads meet, any count gives equal bits.
    covering_rows (H, R), covering_columns (W, S), grad_input (N, H, W, C).
    """
    row_count, _, kernel_height, kernel_width, channels = columns.shape
    height, width = grad_input.shape[1], grad_input.shape[2]
    stop_channel = first_channel + channels
    first_image = first_row // out_height
    images = (first_row + row_count - 1) // out_height + 1 - first_image
    for input_row in prange(images * height):
        image = first_image + input_row // height
        for column in range(width):
            target = grad_input[image, input_row % height, column, first_channel:stop_channel]
            for r in range(kernel_height):
                out_row = covering_rows[input_row % height, r]
                row = image * out_height + out_row - first_row
                if out_row < 0 or row < 0 or row >= row_count:
                    continue
                for s in range(kernel_width):
                    out_column = covering_columns[column, s]
                    if out_column >= 0:
                        source = columns[row, out_column, r, s]
                        for channel in range(channels):
                            target[channel] += source[channel]


def _is_pointwise(geometry: Conv2dGeometry) -> bool:
    """Whether the columns are x itself."""
    kernel = (geometry.kernel_height, geometry.kernel_width)
    return kernel == geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0))


def _nhwc_weight_shape(geometry: Conv2dGeometry) -> tuple[int, ...]:
    out_channels, channels, kernel_height, kernel_width = geometry.weight_shape
    return out_channels, kernel_height, kernel_width, channels


def _weight_matrices(weight: Array, geometry: Conv2dGeometry) -> Array:
    # (K, C / groups, R, S) -> (groups, K / groups, R * S * C / groups)
    return _as_group_matrices(to_nhwc(weight), geometry)


def _as_group_matrices(weight: Array, geometry: Conv2dGeometry) -> Array:
    return weight.reshape(geometry.groups, geometry.out_channels // geometry.groups, -1)


def _group_pixels(array: Array, groups: int) -> Array:
    # (N, H, W, C) -> (N * H * W, groups, C / groups), a view
    batch, height, width, channels = array.shape
    return array.reshape(batch * height * width, groups, channels // groups)


def _as_matrix(columns: Array) -> Array:
    rows, out_width, *taps = columns.shape
    return columns.reshape(rows * out_width, int(np.prod(taps)))


def _empty_output(geometry: Conv2dGeometry, dtype: np.dtype) -> Array:
    batch, out_channels, out_height, out_width = geometry.output_shape
    return np.empty((batch, out_height, out_width, out_channels), dtype)
