"""Views of the pixels that the windows of a convolution or a pool read, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.layout import Array

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradengine.kernels.geometry import Geometry


def sum_dtype(dtype: Any) -> np.dtype:
    """Give the dtype in which values of dtype are added up."""
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype)


def padded_shape(geometry: Geometry, channels: int) -> tuple[int, int, int, int]:
    """Give the (N, H, W, C) that holds the input, its padding before, and every tap of a window.

    The taps of ceil_mode's last window may lie beyond the padding.
    """

    def extent(axis: int, size: int, out_size: int, kernel: int) -> int:
        last_start = (out_size - 1) * geometry.stride[axis]
        last_tap = last_start + (kernel - 1) * geometry.dilation[axis]
        return max(geometry.padding[axis][0] + size, last_tap + 1)

    return (
        geometry.batch,
        extent(0, geometry.height, geometry.out_height, geometry.kernel_height),
        extent(1, geometry.width, geometry.out_width, geometry.kernel_width),
        channels,
    )


def pad(x: Array, geometry: Geometry) -> Array:
    """Give x (N, H, W, C) with zeros around it; x itself where no window needs them."""
    shape = padded_shape(geometry, x.shape[3])
    if shape == x.shape:
        return x
    padded = array_module(x).zeros(shape, x.dtype)
    unpad(padded, geometry)[...] = x
    return padded


def unpad(padded: Array, geometry: Geometry) -> Array:
    """Give the view of the input inside its padding."""
    top, left = geometry.padding[0][0], geometry.padding[1][0]
    return padded[:, top : top + geometry.height, left : left + geometry.width]


def windows(padded: Array, geometry: Geometry) -> Array:
    """Give the view (N, out_height, out_width, kernel_height, kernel_width, C)."""
    batch, _, _, channels = padded.shape
    sizes = (geometry.out_height, geometry.out_width, geometry.kernel_height, geometry.kernel_width)
    image, row, column, channel = padded.strides
    down, right = geometry.stride
    tap_down, tap_right = geometry.dilation
    steps = (row * down, column * right, row * tap_down, column * tap_right)
    as_strided = array_module(padded).lib.stride_tricks.as_strided
    return as_strided(padded, (batch, *sizes, channels), (image, *steps, channel))


def taps(padded: Array, geometry: Geometry) -> Iterator[tuple[int, int, Array]]:
    """Give (r, s, view (N, out_height, out_width, C) of the pixels under that tap)."""
    every_window = windows(padded, geometry)
    for r in range(geometry.kernel_height):
        for s in range(geometry.kernel_width):
            yield r, s, every_window[:, :, :, r, s]
