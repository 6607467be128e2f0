"""Matrix products: by cuBLAS through CuPy, or by kernels that read any memory.

Of single products cuBLAS reads transposed matrices as they lie, and nothing is faster. Of a batch
CuPy copies transposed matrices, and has cuBLAS multiply float32 without tensor cores; it refuses
bfloat16. Batches of this, and all where tensor cores are allowed, are left to the kernels of matmul.cu.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels import settings
from gradengine.kernels.cuda import slices
from gradengine.kernels.cuda.capture import in_step
from gradengine.kernels.cuda.launch import address, by_value, c_name, device_limits, kernel
from gradengine.kernels.cuda.tiles import (
    CHUNK_BYTES,
    PLAIN_DEPTH,
    PLAIN_ELEMENTS,
    SLAB_BYTES,
    SMALL_TILE,
    SQUARE_TILE,
    TALL_TILE,
    PlainTile,
    TensorTile,
    choose_plain_tile,
    covering,
    sum_dtype,
)
from gradengine.kernels.layout import Array

SOURCE = "matmul.cu"

BATCH_AXES = 4  # of matmul.cu
_STRIDES = [("line", np.int64), ("depth", np.int64), ("batch", np.int64, BATCH_AXES)]
_PRODUCT = np.dtype(
    [
        *((name, np.int32) for name in ("rows", "columns", "depth", "slice_depth")),
        ("batch", np.int32, BATCH_AXES),
        *(("a", _STRIDES), ("b", _STRIDES)),
    ],
    align=True,
)

# Offsets within a tile are 32 bits wide.
LARGEST_STRIDE = 1 << 22

# The least depth worth a slice, in slabs.
LEAST_SLABS = 4

LARGE_TENSOR_TILES = (TensorTile(128, 128, 64, 32, 4), TensorTile(128, 128, 64, 32, 3))
SMALL_TENSOR_TILE = TensorTile(64, 64, 32, 32, 4)

_ELEMENTS = ("float16", "bfloat16", "float", "double")


def _instance(kind: str, element: str, layouts: Iterable[str], numbers: Iterable[int]) -> str:
    parts = (element, *(f"Layout::{layout}" for layout in layouts), *map(str, numbers))
    return f"{kind}_matmul<{', '.join(parts)}>"


def _instances() -> Iterator[str]:
    forms = tuple(product(("DEPTHWISE", "CROSSWISE"), repeat=2))
    for element, form in product(("float16", "bfloat16", "float"), forms):
        for tile in (*LARGE_TENSOR_TILES, SMALL_TENSOR_TILE):
            yield _instance("tensor", element, form, tile)
    for element, dtype in PLAIN_ELEMENTS.items():
        tiles = (SQUARE_TILE, TALL_TILE, SMALL_TILE) if element == "float" else (SMALL_TILE,)
        for tile, form in product(tiles, forms):
            for width in tile.widths(dtype) if element in ("float", "double") else (1,):
                yield _instance("plain", element, form, (width, *tile))


KERNELS = {SOURCE: tuple(_instances())}


def matmul(x: Array, y: Array) -> Array:
    """Multiply x (..., M, K) and y (..., K, N) of one dtype, as kernels.matmul does."""
    known = x.dtype == y.dtype and c_name(x.dtype) in _ELEMENTS and x.dtype.isnative
    if not known or min(x.ndim, y.ndim) < 2 or max(x.shape + y.shape) >= 1 << 31:
        return array_module(x).matmul(x, y)
    if y.ndim == 2 and x.flags.c_contiguous:  # one product of all rows
        out = _choose(x.reshape(prod(x.shape[:-1]), x.shape[-1]), y)
        return out.reshape(*x.shape[:-1], y.shape[1])
    return _choose(x, y)


def _choose(x: Array, y: Array) -> Array:
    """Multiply by whatever is fastest."""
    uses_tensor_cores = _may_use_tensor_cores(x.dtype)
    is_batch = max(x.ndim, y.ndim) > 2
    emulated = isinstance(x, np.ndarray)  # then there is no cuBLAS
    own = emulated or settings.cuda.own_matmul or settings.general.deterministic
    own = own or in_step()  # no graph can hold CuPy's cuBLAS
    unknown_to_cupy = is_batch and x.dtype.name == "bfloat16"
    if own or unknown_to_cupy or (is_batch and uses_tensor_cores):
        return multiply(x, y, uses_tensor_cores)
    if x.dtype != np.float32:
        return array_module(x).matmul(x, y)
    with _cublas_precision(uses_tensor_cores):
        return array_module(x).matmul(x, y)


def _may_use_tensor_cores(dtype: Any) -> bool:
    if dtype == np.float64 or device_limits().architecture < 80:
        return False
    return dtype != np.float32 or settings.cuda.float32_matmul_precision != "highest"


_cublas_lock = Lock()


@contextmanager
def _cublas_precision(reduced: bool) -> Iterator[None]:
    """Have CuPy multiply float32 by cuBLAS as tf32, or as it is.

    CuPy keeps one choice for the whole process: it is put back, and no other thread comes here
    meanwhile. Products that another thread asks CuPy for directly may still see it.
    """
    from cupy._core import _routines_linalg as cublas  # pyright: ignore[reportMissingImports]

    wanted = cublas.COMPUTE_TYPE_TF32 if reduced else cublas.COMPUTE_TYPE_DEFAULT
    with _cublas_lock:
        before = cublas.get_compute_type(np.float32)
        if before == wanted:
            yield
            return
        cublas.set_compute_type(np.float32, wanted)
        try:
            yield
        finally:
            cublas.set_compute_type(np.float32, before)


# ---- the kernels ---------------------------------------------------------------------------------


class Operand(NamedTuple):
    """A factor as its lines, rows of the left or columns of the right one; strides in elements."""

    array: Array
    lines: int
    depth: int
    line_stride: int
    depth_stride: int
    batch_strides: tuple[int, ...]

    @property
    def is_crosswise(self) -> bool:
        """Whether lines are adjacent, so that a warp should read across them."""
        along = self.depth_stride == 1 and self.depth > 1
        return self.line_stride == 1 and self.lines > 1 and not along

    @property
    def layout(self) -> str:
        """Return the layout's name in the kernels."""
        return "CROSSWISE" if self.is_crosswise else "DEPTHWISE"

    def fits(self, width: int) -> bool:
        """Return whether every access may be one of `width` adjacent elements."""
        sizes = (self.depth, self.depth_stride, self.line_stride)
        if self.is_crosswise:
            sizes = (self.lines, self.line_stride, self.depth_stride)
        length, stride, other = sizes
        offsets = (length, other, *self.batch_strides)
        is_aligned = address(self.array) % (width * self.array.dtype.itemsize) == 0
        return stride == 1 and is_aligned and not any(offset % width for offset in offsets)

    @property
    def fits_tensor_cores(self) -> bool:
        """Whether tile.cuh can load it."""
        is_near = max(abs(self.line_stride), abs(self.depth_stride)) < LARGEST_STRIDE
        return is_near and self.fits(CHUNK_BYTES // self.array.dtype.itemsize)


def multiply(x: Array, y: Array, uses_tensor_cores: bool) -> Array:
    """Multiply x (..., M, K) and y (..., K, N), float16, bfloat16, float32 or float64, by matmul.cu.

    On tensor cores float32 is rounded to tf32; what they cannot load is multiplied without them.
    """
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    out = array_module(x).empty((*batch, x.shape[-2], y.shape[-1]), x.dtype)
    if not x.shape[-1]:
        out.fill(0)
    if not out.size or not x.shape[-1]:
        return out
    sizes, a, b = _operands(x, y.swapaxes(-1, -2), batch)
    choice = _choose_kernel(a, b, prod(batch), uses_tensor_cores)
    tile = choice.tile
    blocks = covering(tile, a.lines, b.lines) * prod(batch)
    share = slices.plan(a.depth, choice.slab, LEAST_SLABS * choice.slab, blocks, 1, out.size)
    partials = None
    if share.slices > 1:
        shape = (share.slices, prod(out.shape[:-1]), 1, out.shape[-1])
        partials = array_module(x).empty(shape, sum_dtype(x.dtype))
    strides = (
        (operand.line_stride, operand.depth_stride, _filled(operand.batch_strides, 0))
        for operand in (a, b)
    )
    numbers = (a.lines, b.lines, a.depth, share.depth, _filled(sizes, 1), *strides)
    arguments = (a.array, b.array, out, partials, by_value(np.array(numbers, _PRODUCT)))
    run = kernel(SOURCE, choice.name)
    run((blocks * share.slices,), (tile.threads,), arguments, choice.shared_bytes)
    if partials is not None:
        slices.add_slices(partials, out.reshape(partials.shape[1:]))
    return out


class _Choice(NamedTuple):
    name: str  # of the kernel
    tile: PlainTile | TensorTile
    slab: int  # of its depth
    shared_bytes: int


def _choose_kernel(a: Operand, b: Operand, products: int, uses_tensor_cores: bool) -> _Choice:
    dtype = a.array.dtype
    form = (a.layout, b.layout)
    if uses_tensor_cores and a.fits_tensor_cores and b.fits_tensor_cores:
        tile = _choose_tensor_tile(a.lines, b.lines, products)
        name = _instance("tensor", c_name(dtype), form, tile)
        return _Choice(name, tile, SLAB_BYTES // dtype.itemsize, tile.shared_bytes)
    if dtype.itemsize == 2:  # what tensor cores cannot load, or on old devices
        tile, width = SMALL_TILE, 1
    else:
        tile = choose_plain_tile(dtype, a.lines, b.lines, products)
        width = next(w for w in reversed(tile.widths(dtype)) if w == 1 or (a.fits(w) and b.fits(w)))
    name = _instance("plain", c_name(dtype), form, (width, *tile))
    return _Choice(name, tile, PLAIN_DEPTH, tile.shared_bytes(dtype))


def _choose_tensor_tile(rows: int, columns: int, products: int) -> TensorTile:
    """Choose the largest tile of which there is one for each multiprocessor, if any."""
    limits = device_limits()
    tile = next(tile for tile in LARGE_TENSOR_TILES if tile.shared_bytes <= limits.shared_bytes)
    enough = covering(tile, rows, columns) * products >= limits.multiprocessors
    return tile if enough else SMALL_TENSOR_TILE


def _operands(
    x: Array, y: Array, batch: tuple[int, ...]
) -> tuple[tuple[int, ...], Operand, Operand]:
    """Return the sizes of what is left of the batch axes, and both factors, given by lines."""
    x, y = (_in_elements(array, batch) for array in (x, y))
    axes = _joined_axes(x, y)
    if len(axes) > BATCH_AXES:
        x, y = (array.copy() for array in (x, y))
        axes = _joined_axes(x, y)
    sizes, *strides = zip(*axes, strict=True) if axes else ((), (), ())
    a, b = (_operand(*pair) for pair in zip((x, y), strides, strict=True))
    return sizes, a, b


def _operand(array: Array, batch_strides: tuple[int, ...]) -> Operand:
    lines, depth = array.shape[-2:]
    line_stride, depth_stride = (stride // array.dtype.itemsize for stride in array.strides[-2:])
    return Operand(
        array, lines, depth, line_stride if lines > 1 else 0, depth_stride, batch_strides
    )


def _in_elements(array: Array, batch: tuple[int, ...]) -> Array:
    """Return a view with the batch's axes, or of a copy where strides are no whole elements."""
    if any(stride % array.dtype.itemsize for stride in array.strides):  # a field of packed records
        array = array.copy()
    return array_module(array).broadcast_to(array, (*batch, *array.shape[-2:]))


def _joined_axes(x: Array, y: Array) -> list[tuple[int, int, int]]:
    """Return (size, stride of x, stride of y) of the batch axes, in elements, as few as can be."""
    joined: list[tuple[int, int, int]] = []
    steps = [(stride // array.dtype.itemsize for stride in array.strides[:-2]) for array in (x, y)]
    for size, x_stride, y_stride in zip(x.shape[:-2], *steps, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1:] == (size * x_stride, size * y_stride):
            size *= joined.pop()[0]
        joined.append((size, x_stride, y_stride))
    return joined


def _filled(numbers: tuple[int, ...], rest: int) -> tuple[int, ...]:
    return numbers + (rest,) * (BATCH_AXES - len(numbers))
