"""Special functions, element by element."""

from __future__ import annotations

from gradengine.kernels.cuda.elementwise import formula
from gradengine.kernels.layout import Array


def erf(x: Array) -> Array:
    return formula("erf", x)
