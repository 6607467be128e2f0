"""The precision that autocast has operations compute in.

An operation that autocast has a say in asks `if autocast_mode.dtype is not None` and then one of
these. They convert floating point arrays on CUDA, but leave float64 as it is.
"""

from __future__ import annotations

from typing import Any

from gradengine import devices, kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.dtypes import float32, is_floating_point, result_type
from gradengine.grad_mode import grad_mode
from gradengine.kernels.cuda import capture
from gradengine.operation import array_of, cast, node_of
from gradengine.tape import Variable


def raised(x: Any) -> Any:
    """Return 16-bit floats as float32: for an operation that needs its range or precision."""
    if not _is_eligible(x) or x.dtype.itemsize != 2:
        return x
    return cast(x, dtype=float32)


def lowered(x: Any) -> Any:
    """Return floats in the 16 bits that products compute in, a leaf that requires grad once a region."""
    dtype = autocast_mode.dtype
    if getattr(x, "dtype", dtype) == dtype or not _is_eligible(x):
        return x
    if not (autocast_mode.caching and isinstance(x, Variable) and x.requires_grad and x.is_leaf):
        return cast(x, dtype=dtype)
    # The leaf is kept, so that no other object can have its id before the region ends. What a
    # captured step converts has values only while the step is replayed.
    region = (dtype, grad_mode.enabled, capture.current())
    leaf, array, stamp, converted = autocast_mode.leaves.get((id(x), region), _NOTHING)
    if leaf is x and array is x.array and stamp == x.version().stamp:
        return converted
    leaves = [x]
    if not autocast_mode.leaves:  # the first of a region
        place = devices.device_of(x.array)
        leaves = [
            one for one in autocast_mode.converted_with(x) if _is_leaf_on(place, x.array.dtype, one)
        ]
    _lower_leaves(leaves, region)
    return autocast_mode.leaves[id(x), region][3]


_NOTHING = (None, None, 0, None)


def _is_leaf_on(place: devices.Device, dtype: Any, x: Variable) -> bool:
    """Whether x is still a leaf that requires grad, of this dtype and on this device."""
    if x._node is None or not x.is_leaf:
        return False
    return x.array.dtype == dtype and devices.device_of(x.array) is place


def _lower_leaves(leaves: list[Any], region: tuple[Any, ...]) -> None:
    """Convert leaves of one dtype, on one device, and keep them until the region ends."""
    dtype, records, _ = region
    stamps = [leaf.version().stamp for leaf in leaves]
    with devices.on_device_of(leaves[0].array):
        arrays = kernels.cast_all([leaf.array for leaf in leaves], dtype)
    for leaf, stamp, array in zip(leaves, stamps, arrays, strict=True):
        if records:
            converted = Variable.Result(array, node_of(cast, (leaf,), array, dtype=dtype))
        else:
            converted = Variable.Result(array)
        autocast_mode.leaves[id(leaf), region] = (leaf, leaf.array, stamp, converted)


def widest(x: Any, y: Any) -> tuple[Any, Any]:
    """Return two inputs of unequal dtypes in the wider one: for an operation that asks for one dtype."""
    if not _is_eligible(x) or not _is_eligible(y) or x.dtype == y.dtype:
        return x, y
    dtype = result_type(x, y)
    x, y = (value if value.dtype == dtype else cast(value, dtype=dtype) for value in (x, y))
    return x, y


def _is_eligible(x: Any) -> bool:
    array = array_of(x)
    return (
        hasattr(array, "dtype")
        and is_floating_point(array.dtype)
        and array.dtype.itemsize < 8
        and kernels.place(array) == "cuda"
    )
