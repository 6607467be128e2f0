"""What is done to a convolution's result while it is in cache: bias, residual, relu, moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradengine.kernels.cpu.launch import kernel_part

if TYPE_CHECKING:
    from gradengine.kernels.layout import Array

MOMENTS = 4  # by block and channel: a pixel as origin, a count, sums of distances and their squares


class Finish(NamedTuple):
    """What `finish_pixels` takes: absent arrays are empty, since None would be compiled anew."""

    bias: Array  # (K,)
    residual: Array  # (N, P, Q, K)
    relu: bool
    moments: Array  # (blocks, MOMENTS, K)


def absent(ndim: int, dtype: np.dtype) -> Array:
    return np.empty((0,) * ndim, dtype)


def no_finish(blocks: int, dtype: np.dtype) -> Finish:
    """Leave the result of an algorithm in so many blocks as it is."""
    return Finish(absent(1, dtype), absent(4, dtype), False, empty_moments(blocks, 0, dtype))


def empty_moments(blocks: int, channels: int, dtype: np.dtype) -> Array:
    """Make room for what `finish_pixels` gathers, blocks of pixels by themselves."""
    return np.zeros((blocks, MOMENTS, channels), dtype)


def combine_moments(moments: Array) -> tuple[Array, Array]:
    """Give mean and biased variance by channel, in float64, of all blocks together; 0 of none.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    if not len(moments):
        return np.zeros(moments.shape[2]), np.zeros(moments.shape[2])
    origin, count, total, squares = moments.astype(np.float64).transpose(1, 0, 2)
    offset = total / count
    mean = ((origin + offset) * count).sum(axis=0) / count.sum(axis=0)
    spread = squares - offset * total + count * np.square(origin + offset - mean)
    return mean, np.maximum(spread.sum(axis=0) / count.sum(axis=0), 0.0)


@kernel_part
def finish_pixels(out, first, stop, channel, stop_channel, bias, residual, relu, moments):
    """Finish some channels of the pixels first to stop of out (N, P, Q, K).

    bias (K,), residual shaped like out and moments (MOMENTS, K) are empty where not wanted.
    """
    channels = out.shape[3]
    pixels = out.reshape((out.size // channels, channels))
    others = residual.reshape((residual.size // channels, channels))
    for pixel in range(first, stop):
        row = pixels[pixel, channel:stop_channel]
        if bias.size:
            own = bias[channel:stop_channel]
            for k in range(row.size):
                row[k] += own[k]
        if others.size:
            other = others[pixel, channel:stop_channel]
            for k in range(row.size):
                row[k] += other[k]
        if relu:
            for k in range(row.size):
                row[k] = 0 if row[k] <= 0 else row[k]
    if moments.size:
        _gather(pixels, first, stop, moments[:, channel:stop_channel], channel)


@kernel_part
def _gather(pixels, first, stop, moments, channel):
    for k in range(moments.shape[1]):
        if moments[1, k] == 0:
            moments[0, k] = pixels[first, channel + k]
        moments[1, k] += stop - first
    origin, total, squares = moments[0], moments[2], moments[3]
    for pixel in range(first, stop):
        row = pixels[pixel, channel : channel + origin.size]
        for k in range(row.size):
            distance = row[k] - origin[k]
            total[k] += distance
            squares[k] += distance * distance
