"""Weighted sums along one axis, one tap of all outputs at a time."""

from __future__ import annotations

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.layout import Array


def weigh(x: Array, positions: Array, weights: Array, axis: int) -> Array:
    xp = array_module(x)
    along = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    total = None
    for place, weight in zip(positions.T, weights.T, strict=True):
        part = xp.take(x, xp.asarray(np.maximum(place, 0)), axis=axis)
        if (weight != 1).any():
            part *= xp.asarray(weight.astype(x.dtype)).reshape(along)
        if (place < 0).any():
            part = xp.where(xp.asarray(place >= 0).reshape(along), part, xp.zeros((), x.dtype))
        total = part if total is None else total + part
    return total
