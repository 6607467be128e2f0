"""Tiles of matrix products: what one block computes, by plain_tile.cuh or by tile.cuh."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gradengine.kernels.cuda.launch import address, device_limits
from gradengine.kernels.layout import Array

PLAIN_DEPTH = 8  # of a slab
SLAB_BYTES = 128  # of a slab of tile.cuh, along the depth
CHUNK_BYTES = 16

# The compute capability whose warpgroups multiply together (sm_90a): only this one has them.
WARPGROUP_ARCHITECTURE = 90


# The elements of plain tiles by their names in the kernels, with a dtype that is summed as they are.
PLAIN_ELEMENTS = {
    "float16": np.float16,
    "bfloat16": np.float16,
    "float": np.float32,
    "double": np.float64,
}


class PlainTile(NamedTuple):
    """Sizes of a tile by ordinary multiply-adds, and of the part of it that one thread computes."""

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> int:
        return self.rows * self.columns // (self.thread_rows * self.thread_columns)

    def widths(self, dtype: Any) -> tuple[int, ...]:
        """Return how many elements an access to global memory takes: one, or the most it can."""
        shares = (length * PLAIN_DEPTH // self.threads for length in (self.rows, self.columns))
        return 1, min(CHUNK_BYTES // sum_dtype(dtype).itemsize, *shares)

    def shared_bytes(self, dtype: Any) -> int:
        """Return the size of PlainTile::Shared for elements of dtype: two slabs of both operands."""
        itemsize = sum_dtype(dtype).itemsize
        return 2 * PLAIN_DEPTH * ((self.rows + self.columns) * itemsize + 2 * CHUNK_BYTES)


SQUARE_TILE = PlainTile(128, 128, 8, 8)
TALL_TILE = PlainTile(128, 64, 8, 8)
WIDE_TILE = PlainTile(64, 128, 8, 8)
SMALL_TILE = PlainTile(64, 64, 4, 4)


class TensorTile(NamedTuple):
    """Sizes of a tile on tensor cores, of the part of one warp, and how many slabs are in flight."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * SLAB_BYTES


def covering(tile: PlainTile | TensorTile, rows: int, columns: int) -> int:
    """Return how many tiles cover a matrix."""
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def choose_plain_tile(dtype: Any, rows: int, columns: int, products: int | None) -> PlainTile:
    """Choose the tile for products of this shape: small where large leave multiprocessors idle.

    Of a product in slices there are as many as it takes: products is None.
    """
    if dtype == np.float64:  # larger ones would not fit registers
        return SMALL_TILE
    tile = SQUARE_TILE if columns > TALL_TILE.columns else TALL_TILE
    if products is None:
        return WIDE_TILE if rows <= WIDE_TILE.rows else tile
    enough = covering(tile, rows, columns) * products >= device_limits().multiprocessors
    return tile if enough and rows > SMALL_TILE.rows else SMALL_TILE


def access_width(tile: PlainTile, arrays: tuple[Array, ...], lengths: tuple[int, ...]) -> int:
    """Return how many elements one access of a plain tile may take.

    `lengths` are what all offsets of accesses, in elements, are sums of.
    """
    _, width = tile.widths(arrays[0].dtype)
    fits = all(length % width == 0 for length in lengths) and all(
        address(array) % (width * array.dtype.itemsize) == 0 for array in arrays
    )
    return width if fits else 1


def sum_dtype(dtype: Any) -> np.dtype:
    """Return the dtype in which elements are added up."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
