"""Sums along rows, on all cores: rows are shared out in pieces, which are added up in order."""

from __future__ import annotations

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_rows
from gradengine.kernels.cpu.reductions import sum_of
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

PIECE = 1 << 14  # elements of one piece of work


def row_sums(x: Array) -> Array:
    rows = kernel_rows(x)
    pieces = np.empty((len(rows), -(-rows.shape[1] // PIECE)))
    _piece_sums(get_num_threads(), rows, pieces)
    total = pieces[:, 0] if pieces.shape[1] == 1 else pieces.sum(axis=1)
    return total.astype(x.dtype).reshape(x.shape[:-1])


@parallel_kernel
def _piece_sums(worker, workers, x, out):
    rows, pieces = out.shape
    for task in own_range(worker, workers, rows * pieces):
        row, start = task // pieces, task % pieces * PIECE
        out[row, task % pieces] = sum_of(x[row, start : start + PIECE])
