"""Conversions of memory layout and element type, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import address, addresses, by_value, c_name, kernel
from gradengine.kernels.layout import Array

THREADS = 256
PACK_BYTES = 16  # of the widest access of a thread
TILE_BLOCK = (32, 8)
MOST_ARRAYS = 96  # of layout.cu
CAST_PACKS = 4

_STRIDES = np.dtype([(name, np.int64) for name in ("image", "channel", "row", "column")])
_CAST_TABLE = np.dtype(
    [
        ("sources", np.uint64, MOST_ARRAYS),
        ("targets", np.uint64, MOST_ARRAYS),
        ("sizes", np.int64, MOST_ARRAYS),
        ("first_blocks", np.int32, MOST_ARRAYS),
        ("arrays", np.int32),
    ],
    align=True,
)

_TYPES = ("float16", "bfloat16", "float", "double")
_PAIRS = ("float, float16", "float, bfloat16", "float16, float", "bfloat16, float")
KERNELS = {
    "layout.cu": (
        "pack_pixels<float, float, 4>",
        "pack_pixels<float, float16, 4>",
        "pack_pixels<float, bfloat16, 4>",
        "pack_pixels<float, bfloat16, 8>",
        "pack_pixels<double, double, 2>",
        *(f"gather_pixels<{pair}>" for pair in _PAIRS),
        *(f"gather_pixels<{name}, {name}>" for name in _TYPES),
        *(f"transpose_matrices<{pair}>" for pair in _PAIRS),
        *(f"transpose_matrices<{name}, {name}>" for name in _TYPES),
        *(f"cast_arrays<{pair}>" for pair in _PAIRS),
        "cast_arrays<double, bfloat16>",
    )
}


def channels_last(x: Array, channels: int | None = None, dtype: Any = None) -> Array:
    """Give floating point x (N, C, H, W) as a C-contiguous (N, H, W, channels) array of a dtype.

    Channels beyond x's own are zeros. x itself is given, as a view, where nothing is to be done.
    """
    batch, given, height, width = x.shape
    count = given if channels is None else channels
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    pixels = x.transpose(0, 2, 3, 1)
    if count == given and pixels.flags.c_contiguous:
        return pixels if dtype == x.dtype else cast_all([pixels], dtype)[0]
    out = array_module(x).empty((batch, height, width, count), dtype)
    if not out.size:
        return out
    types = f"{c_name(x.dtype)}, {c_name(dtype)}"
    if count.bit_count() == 1 and count * dtype.itemsize <= PACK_BYTES:
        size = batch * height * width
        arguments = (x, out, _element_strides(x), given, height, width, size)
        run = kernel("layout.cu", f"pack_pixels<{types}, {count}>")
        run((blocks(size),), (THREADS,), arguments)
    elif x.flags.c_contiguous:
        _transpose(x, out, (batch, given, height * width, count))
    else:
        arguments = (x, out, _element_strides(x), given, height, width, count, out.size)
        kernel("layout.cu", f"gather_pixels<{types}>")((blocks(out.size),), (THREADS,), arguments)
    return out


def channels_first(x: Array, dtype: Any = None) -> Array:
    """Give floating point x (N, C, H, W) as a C-contiguous array of a dtype: what others read."""
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    if x.flags.c_contiguous:
        return x if dtype == x.dtype else cast_all([x], dtype)[0]
    batch, channels, height, width = x.shape
    out = array_module(x).empty(x.shape, dtype)
    if out.size:
        _transpose(channels_last(x), out, (batch, height * width, channels, height * width))
    return out


def copy_in_order(x: Array) -> Array:
    return x.copy(order="C")


def cast_all(
    arrays: Sequence[Array], dtype: Any, targets: Sequence[Array] | None = None
) -> Sequence[Array]:
    """Convert floating point arrays of one dtype to another, up to 96 of them by one launch.

    targets, where given, are written: of that dtype, in the shapes and the memory order of arrays.
    Otherwise they are new. Arrays with gaps in memory are copied together first.
    """
    if not arrays:
        return []
    sources = [array if is_dense(array) else array.copy(order="K") for array in arrays]
    if targets is None:
        targets = [_empty_alike(source, dtype) for source in sources]
    pairs = [pair for pair in zip(sources, targets, strict=True) if pair[0].size]
    for first in range(0, len(pairs), MOST_ARRAYS):
        _cast(pairs[first : first + MOST_ARRAYS])
    return targets


def _cast(pairs: Sequence[tuple[Array, Array]]) -> None:
    source, target = pairs[0]
    itemsize = max(source.dtype.itemsize, target.dtype.itemsize)
    of_block = THREADS * CAST_PACKS * (PACK_BYTES // itemsize)
    ends = list(accumulate(-(-one.size // of_block) for one, _ in pairs))
    count = len(pairs)
    table = np.zeros((), _CAST_TABLE)
    table["sources"][:count] = addresses([one for one, _ in pairs])
    table["targets"][:count] = addresses([one for _, one in pairs])
    table["sizes"][:count] = [one.size for one, _ in pairs]
    table["first_blocks"][1:count] = ends[:-1]
    table["arrays"] = count
    run = kernel("layout.cu", f"cast_arrays<{c_name(source.dtype)}, {c_name(target.dtype)}>")
    run((ends[-1],), (THREADS,), (by_value(table),))


def is_dense(array: Array) -> bool:
    """Whether the elements of an array lie in memory without gaps, in whatever order of axes."""
    return array.flags.c_contiguous or _order(array) is not None


def _order(array: Array) -> tuple[int, ...] | None:
    """Return the axes in the order in which dense elements lie, None where there are gaps."""
    return _dense_order(array.shape, array.strides, array.dtype.itemsize)


@lru_cache(1024)
def _dense_order(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, ...] | None:
    order = sorted(range(len(shape)), key=lambda axis: (strides[axis], shape[axis]), reverse=True)
    expected = itemsize
    for axis in reversed(order):
        if shape[axis] != 1:
            if strides[axis] != expected:
                return None
            expected *= shape[axis]
    return tuple(order)


def _empty_alike(source: Array, dtype: Any) -> Array:
    """Give an uninitialized array of a dtype, in the memory order of a dense one."""
    xp, shape = array_module(source), source.shape
    if source.flags.c_contiguous:
        return xp.empty(shape, dtype)
    order = _order(source)
    assert order is not None
    out = xp.empty(tuple([shape[axis] for axis in order]), dtype)
    return out.transpose(sorted(range(len(order)), key=order.__getitem__))


def is_aligned(*arrays: Array) -> bool:
    """Whether all arrays begin where accesses of 16 bytes may."""
    return not sum([address(array) % PACK_BYTES for array in arrays])


def blocks(count: int) -> int:
    """Give how many blocks of THREADS threads make `count` threads."""
    return -(-count // THREADS)


def _transpose(x: Array, out: Array, sizes: tuple[int, int, int, int]) -> None:
    """Transpose matrices: sizes are (images, rows, columns, columns of the result)."""
    images, _, columns, padded = sizes
    tiles = -(-padded // TILE_BLOCK[0]) * -(-columns // TILE_BLOCK[0])
    run = kernel("layout.cu", f"transpose_matrices<{c_name(x.dtype)}, {c_name(out.dtype)}>")
    run((tiles, min(images, 65535)), TILE_BLOCK, (x, out, *sizes))


def _element_strides(x: Array) -> np.ndarray:
    strides = tuple(stride // x.dtype.itemsize for stride in x.strides)
    return by_value(np.array(strides, _STRIDES))
