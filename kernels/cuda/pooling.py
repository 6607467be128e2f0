"""2-D pools: one thread for each pack of channels of a pixel, reading its windows or their gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import by_value, c_name, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, THREADS, channels_last, is_aligned
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pool2dGeometry

WARP = 32
LARGE_WINDOW = 32  # pixels from which on a block adds up a window of an average
MOST_LANES = 16  # packs of channels of such a block

_AXIS = np.dtype(
    [
        (name, np.int32)
        for name in ("size", "out", "kernel", "stride", "dilation", "before", "padding")
    ]
)
_POOL = np.dtype(
    [
        ("divisor", np.float64),
        ("rows", _AXIS),
        ("columns", _AXIS),
        ("channels", np.int32),
        ("counts_padding", np.int32),
    ],
    align=True,
)

_NAMES = (
    *("max_pool2d", "max_pool2d_scatter", "max_pool2d_gather"),
    *("avg_pool2d", "avg_pool2d_large", "avg_pool2d_grad"),
)
_TYPES = (
    *("float16, 8", "bfloat16, 8", "float, 4", "double, 2"),
    *("float16, 1", "bfloat16, 1", "float, 1", "double, 1"),
)
KERNELS = {"pooling.cu": tuple(f"{name}<{types}>" for name in _NAMES for types in _TYPES)}


def max_pool2d(x: Array, geometry: Pool2dGeometry) -> tuple[Array, Array]:
    out = _empty(x, geometry.output_shape, x.dtype)
    indices = _empty(x, geometry.output_shape, np.int32)
    _run("max_pool2d", geometry, channels_last(x), out, indices)
    return from_nhwc(out), from_nhwc(indices)


def max_pool2d_scatter(grad: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    grad_input = _empty(grad, geometry.input_shape, grad.dtype)
    _run("max_pool2d_scatter", geometry, channels_last(grad), _positions(indices), grad_input)
    return from_nhwc(grad_input)


def max_pool2d_gather(x: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    out = _empty(x, geometry.output_shape, x.dtype)
    _run("max_pool2d_gather", geometry, channels_last(x), _positions(indices), out)
    return from_nhwc(out)


def avg_pool2d(x: Array, geometry: Pool2dGeometry) -> Array:
    out = _empty(x, geometry.output_shape, x.dtype)
    large = geometry.kernel_height * geometry.kernel_width >= LARGE_WINDOW
    run = _run_large if large else _run
    run("avg_pool2d", geometry, channels_last(x), out)
    return from_nhwc(out)


def avg_pool2d_grad(grad: Array, geometry: Pool2dGeometry) -> Array:
    grad_input = _empty(grad, geometry.input_shape, grad.dtype)
    _run("avg_pool2d_grad", geometry, channels_last(grad), grad_input)
    return from_nhwc(grad_input)


def _run(name: str, geometry: Pool2dGeometry, *arrays: Array) -> None:
    """Run a kernel that makes the last array (N, height, width, C), a block within one row of it."""
    batch, height, width, channels = arrays[-1].shape
    if not batch:
        return
    dtype = arrays[0].dtype
    count = _pack(dtype, channels, arrays)
    items = width * (channels // count)
    blocks = -(-items // THREADS)
    threads = -(-items // (WARP * blocks)) * WARP  # as few as possible of the last block are idle
    run = kernel("pooling.cu", f"{name}<{c_name(dtype)}, {count}>")
    run((batch * height * -(-items // threads),), (threads,), (*arrays, _pool(geometry)))


def _run_large(name: str, geometry: Pool2dGeometry, x: Array, out: Array) -> None:
    """Run a kernel with a block for each window and up to MOST_LANES packs of its channels."""
    batch, out_height, out_width, channels = out.shape
    if not batch:
        return
    count = _pack(x.dtype, channels, (x, out))
    packs = channels // count
    lanes = min(MOST_LANES, 1 << (packs - 1).bit_length())
    grid = (batch * out_height * out_width, -(-packs // lanes))
    run = kernel("pooling.cu", f"{name}_large<{c_name(x.dtype)}, {count}>")
    run(grid, (lanes, THREADS // lanes), (x, out, _pool(geometry)))


def _pack(dtype: np.dtype, channels: int, arrays: tuple[Array, ...]) -> int:
    """Give how many neighbouring channels a thread makes: 16 bytes of them, or one."""
    count = PACK_BYTES // dtype.itemsize
    return count if channels % count == 0 and is_aligned(*arrays) else 1


@lru_cache(CACHED_GEOMETRIES)
def _pool(geometry: Pool2dGeometry) -> np.ndarray:
    """Give the geometry as the kernels' struct Pool."""
    sizes = zip(
        (geometry.height, geometry.width),
        (geometry.out_height, geometry.out_width),
        (geometry.kernel_height, geometry.kernel_width),
        geometry.stride,
        geometry.dilation,
        (before for before, _ in geometry.padding),
        (before + after for before, after in geometry.padding),
        strict=True,
    )
    rows, columns = sizes
    divisor = geometry.divisor_override or 0
    record = (divisor, rows, columns, geometry.channels, geometry.count_include_pad)
    return by_value(np.array(record, _POOL))


def _empty(like: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Give an uninitialized (N, H, W, C) array for a shape (N, C, H, W)."""
    batch, channels, height, width = shape
    return array_module(like).empty((batch, height, width, channels), dtype)


def _positions(indices: Array) -> Array:
    return to_nhwc(indices).astype(np.int32, copy=False)
