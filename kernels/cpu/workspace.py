"""Scratch memory that kernels share, one after the other."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from gradengine.kernels.layout import Array

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

_free: list[Array] = []  # memory that nobody computes in, the largest last


class workspace:  # noqa: N801 - used like a function
    """Lends a C-contiguous array for a `with` block, which is where a kernel computes in it.

    Its content is whatever the last block left, its memory starts on a cache line and must not be
    kept: the next block gets the same. Fresh memory costs as much as a kernel, for the pages that
    the system has to clear. The block holds LAUNCH_LOCK, so Python threads take turns; a block
    inside another gets memory of its own.
    """

    __slots__ = ("_dtype", "_memory", "_shape")

    def __init__(self, *shape: int, dtype: Any) -> None:
        self._shape = shape
        self._dtype = np.dtype(dtype)

    def __enter__(self) -> Array:
        size = prod(self._shape) * self._dtype.itemsize
        LAUNCH_LOCK.acquire()
        try:
            memory = _free.pop() if _free else _aligned(size)
            self._memory = memory if memory.size >= size else _aligned(size)
        except MemoryError:
            LAUNCH_LOCK.release()
            raise
        return self._memory[:size].view(self._dtype).reshape(self._shape)

    def __exit__(self, *_: object) -> None:
        _free.append(self._memory)
        _free.sort(key=len)
        LAUNCH_LOCK.release()


def _aligned(size: int) -> Array:
    """Return `size` bytes that start on a cache line."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
