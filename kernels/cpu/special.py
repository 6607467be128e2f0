"""Special functions that NumPy lacks."""

from __future__ import annotations

import math

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array


def erf(x: Array) -> Array:
    x = np.asarray(x)
    elements = x.ravel("K")
    if not np.may_share_memory(elements, x):  # there are gaps between the elements
        x = np.ascontiguousarray(x)
        elements = x.ravel()
    out = np.empty_like(x)
    # To Numba a read-only array is another type: it would compile a second time.
    _erf(
        get_num_threads(), elements if elements.flags.writeable else elements.copy(), out.ravel("K")
    )
    return out


@parallel_kernel
def _erf(worker, workers, x, out):
    for i in own_range(worker, workers, x.size):
        out[i] = math.erf(x[i])
