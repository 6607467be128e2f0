"""Conversions: to another dtype, to another device, and overwriting."""

from __future__ import annotations

from functools import partial
from typing import Any

from gradengine import devices
from gradengine.dtypes import as_dtype, is_floating_point
from gradengine.grad_mode import grad_mode
from gradengine.operation import array_of, cast, operation, sum_to_shape
from gradengine.tape import Variable


@operation(label="ToCopyBackward0")
def _transfer(x, *, device, source):
    return devices.to_device(x, device)


_transfer.pullbacks(x=lambda grad, device, source: _transfer(grad, device=source, source=device))


def to_device(x: Any, device: Any) -> Any:
    """Return x on `device`: itself if it is there, else a differentiable copy."""
    source, target = devices.device_of(array_of(x)), devices.resolve(device)
    return x if source == target else _transfer(x, device=target, source=source)


def to_dtype(x: Any, dtype: Any) -> Any:
    """Return x with elements of `dtype`: itself if they are, else a copy, differentiable between floats."""
    dtype = as_dtype(dtype)
    if x.dtype == dtype:
        return x
    # An integer has no derivative: converting the detached tensor leaves nothing on the tape.
    differentiable = is_floating_point(dtype) or not hasattr(x, "detach")
    return cast(x if differentiable else x.detach(), dtype=dtype)


def kept_for_backward(value: Any, *inputs: Any) -> Any:
    """Return the array of an index or a mask, copied if an operation on `inputs` is recorded.

    Such an array is kept without a version record: a write to it before backward would go unnoticed.
    """
    array = array_of(value)
    recorded = grad_mode.enabled and any(
        isinstance(x, Variable) and x.requires_grad for x in inputs
    )
    return array.copy() if recorded else array


@operation(label="CopyBackwards")
def _overwrite(x, value):
    return devices.array_module(x).broadcast_to(value, x.shape)


_overwrite.pullbacks(
    x=lambda grad: grad * 0,
    value=lambda grad, value_shape: sum_to_shape(grad, shape=value_shape),
)


def overwrite(x: Any, value: Any) -> Any:
    """Return `value` broadcast and converted to x's shape and dtype: what x becomes when it is overwritten.

    Raises RuntimeError if value's shape cannot be broadcast to x's.
    """
    if not hasattr(value, "dtype"):
        xp = devices.array_module(array_of(x))
        # A number is not copied from the CPU, which would be refused while a step is captured
        make = partial(xp.full, ()) if isinstance(value, (bool, int, float)) else xp.asarray
        with devices.on_device_of(array_of(x)):
            value = make(value, dtype=x.dtype)
    value = to_device(to_dtype(value, x.dtype), devices.device_of(array_of(x)))
    try:
        return _overwrite(x, value)
    except ValueError:
        raise RuntimeError(
            "copy_: the source must broadcast to the tensor's shape; "
            f"got source.shape={value.shape}, tensor.shape={x.shape}"
        ) from None
