"""Special functions that NumPy lacks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import vectorize

from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from gradengine.kernels.layout import Array


def erf(x: Array) -> Array:
    out = np.empty_like(x)
    with LAUNCH_LOCK:
        _parallel_erf(x, out)
    return out


def _erf(x):
    return math.erf(x)


# A NumPy ufunc: it takes any shape and strides as they are.
_parallel_erf: Any = vectorize(
    ["float32(float32)", "float64(float64)"], target="parallel", cache=True
)(_erf)
