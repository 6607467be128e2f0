"""Functions that make tensors: from data, filled, in sequence, and random."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine import devices
from gradengine.dtypes import (
    as_dtype,
    bool_,
    get_default_dtype,
    int8,
    int16,
    int32,
    int64,
    is_floating_point,
    uint8,
)
from gradengine.ops import random
from gradengine.tape import Variable
from gradengine.tensor import Tensor

Shape = Any  # sizes spelled out, or one tuple of them, which may be named size


def _finish(array: Any, device: Any, requires_grad: bool) -> Tensor:
    result = Tensor(devices.to_device(array, device))
    if requires_grad:
        result.requires_grad = True
    return result


def _sizes(name: str, sizes: tuple[Any, ...], named: Shape = None) -> tuple[int, ...]:
    """Return the shape given as sizes or as one tuple. Raises ValueError for a negative size."""
    if named is not None:
        sizes = (named,)
    if len(sizes) == 1 and not hasattr(sizes[0], "__index__"):
        sizes = tuple(sizes[0])
    shape = tuple(size.__index__() for size in sizes)
    if any(size < 0 for size in shape):
        raise ValueError(f"{name}: sizes must not be negative (size >= 0); got shape={shape}")
    return shape


def _float_type(name: str, dtype: Any) -> np.dtype[Any]:
    found = get_default_dtype() if dtype is None else as_dtype(dtype)
    if not is_floating_point(found):
        raise TypeError(f"{name}: dtype must be floating point; got dtype={found}")
    return found


# ---- from data -----------------------------------------------------------------------------------


def tensor(
    data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return a new tensor that holds a copy of `data`.

    Numbers and nested lists take the default float, int64 or bool; arrays and tensors keep their dtype
    and, without `device`, tensors and CuPy arrays their device. The result is a leaf.
    """
    source = data.array if isinstance(data, Variable) else data
    if hasattr(source, "__cuda_array_interface__"):
        xp = devices.array_module(source)
        array = xp.array(source, dtype=dtype and as_dtype(dtype))
        return _finish(array, devices.device_of(array) if device is None else device, requires_grad)
    if isinstance(data, Variable) and device is None:
        device = "cpu"
    return _finish(_array_from(source, dtype, copy=True), device, requires_grad)


def _array_from(data: Any, dtype: Any, copy: bool | None) -> np.ndarray:
    """Return a NumPy array of nested numbers or of anything NumPy understands, with PyTorch's dtypes."""
    if isinstance(data, list | tuple):
        data = _without_tensors(data)
    array = np.array(data, dtype=None if dtype is None else as_dtype(dtype), copy=copy)
    if dtype is None and not hasattr(data, "dtype"):
        kinds = {"f": get_default_dtype(), "i": np.int64, "u": np.int64, "b": np.bool_}
        if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"tensor: integers must fit into int64; got {array.max()}")
        if array.dtype.kind in kinds:
            array = array.astype(kinds[array.dtype.kind], copy=False)
    try:
        as_dtype(array.dtype)
    except TypeError:
        raise TypeError(
            "tensor: data must be numbers in equally long rows, or an array of a supported dtype; "
            f"got dtype={array.dtype}"
        ) from None
    return array


def _without_tensors(data: Any) -> Any:
    """Return nested lists with each 0-d tensor as a Python number, so that default dtypes apply to it."""
    if isinstance(data, Variable):
        return data.array.tolist()
    return [_without_tensors(item) for item in data] if isinstance(data, list | tuple) else data


