"""Batch normalization, ReLU and a max pool as one pass, for the pool of a residual network's stem.

Other pools, and empty batches, are left to the kernels of their families, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.elementwise import formula
from gradengine.kernels.cuda.launch import by_value, c_name, device_limits
from gradengine.kernels.cuda.normalization import (
    MOST_LANES,
    PAIRS_AT_ONCE,
    Shape,
    aligned_pixels,
    batch_norm_act,
    batch_norm_act_grad,
    dense,
    merged_grad_sums,
    moments_of,
    normalization_kernel,
    power_of_two,
    row_launch,
    sizes_of,
    sum_dtype,
    write_back,
)
from gradengine.kernels.cuda.pooling import max_pool2d, max_pool2d_scatter
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry

SOURCE = "normalized_pool.cu"
WARP = 32
WINDOW = 9  # taps; where relu lets nothing through the kernel notes a larger one
# As in the source: threads of a block that makes windows, and how many such blocks a
# multiprocessor holds.
WINDOW_THREADS = 224
RESIDENT = 2
MOST_PLANE = 1 << 31  # elements of an image, for indices of 32 bits

_IMAGES = np.dtype(
    [(name, np.int32) for name in ("count", "height", "width", "out_height", "out_width")]
)


def _instances() -> Iterator[str]:
    for array, vector, width in (
        *(("bfloat16", "float", 8), ("float16", "float", 8), ("float", "float", 4)),
        *(("double", "double", 2), ("float16", "float16", 8), ("bfloat16", "float", 1)),
        ("float", "float", 1),
    ):
        moment = "double" if array == "double" else "float"
        for one in dict.fromkeys((moment, "double")):
            yield f"batch_norm_max_pool<{array}, {vector}, {one}, {width}>"
        yield f"batch_norm_max_pool_grad_sums<{array}, {vector}, {width}>"
        yield f"batch_norm_max_pool_grad_apply<{array}, {vector}, {width}>"


KERNELS = {SOURCE: tuple(_instances())}


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
) -> tuple[Array, Array, Array, Array, Array | None]:
    running = (running_mean, running_var)
    if not _is_one_pass(geometry):
        normalized, mean, inv_std, _ = batch_norm_act(
            x, weight, bias, None, True, eps, moments, *running, momentum, batches
        )
        out, indices = max_pool2d(normalized, geometry)
        return out, mean, inv_std, indices, None
    xp, dtype = array_module(x), sum_dtype(x.dtype)
    pixels = aligned_pixels(x)
    _, channels, width = sizes_of(pixels)
    shape = (geometry.batch, geometry.out_height, geometry.out_width, channels)
    out, peaks = xp.empty(shape, x.dtype), xp.empty(shape, x.dtype)
    taps = xp.empty(shape, np.uint8)
    mean, inv_std = xp.empty(channels, dtype), xp.empty(channels, dtype)
    vectors: list[Any] = [dense(one) for one in (weight, bias, *running)]
    found: list[Any] = [dense(moment) for moment in moments or moments_of(pixels)]
    types = (c_name(found[0].dtype), width)
    run = normalization_kernel("max_pool", x.dtype, vectors, *types, source=SOURCE)
    arguments = (
        *(pixels, out, peaks, taps, *found, mean, *vectors[:2], inv_std, *vectors[2:], batches),
        *(_images(geometry), channels, float(eps), float(momentum)),
    )
    run(*_window_launch(geometry, width), arguments)
    write_back(running, vectors[2:])
    return from_nhwc(out), mean, inv_std, from_nhwc(taps), from_nhwc(peaks)


def batch_norm_relu_max_pool_grad(
    grad: Array,
    x: Array,
    out: Array,
    winners: Array,
    peaks: Array | None,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    inv_std: Array,
    geometry: Pool2dGeometry,
) -> tuple[Array, Array, Array]:
    if peaks is None:
        by_normalized = max_pool2d_scatter(formula("relu_grad", grad, out), winners, geometry)
        arguments = (None, None, weight, mean, inv_std, False, False)
        return batch_norm_act_grad(by_normalized, x, *arguments)[:3]
    xp, dtype = array_module(x), sum_dtype(x.dtype)
    grads, pixels = aligned_pixels(grad), aligned_pixels(x)
    rows, channels, width = sizes_of(grads)
    vector_dtype = mean.dtype if weight is None else weight.dtype
    by_weight, by_bias = xp.empty(channels, vector_dtype), xp.empty(channels, vector_dtype)
    grad_x = xp.empty(pixels.shape, x.dtype)
    weight, bias, mean, inv_std = (
        dense(weight),
        dense(bias),
        dense(mean, dtype),
        dense(inv_std, dtype),
    )
    sizes = row_launch(grads, PAIRS_AT_ONCE)
    parts = xp.empty((sizes[0][1], channels, 2), dtype)
    arguments = (grads, aligned_pixels(peaks), mean, inv_std, weight, bias, parts, rows, channels)
    types = (x.dtype, [by_weight], width)
    normalization_kernel("max_pool_grad_sums", *types, source=SOURCE)(*sizes, arguments)
    sums = merged_grad_sums(parts, inv_std, by_weight, by_bias)
    arguments = (grads, aligned_pixels(winners), pixels, weight, mean, inv_std, sums, grad_x)
    run = normalization_kernel("max_pool_grad_apply", *types, source=SOURCE)
    run(*_window_launch(geometry, width), (*arguments, _images(geometry), channels))
    return from_nhwc(grad_x), by_weight, by_bias


def winning_positions(winners: Array, geometry: Pool2dGeometry) -> Array:
    if winners.dtype == np.int32:
        return winners
    xp = array_module(winners)
    taps = winners.astype(np.int32)
    rows = 2 * xp.arange(geometry.out_height, dtype=np.int32)[:, None] - 1 + taps // 3
    columns = 2 * xp.arange(geometry.out_width, dtype=np.int32) - 1 + taps % 3
    return xp.where(taps < WINDOW, rows * np.int32(geometry.width) + columns, np.int32(-1))


def _is_one_pass(geometry: Pool2dGeometry) -> bool:
    """Whether the windows are 3 x 3 with stride 2 and padding 1, and there are some."""
    plane = geometry.channels * geometry.height * geometry.width
    return (
        (geometry.kernel_height, geometry.kernel_width) == (3, 3)
        and (geometry.stride, geometry.dilation) == ((2, 2), (1, 1))
        and geometry.padding[0][0] == geometry.padding[1][0] == 1
        and geometry.out_height == (geometry.height + 1) // 2  # ceil_mode may add one
        and geometry.out_width == (geometry.width + 1) // 2
        and geometry.batch > 0
        and 0 < plane < MOST_PLANE
        and geometry.batch * geometry.out_height < MOST_PLANE
    )


@lru_cache(CACHED_GEOMETRIES)
def _images(geometry: Pool2dGeometry) -> np.ndarray:
    """Give the sizes as the kernels' struct Images."""
    sizes = (geometry.batch, geometry.height, geometry.width)
    return by_value(np.array((*sizes, geometry.out_height, geometry.out_width), _IMAGES))


def _window_launch(geometry: Pool2dGeometry, width: int) -> tuple[Shape, Shape]:
    """Give grid and block: whole warps that a row of windows fills, blocks that the device holds."""
    packs = geometry.channels // width
    lanes = min(MOST_LANES, power_of_two(packs))
    columns = -(-packs // lanes)
    turns = -(-geometry.out_width // (WINDOW_THREADS // lanes))
    step = max(WARP // lanes, 1)
    side_by_side = -(-geometry.out_width // (turns * step)) * step
    rows = geometry.batch * geometry.out_height
    shares = -(-rows // max(device_limits().multiprocessors * RESIDENT // columns, 1))
    return (columns, -(-rows // shares)), (lanes, side_by_side)
