"""2-D pools, one tap of all windows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.windows import pad, padded_shape, sum_dtype, taps, unpad
from gradengine.kernels.geometry import tap_positions, window_divisors
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry


def max_pool2d(x: Array, geometry: Pool2dGeometry) -> tuple[Array, Array]:
    xp = array_module(x)
    shape = (geometry.batch, geometry.out_height, geometry.out_width, geometry.channels)
    best = xp.full(shape, -np.inf, x.dtype)
    indices = xp.full(shape, -1, np.int32)
    positions = xp.asarray(_flat_positions(geometry))
    for r, s, values in taps(pad(to_nhwc(x), geometry), geometry):
        position = positions[r, s]
        wins = (values > best) | xp.isnan(values) | (indices < 0)
        wins &= position >= 0
        best = xp.where(wins, values, best)
        indices = xp.where(wins, position, indices)
    return from_nhwc(best), from_nhwc(indices)


def max_pool2d_scatter(grad: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    xp = array_module(grad)
    grads, winners = to_nhwc(grad), to_nhwc(indices)
    padded = xp.zeros(padded_shape(geometry, geometry.channels), sum_dtype(grad.dtype))
    positions = xp.asarray(_flat_positions(geometry))
    for r, s, target in taps(padded, geometry):
        target[...] += xp.where(winners == positions[r, s], grads, grads.dtype.type(0))
    return _unpadded(padded, geometry, grad.dtype)


def max_pool2d_gather(x: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    batch, channels = geometry.batch, geometry.channels
    planes = to_nhwc(x).reshape(batch, geometry.height * geometry.width, channels)
    winners = to_nhwc(indices)
    windows = geometry.out_height * geometry.out_width
    positions = winners.reshape(batch, windows, channels)
    out = array_module(x).take_along_axis(planes, positions, axis=1)
    return from_nhwc(out.reshape(winners.shape))


def avg_pool2d(x: Array, geometry: Pool2dGeometry) -> Array:
    shape = (geometry.batch, geometry.out_height, geometry.out_width, geometry.channels)
    total = array_module(x).zeros(shape, sum_dtype(x.dtype))
    for _, _, values in taps(pad(to_nhwc(x), geometry), geometry):
        total += values
    total /= _divisors(total, geometry)
    return from_nhwc(total.astype(x.dtype, copy=False))


def avg_pool2d_grad(grad: Array, geometry: Pool2dGeometry) -> Array:
    shares = to_nhwc(grad).astype(sum_dtype(grad.dtype))
    shares /= _divisors(shares, geometry)
    padded = array_module(grad).zeros(padded_shape(geometry, geometry.channels), shares.dtype)
    for _, _, target in taps(padded, geometry):
        target[...] += shares
    return _unpadded(padded, geometry, grad.dtype)


def _flat_positions(geometry: Pool2dGeometry) -> np.ndarray:
    """Give each tap's position h * W + w, -1 on padding: (R, S, out_height, out_width, 1)."""
    rows, columns = (table.T for table in tap_positions(geometry))
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = (rows >= 0) & (columns >= 0)
    flat = np.where(inside, rows * geometry.width + columns, -1)
    return flat[..., None].astype(np.int32)


def _divisors(like: Array, geometry: Pool2dGeometry) -> Array:
    divisors = window_divisors(geometry)[..., None].astype(like.dtype)
    return array_module(like).asarray(divisors)


def _unpadded(padded: Array, geometry: Pool2dGeometry, dtype: np.dtype) -> Array:
    grad_input = unpad(padded, geometry).astype(dtype, copy=False)
    return from_nhwc(array_module(padded).ascontiguousarray(grad_input))