def asarray(
    data: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None
) -> Tensor:
    """Return `data` as a tensor, sharing its memory where that is possible.

    A tensor keeps its place on the tape. `copy=True` always copies; `copy=False` raises ValueError where
    a copy would be needed.
    """
    if isinstance(data, Variable):
        target = devices.device_of(data.array) if device is None else device
        result = data.to(target, dtype=dtype, copy=bool(copy))  # type: ignore[attr-defined]
    elif _is_array(data):
        as_dtype(data.dtype)
        result = Tensor(data)
        result = result.to(
            devices.device_of(data) if device is None else device, dtype=dtype, copy=bool(copy)
        )
    else:
        result = _finish(_array_from(data, dtype, copy=True if copy else None), device, False)
    if copy is False and getattr(result, "array", None) is not getattr(data, "array", data):
        raise ValueError("asarray: copy=False, but this data cannot be a tensor without a copy")
    return result


as_tensor = asarray


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__")


def from_numpy(array: np.ndarray) -> Tensor:
    """Return a CPU tensor that shares memory with a NumPy array. Raises TypeError for anything else."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy: array must be a numpy.ndarray; got {type(array).__name__}")
    as_dtype(array.dtype)
    return Tensor(array)


def from_dlpack(source: Any, /, *, device: Any = None, copy: bool | None = None) -> Tensor:
    """Return a leaf tensor that shares memory with any array that speaks DLPack."""
    kind, _ = source.__dlpack_device__()
    xp = np if kind == 1 else devices.import_cupy()
    return asarray(xp.from_dlpack(source), device=device, copy=copy)


# ---- filled --------------------------------------------------------------------------------------


def full(
    size: Shape,
    fill_value: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return a tensor of shape `size` with every element `fill_value`, of that number's dtype by default."""
    shape = _sizes("full", (size,))
    if dtype is None:
        dtype = _array_from(fill_value, None, copy=True).dtype
    return _finish(np.full(shape, fill_value, as_dtype(dtype)), device, requires_grad)


