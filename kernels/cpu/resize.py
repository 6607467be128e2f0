"""Weighted sums along one axis: what images are resized by, rows first and columns then."""

from __future__ import annotations

import math

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array


def weigh(x: Array, positions: Array, weights: Array, axis: int) -> Array:
    if x.dtype == np.float16 or x.dtype.kind == "V":  # bfloat16
        return weigh(x.astype(np.float32), positions, weights, axis).astype(x.dtype)
    if x.dtype.kind != "f":  # one whole pixel each
        return np.take(x, positions[:, 0], axis=axis)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    rows = np.ascontiguousarray(x).reshape(math.prod(before), x.shape[axis], math.prod(after))
    rows = rows if rows.flags.writeable else rows.copy()  # to Numba another type
    out = np.empty((len(rows), len(positions), rows.shape[2]), x.dtype)
    _weigh(get_num_threads(), rows, positions.astype(np.int64), weights.astype(x.dtype), out)
    return out.reshape(*before, len(positions), *after)


@parallel_kernel
def _weigh(worker, workers, x, positions, weights, out):
    """x (M, L, I), positions and weights (P, taps), out (M, P, I)."""
    count = len(positions)
    for line in own_range(worker, workers, len(x) * count):
        image = line // count
        place = line % count
        target = out[image, place]
        first = True
        for tap in range(positions.shape[1]):
            position = positions[place, tap]
            if position < 0:
                continue
            weight = weights[place, tap]
            source = x[image, position]
            if first:
                for i in range(len(target)):
                    target[i] = weight * source[i]
            else:
                for i in range(len(target)):
                    target[i] += weight * source[i]
            first = False
        if first:
            for i in range(len(target)):
                target[i] = 0
