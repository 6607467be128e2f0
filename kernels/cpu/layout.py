"""Conversions: to the layout in which kernels compute, and of element type."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from gradengine.kernels import PARALLEL_SIZE
from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

BLOCK = 256  # pixels of one piece of work: their channels stay in cache while they are filled


def kernel_input(x: Array) -> Array:
    """Give x (N, C, H, W) as the (N, H, W, C) array that a compiled function takes."""
    array = x.transpose(0, 2, 3, 1)
    # To Numba a read-only array is another type: it would compile everything a second time.
    if array.flags.c_contiguous and array.flags.writeable:
        return array
    if x.flags.c_contiguous and x.flags.writeable and _is_long(x):
        batch, channels, height, width = x.shape
        out = np.empty(array.shape, x.dtype)
        planes = x.reshape(batch, channels, height * width)
        _interleave(get_num_threads(), planes, out.reshape(batch, height * width, channels))
        return out
    return array.copy(order="C")


def kernel_rows(x: Array) -> Array:
    """Give x (..., n) as the (rows, n) array that a compiled function takes."""
    array = np.ascontiguousarray(x).reshape(prod(x.shape[:-1]), x.shape[-1])
    return array if array.flags.writeable else array.copy()


def _is_long(x: Array) -> bool:
    """Whether all cores are worth it, for images as they are usually given."""
    return x.dtype == np.float32 and x.size >= PARALLEL_SIZE


def cast_all(arrays: Sequence[Array], dtype: np.dtype) -> Sequence[Array]:
    return [array.astype(dtype) for array in arrays]


@parallel_kernel
def _interleave(worker, workers, planes, pixels):
    """Copy planes (N, C, H * W) to pixels (N, H * W, C)."""
    batch, channels, count = planes.shape
    blocks = (count + BLOCK - 1) // BLOCK
    for block in own_range(worker, workers, batch * blocks):
        image, first = block // blocks, block % blocks * BLOCK
        stop = min(first + BLOCK, count)
        for channel in range(channels):
            source = planes[image, channel, first:stop]
            target = pixels[image, first:stop, channel]
            for i in range(len(source)):
                target[i] = source[i]
