"""Channels-last memory: the layout in which every kernel computes."""

from __future__ import annotations

from typing import Any

# numpy.ndarray or cupy.ndarray
Array = Any


def to_nhwc(x: Array) -> Array:
    """Give x (N, C, H, W) as a C-contiguous (N, H, W, C) array, copied only if it is not yet."""
    array = x.transpose(0, 2, 3, 1)
    return array if array.flags.c_contiguous else array.copy()


def from_nhwc(array: Array) -> Array:
    """Give an (N, H, W, C) array as an (N, C, H, W) view of the same memory."""
    return array.transpose(0, 3, 1, 2)
