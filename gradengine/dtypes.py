"""Element types: their names, the default float, and PyTorch's promotion rules.

bfloat16 is a dtype of the package ml_dtypes, of NumPy's kind "V", and imported when somebody asks
for it. Whether a dtype is floating point is therefore `is_floating_point`'s to say, not its kind's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    bfloat16: np.dtype[Any]

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
_CATEGORY = {"b": 0, "i": 1, "u": 1, "f": 2, "V": 2}
_default_float = float32


def __getattr__(name: str) -> Any:
    if name != "bfloat16":
        raise AttributeError(f"module 'gradengine.dtypes' has no attribute {name!r}")
    import ml_dtypes

    found = globals()["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
    return found


def is_floating_point(dtype: np.dtype[Any]) -> bool:
    """Return whether the elements are floating point numbers, also bfloat16's."""
    return dtype.kind == "f" or is_bfloat16(dtype)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether the dtype is bfloat16, without importing it."""
    return dtype.kind == "V" and dtype.type.__name__ == "bfloat16"


def widened(array: Any) -> Any:
    """Return an array of bfloat16 as float32, to compute with, and any other as it is."""
    return array.astype(float32) if is_bfloat16(array.dtype) else array


def narrowed(array: Any, dtype: np.dtype[Any]) -> Any:
    """Return float32 that was computed from 16-bit floats as these, and any other array as it is."""
    return array.astype(dtype) if dtype.itemsize == 2 and array.dtype == float32 else array


def sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype to sum in: float32 for 16-bit floats, int64 for integers and bools."""
    if dtype.kind == "f":
        return float32 if dtype.itemsize == 2 else dtype
    return float32 if is_bfloat16(dtype) else int64


def get_default_dtype() -> np.dtype[Any]:
    """Return the dtype of new floating point tensors: float32 unless it was set."""
    return _default_float


def set_default_dtype(dtype: Any) -> None:
    """Set the dtype of new floating point tensors. Raises TypeError unless it is floating point."""
    global _default_float
    found = as_dtype(dtype)
    if not is_floating_point(found):
        raise TypeError(f"set_default_dtype: dtype must be floating point; got dtype={found}")
    _default_float = found


def as_dtype(spec: Any) -> np.dtype[Any]:
    """Return the NumPy dtype that `spec` names. Raises TypeError for one that tensors cannot hold.

    Python's `float`, `int` and `bool` are float64, int64 and bool, as in PyTorch.
    """
    if isinstance(spec, str) and spec == "bfloat16":
        return __getattr__("bfloat16")  # a name that NumPy knows once it is imported
    found = np.dtype(spec)
    if found not in _SUPPORTED and not is_bfloat16(found):
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
    if _CATEGORY[first.kind] != _CATEGORY[second.kind]:
        return first if can_hold(first, second) else second
    if is_bfloat16(first) != is_bfloat16(second) and first.itemsize == second.itemsize:
        return float32  # neither 16-bit float holds the other
    return np.promote_types(first, second)


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
