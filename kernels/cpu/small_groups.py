"""Small groups of a convolution, several computed as one: together they fill a tile's columns.

The weight of such a union is zero between its groups, which costs no more than the empty columns of
a tile did. But zero times infinity is NaN: pixels that are not finite are left to groups alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu import depthwise, microkernel
from gradengine.kernels.geometry import CACHED_GEOMETRIES

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array


@lru_cache(CACHED_GEOMETRIES)
def united(geometry: Conv2dGeometry, dtype: np.dtype) -> Conv2dGeometry:
    """Return the geometry with its groups united as far as they are small; as it is if none are."""
    groups = geometry.groups
    if groups == 1 or depthwise.is_suitable(geometry):
        return geometry
    channels = max(geometry.in_channels, geometry.out_channels) // groups
    most = max(microkernel.width(dtype) // channels, 1)
    union = max(n for n in range(1, most + 1) if groups % n == 0)
    return geometry._replace(groups=groups // union)


def unite(weight: Array, groups: int, unions: int) -> Array:
    """Give weight (K, R, S, own C) of some groups as that of fewer unions, zero between groups."""
    split, union = _split(weight, groups, unions), groups // unions
    out = np.zeros((*split.shape[:-1], union, split.shape[-1]), weight.dtype)
    for group in range(union):
        out[:, group, ..., group, :] = split[:, group]
    return out.reshape(*weight.shape[:3], -1)


def divide(weight: Array, groups: int, unions: int) -> Array:
    """Give what belongs to the groups in a weight (K, R, S, channels of a union)."""
    split, union = _split(weight, groups, unions), groups // unions
    split = split.reshape(*split.shape[:-1], union, -1)
    own = [split[:, group, ..., group, :] for group in range(union)]
    return np.stack(own, axis=1).reshape(*weight.shape[:3], -1)


def _split(weight: Array, groups: int, unions: int) -> Array:
    """Give weight (K, R, S, C) as (unions, groups of each, K of a group, R, S, C)."""
    return weight.reshape(unions, groups // unions, -1, *weight.shape[1:])
