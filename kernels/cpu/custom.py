"""Kernels that a user writes in Python, compiled by Numba when they first run on a dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba

from gradengine.kernels.layout import Array


@cache
def elementwise(function: Callable[..., Any]) -> Callable[..., Array]:
    """Return a ufunc of a function of numbers; it broadcasts, and runs on one core."""
    return numba.vectorize(nopython=True)(_python(function))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., None]:
    """Return a function of (out, arrays...) compiled."""
    return numba.njit(nogil=True, error_model="numpy")(_python(function))


def _python(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "py_func", function)  # it may be compiled already
