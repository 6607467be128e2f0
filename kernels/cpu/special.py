"""The error function, which NumPy lacks."""

from __future__ import annotations

import math

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import NEAR, erf_far, erf_near
from gradengine.kernels.layout import Array

PIECE = 1 << 10  # elements of one piece of work


def erf(x: Array) -> Array:
    x = np.asarray(x)
    elements = x.ravel("K")
    if not np.may_share_memory(elements, x):  # there are gaps between the elements
        x = np.ascontiguousarray(x)
        elements = x.ravel()
    out = np.empty_like(x)
    # To Numba a read-only array is another type: it would compile a second time.
    given = elements if elements.flags.writeable else elements.copy()
    kernel = _erf32 if x.dtype == np.float32 else _erf
    kernel(get_num_threads(), given, out.ravel("K"))
    return out


@parallel_kernel
def _erf(worker, workers, x, out):
    for i in own_range(worker, workers, x.size):
        out[i] = math.erf(x[i])


@parallel_kernel
def _erf32(worker, workers, x, out):
    """Fill out with erf of float32, which `math.erf` computes in float64 and not in vectors."""
    far = np.empty(PIECE, x.dtype)
    for piece in own_range(worker, workers, (len(x) + PIECE - 1) // PIECE):
        start, stop = piece * PIECE, (piece + 1) * PIECE
        values, made = x[start:stop], out[start:stop]
        for i in range(len(values)):
            far[i] = erf_far(abs(values[i]))
        for i in range(len(values)):
            value = values[i]
            signed = far[i] if value > NEAR else -far[i]
            made[i] = erf_near(value) if abs(value) <= NEAR else signed
