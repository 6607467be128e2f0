"""Arrays walked together as flat memory: values, their gradients, and what an optimizer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.layout import Array


class Rows:
    """Rows of arrays of which those at one place have one shape, and their elements belong together.

    Inside a `with` statement all are of `dtype`, fill a piece of memory each, and lie in it as the
    first row's array at their place does. Arrays that do not take part as copies; at the end copies
    of all rows but the second, which is only read, are copied back.
    """

    def __init__(self, dtype: np.dtype, values: Sequence[Array], *others: Sequence[Array]) -> None:
        dense = [_dense(array, dtype) for array in values]
        self._given = (values, *others)
        self._rows = [dense, *(list(map(alike, row, dense)) for row in others)]

    def __enter__(self) -> list[list[Array]]:
        return self._rows

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # The values last: without momentum they stand in for velocities, as copies made before.
        for place in reversed(range(len(self._rows))):
            for array, target in zip(self._rows[place], self._given[place], strict=True):
                if array is not target and place != 1:
                    target[...] = array


def _dense(array: Array, dtype: np.dtype) -> Array:
    """Give the array itself if its elements fill a piece of memory, else a copy."""
    fills = _fills(array.shape, array.strides, array.itemsize)
    # CuPy's arrays can always be written to
    may_write = not isinstance(array, np.ndarray) or array.flags.writeable
    if fills and array.dtype == dtype and may_write:
        return array
    return array_module(array).array(array, dtype, order="C")


def alike(array: Array, like: Array) -> Array:
    """Give the array itself if its memory is laid out as that of `like`, else a copy that is."""
    same = array.strides == like.strides or _same_order(array.shape, array.strides, like.strides)
    # NumPy's scalars have a dtype and strides too, but no memory
    if same and array.dtype == like.dtype and not isinstance(array, np.generic):
        return array
    copied = array_module(like).empty_like(like)
    copied[...] = array
    return copied


@lru_cache(1024)
def _fills(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected = itemsize
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@lru_cache(1024)
def _same_order(shape: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a == b for size, a, b in zip(shape, one, other, strict=True) if size != 1)
