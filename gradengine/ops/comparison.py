"""Comparisons and logic, elementwise, and whether arrays are equal as a whole."""

from __future__ import annotations

import math
from typing import Any

from gradengine.devices import array_module
from gradengine.elementwise import elementwise
from gradengine.operation import array_of, operation


@elementwise
def eq(x, y):
    """Return whether x == y, elementwise."""
    return x == y


@elementwise
def ne(x, y):
    """Return whether x != y, elementwise."""
    return x != y


@elementwise
def lt(x, y):
    """Return whether x < y, elementwise."""
    return x < y


@elementwise
def le(x, y):
    """Return whether x <= y, elementwise."""
    return x <= y


@elementwise
def gt(x, y):
    """Return whether x > y, elementwise."""
    return x > y


@elementwise
def ge(x, y):
    """Return whether x >= y, elementwise."""
    return x >= y


@elementwise
def bitwise_and(x, y):
    """Return x & y for integers and bools."""
    return x & y


@elementwise
def bitwise_or(x, y):
    """Return x | y for integers and bools."""
    return x | y


@elementwise
def bitwise_xor(x, y):
    """Return x ^ y for integers and bools."""
    return x ^ y


@elementwise
def bitwise_not(x):
    """Return ~x for integers and bools."""
    return ~x


@elementwise
def logical_and(x, y):
    """Return whether x and y are both nonzero, elementwise."""
    return (x != 0) & (y != 0)


@elementwise
def logical_or(x, y):
    """Return whether x or y is nonzero, elementwise."""
    return (x != 0) | (y != 0)


@elementwise
def logical_xor(x, y):
    """Return whether exactly one of x and y is nonzero, elementwise."""
    return (x != 0) ^ (y != 0)


@operation
def logical_not(x):
    """Return whether x is zero, elementwise."""
    return x == 0


@operation
def isnan(x):
    """Return whether x is nan, elementwise."""
    return x != x


@operation
def isinf(x):
    """Return whether x is positive or negative infinity, elementwise."""
    return abs(x) == math.inf


@operation
def isfinite(x):
    """Return whether x is neither infinite nor nan, elementwise."""
    return abs(x) < math.inf


@operation
def _isclose(x, y, *, rtol, atol, equal_nan):
    return array_module(x).isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)


def isclose(x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
    """Return whether |x - y| <= atol + rtol * |y|, elementwise.

    Raises TypeError unless dtypes agree, ValueError for a negative tolerance.
    """
    if x.dtype != y.dtype:
        raise TypeError(
            f"isclose: x and y must have one dtype; got x.dtype={x.dtype}, y.dtype={y.dtype}"
        )
    if not (rtol >= 0 and atol >= 0):
        raise ValueError(
            "isclose: tolerances must not be negative (rtol >= 0 and atol >= 0); "
            f"got rtol={rtol}, atol={atol}"
        )
    try:
        return _isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)
    except ValueError:
        raise ValueError(
            "isclose: shapes must broadcast together; "
            f"got x.shape={tuple(x.shape)}, y.shape={tuple(y.shape)}"
        ) from None


def allclose(
    x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    """Return whether `isclose` holds everywhere. Waits for the GPU."""
    return bool(array_of(isclose(x, y, rtol, atol, equal_nan)).all())


def equal(x: Any, y: Any) -> bool:
    """Return whether x and y have one shape and equal elements. Waits for the GPU."""
    return x.shape == y.shape and bool(array_of(eq(x, y)).all())
