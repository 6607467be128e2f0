"""Sums over axes, on all cores: shared out in pieces by size alone, which are added up in order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.reductions import sum_of
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

PIECE = 1 << 14  # elements of a row that are one piece of work
BLOCK_ROWS = 32  # that are added up in the array's dtype before float64 takes them up
PIECE_ROWS, PIECE_COLUMNS = 128, 1 << 10
SHORTEST = 16  # elements of rows that are added up: NumPy is as good for shorter ones
# And for rows this long, of arrays below this size, which stay in the cache of one core.
LONG, LARGE = 1 << 8, 1 << 20


def sum_over(x: Array, axes: Sequence[int]) -> Array | None:
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    lies = x.transpose(order)
    # To Numba a read-only array is another type: it would compile a second time.
    if not axes or not lies.flags.c_contiguous or not x.flags.writeable:
        return None
    goes = [axis in axes for axis in order]
    if goes[-1]:
        total = _over_last_axes(lies, goes)
    elif goes[0]:
        total = _over_first_axes(lies, goes)
    else:
        return None
    left = [axis for axis in order if axis not in axes]
    inverse = sorted(range(len(left)), key=left.__getitem__)
    return None if total is None else total.astype(x.dtype).transpose(inverse)


def _over_last_axes(x: Array, goes: list[bool]) -> Array:
    """Sum along rows of memory, then what is left of the axes that go, in float64."""
    first = x.ndim - goes[::-1].index(False) if not all(goes) else 0
    rows = x.reshape(prod(x.shape[:first]), -1)
    pieces = np.empty((len(rows), -(-rows.shape[1] // PIECE)))
    _row_pieces(get_num_threads(), rows, pieces)
    total = pieces[:, 0] if pieces.shape[1] == 1 else pieces.sum(axis=1)
    rest = tuple([axis for axis in range(first) if goes[axis]])
    return total.reshape(x.shape[:first]).sum(axis=rest) if rest else total.reshape(x.shape[:first])


def _over_first_axes(x: Array, goes: list[bool]) -> Array | None:
    """Sum rows of memory, in float64, or give None if the axes that go are not all before the others."""
    first = goes.index(False)
    rows = x.reshape(prod(x.shape[:first]), -1)
    length = rows.shape[1]
    if any(goes[first:]) or length < SHORTEST or (length >= LONG and x.size < LARGE):
        return None
    pieces = np.zeros((-(-len(rows) // PIECE_ROWS), length))
    _column_pieces(get_num_threads(), rows, pieces)
    return pieces.sum(axis=0).reshape(x.shape[first:])


@parallel_kernel
def _row_pieces(worker, workers, x, out):
    rows, pieces = out.shape
    for task in own_range(worker, workers, rows * pieces):
        row, start = task // pieces, task % pieces * PIECE
        out[row, task % pieces] = sum_of(x[row, start : start + PIECE])


@parallel_kernel
def _column_pieces(worker, workers, x, out):
    rows, length = x.shape
    blocks = (length + PIECE_COLUMNS - 1) // PIECE_COLUMNS
    room = np.empty(min(length, PIECE_COLUMNS), x.dtype)
    for task in own_range(worker, workers, len(out) * blocks):
        piece, start = task // blocks, task % blocks * PIECE_COLUMNS
        total = out[piece, start : start + PIECE_COLUMNS]
        sums, stop = room[: len(total)], min((piece + 1) * PIECE_ROWS, rows)
        for block in range(piece * PIECE_ROWS, stop, BLOCK_ROWS):
            sums[:] = 0
            for row in range(block, min(block + BLOCK_ROWS, stop)):
                values = x[row, start : start + PIECE_COLUMNS]
                for i in range(len(sums)):
                    sums[i] += values[i]
            for i in range(len(sums)):
                total[i] += sums[i]
