"""Functions of single elements that NumPy lacks, or needs several passes for."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.kernels.cpu.launch import own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import error_function, exponential
from gradengine.kernels.layout import Array


def erf(x: Array) -> Array:
    return _of_elements(_erf, x)


def sigmoid(x: Array) -> Array:
    return _of_elements(_sigmoid, x)


def _of_elements(kernel: Any, x: Array) -> Array:
    """Give what a kernel makes of the elements, in memory as they lie."""
    x = np.asarray(x)
    elements = x.ravel("K")
    if not np.may_share_memory(elements, x):  # there are gaps between the elements
        x = np.ascontiguousarray(x)
        elements = x.ravel()
    out = np.empty_like(x)
    # To Numba a read-only array is another type: it would compile a second time.
    given = elements if elements.flags.writeable else elements.copy()
    kernel(get_num_threads(), given, out.ravel("K"))
    return out


@parallel_kernel
def _erf(worker, workers, x, out):
    own = own_range(worker, workers, x.size)
    values, made = x[own.start : own.stop], out[own.start : own.stop]
    for i in range(len(values)):
        made[i] = error_function(values[i])


@parallel_kernel
def _sigmoid(worker, workers, x, out):
    """Write 1 / (1 + exp(-x)), in terms of exp(-|x|), which does not overflow."""
    own = own_range(worker, workers, x.size)
    values, made, one = x[own.start : own.stop], out[own.start : own.stop], x.dtype.type(1)
    for i in range(len(values)):
        decay = exponential(-abs(values[i]))
        made[i] = np.divide(one if values[i] >= 0 else decay, one + decay)
