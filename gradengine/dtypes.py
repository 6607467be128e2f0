"""Element types: their names, the default float, and PyTorch's promotion rules."""

from __future__ import annotations

from typing import Any

import numpy as np

float16 = np.dtype(np.float16)
float32 = np.dtype(np.float32)
float64 = np.dtype(np.float64)
uint8 = np.dtype(np.uint8)
int8 = np.dtype(np.int8)
int16 = np.dtype(np.int16)
int32 = np.dtype(np.int32)
int64 = np.dtype(np.int64)
bool_ = np.dtype(np.bool_)

_SUPPORTED = {float16, float32, float64, uint8, int8, int16, int32, int64, bool_}
_CATEGORY = {"b": 0, "i": 1, "u": 1, "f": 2}
_default_float = float32


def get_default_dtype() -> np.dtype[Any]:
    """Return the dtype of new floating point tensors: float32 unless it was set."""
    return _default_float


def set_default_dtype(dtype: Any) -> None:
    """Set the dtype of new floating point tensors. Raises TypeError unless it is floating point."""
    global _default_float
    found = as_dtype(dtype)
    if found.kind != "f":
        raise TypeError(f"set_default_dtype: dtype must be floating point; got dtype={found}")
    _default_float = found


def as_dtype(spec: Any) -> np.dtype[Any]:
    """Return the NumPy dtype that `spec` names. Raises TypeError for one that tensors cannot hold.

    Python's `float`, `int` and `bool` are float64, int64 and bool, as in PyTorch.
    """
    found = np.dtype(spec)
    if found not in _SUPPORTED:
        raise TypeError(f"dtype: tensors hold float, integer and bool types; got dtype={found}")
    return found


def result_type(*values: Any) -> np.dtype[Any]:
    """Return the common dtype of tensors, arrays and Python numbers, as PyTorch promotes them.

    The category (bool < integer < float) is the highest of any value. Within it, tensors with
    dimensions decide before 0-d tensors, and these before Python numbers.
    """
    ranked: list[Any] = [None, None, None]
    for value in values:
        dtype, rank = _dtype_and_rank(value)
        ranked[rank] = dtype if ranked[rank] is None else _promote(ranked[rank], dtype)
    found = [dtype for dtype in ranked if dtype is not None]
    result = found[0]
    for dtype in found[1:]:
        if not can_hold(result, dtype):
            result = dtype
    return result


def can_hold(target: np.dtype[Any], source: np.dtype[Any]) -> bool:
    """Return whether values of `source` may be written into `target`: its category is not a higher one."""
    return _CATEGORY[source.kind] <= _CATEGORY[target.kind]


def _promote(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    if _CATEGORY[first.kind] == _CATEGORY[second.kind]:
        return np.promote_types(first, second)
    return first if can_hold(first, second) else second


def _dtype_and_rank(value: Any) -> tuple[np.dtype[Any], int]:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return bool_, 2
    if isinstance(value, int):
        return int64, 2
    if isinstance(value, float):
        return _default_float, 2
    return value.dtype, 0 if value.ndim else 1
