"""Weighted sums along one axis. What they are made of is kept on the device for the next time."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda import launch
from gradengine.kernels.cuda.capture import keep, postpone
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, THREADS, blocks, is_aligned
from gradengine.kernels.layout import Array

# A network resizes few shapes; images of ever new sizes must not fill the device.
CACHED_TABLES = 128

_WORDS = {
    16: "uint4",
    8: "uint64_t",
    4: "uint32_t",
    2: "uint16_t",
    1: "unsigned char",
}
_TYPES = (
    *("float16, 8", "bfloat16, 8", "float, 4", "double, 2"),
    *("float16, 1", "bfloat16, 1", "float, 1", "double, 1"),
)
KERNELS = {
    "resize.cu": (
        *(f"weigh<{types}>" for types in _TYPES),
        *(f"take_pixels<{word}>" for word in _WORDS.values()),
    )
}


def weigh(x: Array, positions: np.ndarray, weights: np.ndarray, axis: int) -> Array:
    xp = array_module(x)
    x = xp.ascontiguousarray(x)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    out = xp.empty((*before, len(positions), *after), x.dtype)
    if not out.size:
        return out
    if not positions.size or not x.size:
        out[...] = 0
    elif x.dtype.name in ("float16", "bfloat16", "float32", "float64"):
        _weigh(x, positions, weights, math.prod(after), out, axis)
    else:
        _take(x, positions, math.prod(after), out, axis)
    return out


def _weigh(
    x: Array, positions: np.ndarray, weights: np.ndarray, inner: int, out: Array, axis: int
) -> None:
    places, taps = positions.shape
    sum_dtype = np.float64 if x.dtype == np.float64 else np.float32
    count = PACK_BYTES // x.dtype.itemsize
    if inner % count or not is_aligned(x, out):
        count = 1
    tables = (_on_device(x, positions, np.int32), _on_device(x, weights, sum_dtype))
    run = kernel("resize.cu", f"weigh<{c_name(x.dtype)}, {count}>")
    sizes = (x.shape[axis], places, taps, inner, out.size)
    run((blocks(out.size // count),), (THREADS,), (x, *tables, out, *sizes))


def _take(x: Array, positions: np.ndarray, inner: int, out: Array, axis: int) -> None:
    """Copy one pixel for each output, in words as large as the memory allows."""
    run_bytes = inner * x.dtype.itemsize
    fits = is_aligned(x, out)
    word = next(n for n in _WORDS if run_bytes % n == 0 and (fits or n <= x.dtype.itemsize))
    table = _on_device(x, positions[:, 0], np.int32)
    run = kernel("resize.cu", f"take_pixels<{_WORDS[word]}>")
    words = out.size * x.dtype.itemsize // word
    sizes = (x.shape[axis], len(positions), run_bytes // word, words)
    run((blocks(words),), (THREADS,), (x, table, out, *sizes))


def _on_device(like: Array, table: np.ndarray, dtype: Any) -> Array:
    """Give a NumPy table as an array of the current device, copied there the first time."""
    table = np.ascontiguousarray(table, dtype)
    device = launch.runtime.device()
    found = _kept_table(array_module(like), device, table.tobytes(), table.dtype)
    keep(found)
    return found


@lru_cache(CACHED_TABLES)
def _kept_table(xp: Any, device: int, content: bytes, dtype: np.dtype) -> Array:
    postpone()
    return xp.asarray(np.frombuffer(content, dtype))  # waits for the copy
