"""What is done to a convolution's result while it is in cache: bias, residual, relu, moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from gradengine.kernels.cpu.launch import kernel_part, parallel_kernel
from gradengine.kernels.cpu.simd import (
    INDEX,
    Loop,
    Vector,
    Vectors,
    copy_run,
    intrinsic,
    lanes,
    offset,
    pointer,
)

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


def empty_moments(blocks: int, channels: int, dtype: np.dtype) -> Array:
    """Make room for what `finish_pixels` gathers, blocks of pixels by themselves."""
    return np.zeros((blocks, MOMENTS, channels), dtype)


def combine_moments(moments: Array) -> tuple[Array, Array]:
    """Give mean and biased variance by channel, in float64, of all blocks together; 0 of none.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    mean, var = np.zeros((2, moments.shape[2]))
    if len(moments):
        _combine(1, moments, mean, var)
    return mean, var


@parallel_kernel
def _combine(worker, workers, moments, mean, var):
    count = np.zeros(len(mean))
    for block in moments:
        for k in range(len(mean)):
            count[k] += block[1, k]
            mean[k] += np.float64(block[0, k]) * block[1, k] + block[2, k]
    for k in range(len(mean)):
        mean[k] /= count[k]
    for block in moments:
        for k in range(len(mean)):
            total = np.float64(block[2, k])
            offset = total / block[1, k]
            distance = block[0, k] + offset - mean[k]
            var[k] += block[3, k] - offset * total + block[1, k] * distance * distance
    for k in range(len(mean)):
        spread = var[k] / count[k]
        var[k] = 0.0 if spread < 0.0 else spread  # nan passes


@kernel_part
def finish_pixels(out, first, stop, channel, stop_channel, bias, residual, relu, moments):
    """Finish some channels of the pixels first to stop of out (N, P, Q, K).

    bias (K,), residual shaped like out and moments (MOMENTS, K) are empty where not wanted.
    """
    channels, zero = out.shape[3], out.dtype.type(0)
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
                row[k] = zero if row[k] <= zero else row[k]
    if moments.size:
        _gather(pixels, first, stop, moments, channel, stop_channel)


@kernel_part
def _gather(pixels, first, stop, moments, channel, stop_channel):
    channels = pixels.shape[1]
    if moments[1, channel] == 0:
        copy_run(
            pointer(pixels, first * channels + channel),
            pointer(moments, channel),
            stop_channel - channel,
        )
    for k in range(channel, stop_channel):
        moments[1, k] += stop - first
    while channel < stop_channel:
        count = min(stop_channel - channel, SUMS * lanes(pixels))
        _add_distances(
            pointer(pixels, first * channels + channel), channels, stop - first,
            pointer(moments, channel), channels, count,
        )  # fmt: skip
        channel += count


SUMS = 4  # vectors of channels that are summed at once: an addition waits for the one before


@intrinsic
def _add_distances(typing_context, place, row, pixels, moments, moments_row, count):
    """Add the distances of some pixels' channels from their origins, and the squares, to moments.

    `count` is at most SUMS vectors.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, row, pixels, moments, moments_row, count = arguments
        vectors = Vectors(builder, place.type.pointee)
        starts = [ir.Constant(INDEX, vectors.lanes * i) for i in range(SUMS)]
        masks = [vectors.mask(builder.sub(count, start)) for start in starts]
        origins, *sums = (
            [offset(builder, builder.gep(moments, [start]), (moments_row, i)) for start in starts]
            for i in (0, 2, 3)
        )
        origins = [vectors.load(*at) for at in zip(origins, masks, strict=True)]
        places = [*sums[0], *sums[1]]
        before = [vectors.load(*at) for at in zip(places, masks * 2, strict=True)]
        after = _sum_distances(vectors, place, row, pixels, origins, before, starts, masks)
        for total, at, mask in zip(after, places, masks * 2, strict=True):
            vectors.store(total, at, mask)
        return context.get_dummy_value()

    kinds = (place, types.intp, types.intp, moments, types.intp, types.intp)
    return types.void(*kinds), generate


def _sum_distances(
    vectors: Vectors, place: Any, row: Any, pixels: Any, origins: Any, sums: Any, starts: Any,
    masks: Any,
) -> list[Vector]:  # fmt: skip
    """Emit the loop over at least one pixel; the sums of distances and squares stay in registers."""
    loop = Loop(vectors, pixels, [place], sums)
    totals, squares = loop.sums[: len(origins)], loop.sums[len(origins) :]
    for i, (origin, start, mask) in enumerate(zip(origins, starts, masks, strict=True)):
        distance = vectors.load(vectors.builder.gep(loop.places[0], [start]), mask) - origin
        totals[i] = totals[i] + distance
        squares[i] = vectors.multiply_add(distance, distance, squares[i])
    loop.repeat([row], [*totals, *squares])
    return [*totals, *squares]
