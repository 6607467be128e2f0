"""Scratch memory that kernels share, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from gradengine.kernels.layout import Array

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

_free: list[Array] = []  # memory that nobody computes in, the largest last


@contextmanager
def workspace(*shape: int, dtype: Any) -> Iterator[Array]:
    """Lend a C-contiguous array for the block, which is where a kernel computes in it.

    Its content is whatever the last block left, its memory starts on a cache line and must not be
    kept: the next block gets the same. Fresh memory costs as much as a kernel, for the pages that
    the system has to clear. The block holds LAUNCH_LOCK, so Python threads take turns; a block
    inside another gets memory of its own.
    """
    dtype = np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    with LAUNCH_LOCK:
        memory = _free.pop() if _free else _aligned(size)
        if memory.size < size:
            memory = _aligned(size)
        try:
            yield memory[:size].view(dtype).reshape(shape)
        finally:
            _free.append(memory)
            _free.sort(key=len)


def _aligned(size: int) -> Array:
    """Return `size` bytes that start on a cache line."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
