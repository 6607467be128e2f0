"""Indexing: reading and writing chosen elements, by position or by mask.

Everything comes down to two adjoint operations, `_pick` (read elements at given places) and `_put_back`
(add elements to zeros at these places). They name places by `axes` and `index`: one integer array for
each of these axes, all broadcast together, the other axes whole. In place of an array, None stands for
the array's own positions along that axis, which is how `gather` names its other axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gradengine import device as devices
from gradengine.device import array_module
from gradengine.dtypes import as_dtype
from gradengine.operation import array_of, operation, sum_to_shape
from gradengine.ops.conversion import to_dtype
from gradengine.ops.elementwise import where
from gradengine.ops.shape import broadcast_tensors, expand, normalized_dim, ravel, reshape, slices
from gradengine.tape import Variable

Axes = tuple[int, ...]
Index = tuple[Any, ...]


class ValuesIndices(NamedTuple):
    """Elements and where they were: what max, min, sort and topk along a dim return."""

    values: Any
    indices: Any


# ---- places --------------------------------------------------------------------------------------


def _filled(index: Index) -> Index:
    """Return the index with an array of positions in place of each None."""
    place = next(axis for axis, one in enumerate(index) if one is not None)
    given = index[place]
    if given.ndim == len(index):
        own = range(given.ndim)
    else:  # the indexed axis is reduced away: the axes behind it are one further to the front
        own = [axis - (axis > place) for axis in range(len(index))]
    xp = array_module(given)
    return tuple(
        xp.arange(given.shape[at]).reshape(-1, *[1] * (given.ndim - 1 - at)) if one is None else one
        for one, at in zip(index, own, strict=False)
    )


def _key(ndim: int, axes: Axes, index: Index) -> Index:
    """Return what to write between brackets to reach the places."""
    if None in map(type_or_none, index):
        index = _filled(index)
    key: list[Any] = [slice(None)] * ndim
    for axis, one in zip(axes, index, strict=True):
        key[axis] = one
    return tuple(key)