def zeros(
    *shape: Shape,
    size: Shape = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return a tensor of zeros, of the default float by default."""
    dtype = get_default_dtype() if dtype is None else as_dtype(dtype)
    return _finish(np.zeros(_sizes("zeros", shape, size), dtype), device, requires_grad)


def ones(
    *shape: Shape,
    size: Shape = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return a tensor of ones, of the default float by default."""
    dtype = get_default_dtype() if dtype is None else as_dtype(dtype)
    return _finish(np.ones(_sizes("ones", shape, size), dtype), device, requires_grad)


def empty(
    *shape: Shape,
    size: Shape = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return a tensor whose elements are whatever the memory held."""
    dtype = get_default_dtype() if dtype is None else as_dtype(dtype)
    return _finish(np.empty(_sizes("empty", shape, size), dtype), device, requires_grad)


def zeros_like(
    x: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return zeros with x's shape, and its dtype and device by default."""
    return full_like(x, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones_like(
    x: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return ones with x's shape, and its dtype and device by default."""
    return full_like(x, 1, dtype=dtype, device=device, requires_grad=requires_grad)


def empty_like(
    x: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return uninitialised memory with x's shape, and its dtype and device by default."""
    array = devices.array_module(x.array).empty_like(x.array, dtype=as_dtype(dtype or x.dtype))
    return _finish(array, x.device if device is None else device, requires_grad)


def full_like(
    x: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return a tensor filled with `fill_value`, with x's shape, and its dtype and device by default."""
    array = devices.array_module(x.array).full_like(
        x.array, fill_value, dtype=as_dtype(dtype or x.dtype)
    )
    return _finish(array, x.device if device is None else device, requires_grad)


# ---- in sequence ---------------------------------------------------------------------------------


def arange(
    start: Any = 0,
    end: Any = None,
    step: Any = 1,
    *,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return start, start + step, ... below `end`; `arange(end)` starts at 0. int64 if all are integers."""
    if end is None:
        start, end = 0, start
    if step == 0:
        raise ValueError("arange: step must be nonzero; got step=0")
    if (end - start) / step < 0:
        raise ValueError(
            "arange: upper bound and lower bound inconsistent with step sign; "
            f"got start={start}, end={end}, step={step}"
        )
    if dtype is None:
        integers = all(isinstance(value, int) for value in (start, end, step))
        dtype = np.int64 if integers else get_default_dtype()
    return _finish(np.arange(start, end, step).astype(as_dtype(dtype)), device, requires_grad)


def linspace(
    start: float,
    end: float,
    steps: int,
    *,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return `steps` numbers evenly spaced from `start` to `end`, both included."""
    if steps < 0:
        raise ValueError(f"linspace: number of steps must be non-negative; got steps={steps}")
    array = np.linspace(start, end, steps).astype(
        get_default_dtype() if dtype is None else as_dtype(dtype)
    )
    return _finish(array, device, requires_grad)


def eye(
    n: int,
    m: int | None = None,
    *,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return an (n, m) matrix, (n, n) by default, with ones on the diagonal and zeros elsewhere."""
    n, m = _sizes("eye", (n, n if m is None else m))
    dtype = get_default_dtype() if dtype is None else as_dtype(dtype)
    return _finish(np.eye(n, m, dtype=dtype), device, requires_grad)


# ---- random --------------------------------------------------------------------------------------
# `generator` is a gradengine.Generator; without one, numbers are drawn from the process's own.


def rand(
    *shape: Shape,
    size: Shape = None,
    generator: Any = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return numbers drawn evenly from [0, 1)."""
    drawn = random.uniform(
        _sizes("rand", shape, size),
        _float_type("rand", dtype),
        devices.resolve(device),
        generator,
    )
    return _finish(drawn, device, requires_grad)


def randn(
    *shape: Shape,
    size: Shape = None,
    generator: Any = None,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return numbers drawn from the normal distribution of mean 0 and variance 1."""
    drawn = random.normal(
        _sizes("randn", shape, size),
        _float_type("randn", dtype),
        devices.resolve(device),
        generator,
    )
    return _finish(drawn, device, requires_grad)


def randint(
    low: int = 0,
    high: Any = None,
    size: Any = None,
    *,
    generator: Any = None,
    dtype: Any = np.int64,
    device: Any = None,
) -> Tensor:
    """Return integers drawn evenly from low to high - 1, shape `size`; `randint(high, size)` starts at 0.

    Raises ValueError where there is none in the range, or dtype does not hold all of it.
    """
    if size is None:
        low, high, size = 0, low, high
    elif high is None:
        low, high = 0, low
    if low >= high:
        raise ValueError(
            f"randint: must draw from a non-empty range (low < high); got low={low}, high={high}"
        )
    dtype = as_dtype(dtype)
    lowest, highest = _INTEGERS_OF.get(dtype, _INTEGERS_OF[int64])
    if low < lowest or high - 1 > highest:
        raise ValueError(
            f"randint: dtype must hold all integers of the range ({lowest} <= low and "
            f"high - 1 <= {highest}); got low={low}, high={high}, dtype={dtype}"
        )
    shape = _sizes("randint", (size,))
    drawn = random.integers(low, high, shape, dtype, devices.resolve(device), generator)
    return _finish(drawn, device, False)


_INTEGERS_OF = {
    dtype: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for dtype in (uint8, int8, int16, int32, int64)
} | {bool_: (0, 1)}


def randperm(n: int, *, generator: Any = None, device: Any = None) -> Tensor:
    """Return the integers 0 to n - 1 in random order, int64."""
    (n,) = _sizes("randperm", (n,))
    return Tensor(random.permutation(n, devices.resolve(device), generator))


def rand_like(
    x: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return numbers drawn evenly from [0, 1), with x's shape, and its dtype and device by default."""
    return rand(
        x.shape, dtype=dtype or x.dtype, device=device or x.device, requires_grad=requires_grad
    )


def randn_like(
    x: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Return normally distributed numbers, with x's shape, and its dtype and device by default."""
    return randn(
        x.shape, dtype=dtype or x.dtype, device=device or x.device, requires_grad=requires_grad
    )
