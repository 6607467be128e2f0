"""Deep products in slices: blocks share the depth, and their sums are added in a fixed order."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradengine.kernels.cuda.launch import by_value, c_name, device_limits, kernel
from gradengine.kernels.layout import Array

SOURCE = "slices.cu"
THREADS = 256

# Up to so many slices one thread adds an element's; more are shared among SHARED_BY threads.
FEW_SLICES = 8
SHARED_BY = 8

# Of the sums of all slices.
PARTIAL_BYTES = 32 << 20

_PART = np.dtype(
    [(name, np.int64) for name in ("taps", "channels", "first_tap", "used_taps", "used_channels")]
)

_TYPES = ("float, float16", "float, bfloat16", "float, float", "double, double")
KERNELS = {SOURCE: tuple(f"add_slices<{t}, {rows}>" for t in _TYPES for rows in (1, SHARED_BY))}


class Plan(NamedTuple):
    """How many slices there are, and the depth of each but the last."""

    slices: int
    depth: int


def plan(depth: int, unit: int, least: int, blocks: int, per_processor: int, size: int) -> Plan:
    """Plan slices of `blocks` blocks and a result of `size` float32 so that they fill the device.

    There are about `per_processor` blocks for each multiprocessor, unless slices became shallower
    than `least` or their results larger than PARTIAL_BYTES. Their depth is a multiple of `unit`.
    """
    wanted = per_processor * device_limits().multiprocessors // blocks
    slices = max(1, min(wanted, depth // least, PARTIAL_BYTES // (4 * size)))
    units = -(-depth // unit)
    units_of_slice = -(-units // slices)
    return Plan(-(-units // units_of_slice), units_of_slice * unit)


def add_slices(partials: Array, out: Array, first_tap: int = 0) -> None:
    """Write sums of partials (slices, lines, taps, channels) to out (lines, taps, channels).

    Both are contiguous. out may have fewer taps and channels: those from first_tap and 0 on.
    """
    slices, lines, taps, channels = partials.shape
    part = _part(taps, channels, first_tap, *out.shape[1:])
    rows = 1 if slices <= FEW_SLICES else SHARED_BY
    types = f"{c_name(partials.dtype)}, {c_name(out.dtype)}"
    grid = (-(-out.size * rows // THREADS),)
    shared_bytes = THREADS * partials.dtype.itemsize
    run = kernel(SOURCE, f"add_slices<{types}, {rows}>")
    run(grid, (THREADS,), (partials, out, part, lines, slices), shared_bytes)


@lru_cache(1024)
def _part(*sizes: int) -> np.ndarray:
    """Return the struct Part of these sizes."""
    return by_value(np.array(sizes, _PART))
