"""Special functions that NumPy lacks."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from gradengine.kernels.cpu.launch import parallel_kernel
from gradengine.kernels.layout import Array


def erf(x: Array) -> Array:
    x = np.asarray(x)
    elements = x.ravel("K")
    if not np.may_share_memory(elements, x):  # there are gaps between the elements
        x = np.ascontiguousarray(x)
        elements = x.ravel()
    out = np.empty_like(x)
    # To Numba a read-only array is another type: it would compile a second time.
    _erf(elements if elements.flags.writeable else elements.copy(), out.ravel("K"))
    return out


@parallel_kernel
def _erf(x, out):
    for i in prange(x.size):
        out[i] = math.erf(x[i])
