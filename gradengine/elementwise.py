"""What an elementwise operation is: one of arrays that are brought to one dtype and shape before.

    @elementwise
    def add(x, y):
        return x + y

    add.pullbacks(x=lambda grad: grad, y=lambda grad: grad)

A forward may be written as for NumPy's arrays of one dtype: promotion, bfloat16, several devices,
memory's order, large arrays and what broadcasting means for gradients are seen to here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradengine import devices, kernels
from gradengine import operation as operations
from gradengine.autocast_mode import autocast_mode
from gradengine.dtypes import (
    float32,
    get_default_dtype,
    is_bfloat16,
    is_floating_point,
    result_type,
    widened,
)
from gradengine.grad_mode import grad_mode
from gradengine.operation import (
    Operation,
    array_of,
    call_on_device,
    cast,
    publish,
    sum_to_shape,
)
from gradengine.precision import raised
from gradengine.tape import SavedOutput, Variable

_ndarray = np.ndarray


def elementwise(
    forward: Callable[..., Any] | None = None,
    *,
    label: str | None = None,
    floating: bool = False,
    needs_range: bool = False,
    kernel: bool = False,
) -> Any:
    """Make an operation of an elementwise forward on one or two arrays.

    Inputs are converted to their common dtype by PyTorch's rules (`floating`: integers become the default
    float; `needs_range`, for one input: 16-bit floats become float32 under autocast), and pullbacks need
    not undo broadcasting: that is done here, once. With `kernel`, large arrays are computed as the formula
    of the operation's name in `kernels.elementwise`, where a device has it.
    """
    if forward is None:
        return functools.partial(
            elementwise, label=label, floating=floating, needs_range=needs_range, kernel=kernel
        )
    record = Operation(forward, label)
    record.has_kernel = kernel
    if len(record.inputs) == 1:
        return publish(record, _unary(record, floating, needs_range))
    return publish(record, _binary(record, floating))


def _unary(op: Operation, floating: bool, needs_range: bool) -> Callable[..., Any]:
    """Spell out the general case for one input: with `_binary`, the path of every small operation."""
    forward, has_kernel = op.forward, op.has_kernel

    def apply(x: Any, **attributes: Any) -> Any:
        if needs_range and autocast_mode.dtype is not None:
            x = raised(x)
        a = x.array if isinstance(x, Variable) else x
        try:
            if type(a) is _ndarray and (not floating or a.dtype.kind == "f"):
                large = has_kernel and a.size >= kernels.PARALLEL_SIZE
                out = (op.compute if large else forward)(a, **attributes)
            else:
                x = _conform_one(op.name, x, floating)
                out = _call_elementwise(op, floating, (array_of(x),), attributes)
        except TypeError as error:
            raise _refusal(error, op.name, x=x) from None
        if not isinstance(x, Variable):
            return out
        if x._node is None or not op.rules or not grad_mode.enabled:
            return Variable.Result(out)
        if x._view is not None and x.node is None:  # a view that follows its base off the tape
            return Variable.Result(out)
        node = operations.new_node(op.label, out.shape, out.dtype)
        result = Variable.Result(out, node)
        if op.saves_output:
            out = result._counter = SavedOutput(result.array)
        node.edges = (_elementwise_edge(op, 0, (x,), node.shape, out, attributes),)
        return result

    return apply


def _binary(op: Operation, floating: bool) -> Callable[..., Any]:
    """Spell out the general case for two inputs: this is the path of every small operation."""
    forward, has_kernel = op.forward, op.has_kernel

    def apply(x: Any, y: Any) -> Any:
        a = x.array if isinstance(x, Variable) else x
        b = y.array if isinstance(y, Variable) else y
        plain = type(a) is _ndarray and (
            (type(b) is _ndarray and a.dtype is b.dtype and (not floating or a.dtype.kind == "f"))
            or ((type(b) is float or type(b) is int) and a.dtype.kind == "f")
        )
        try:
            if plain:
                large = has_kernel and a.size + getattr(b, "size", 0) >= kernels.PARALLEL_SIZE
                out = (op.compute if large else forward)(a, b)
            else:
                x, y = conform(op.name, x, y, floating)
                out = _call_elementwise(op, floating, (array_of(x), array_of(y)), {})
        except (ValueError, TypeError, OverflowError) as error:
            raise _refusal(error, op.name, x=x, y=y) from None
        node_x = x._node if isinstance(x, Variable) else None
        node_y = y._node if isinstance(y, Variable) else None
        if (node_x is None and node_y is None) or not op.rules or not grad_mode.enabled:
            return (
                Variable.Result(out) if isinstance(x, Variable) or isinstance(y, Variable) else out
            )
        # Views that are out of date take their nodes before this one, in the order in which backward walks.
        if node_x is not None and x._view is not None:
            node_x = x.node
        if node_y is not None and y._view is not None:
            node_y = y.node
        shape = out.shape
        node = operations.new_node(op.label, shape, out.dtype)
        result = Variable.Result(out, node)
        if op.saves_output:
            out = result._counter = SavedOutput(result.array)
        node.edges = (
            node_x and _elementwise_edge(op, 0, (x, y), shape, out, None),
            node_y and _elementwise_edge(op, 1, (x, y), shape, out, None),
        )
        return result

    return apply


def _refusal(error: Exception, name: str, **inputs: Any) -> Exception:
    """Return what to raise for NumPy's or CuPy's error in an elementwise operation: in our words."""
    if str(error).startswith(f"{name}: "):
        return error
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in inputs.items()}
    try:
        np.broadcast_shapes(*shapes.values())
    except ValueError:
        got = ", ".join(f"{key}.shape={shape}" for key, shape in shapes.items())
        return ValueError(f"{name}: shapes must broadcast together; got {got}")
    got = ", ".join(
        f"{key}.dtype={value.dtype}" if hasattr(value, "dtype") else f"{key}={value!r}"
        for key, value in inputs.items()
    )
    if isinstance(error, OverflowError):
        return ValueError(f"{name}: a number must fit into the tensor's dtype; got {got}")
    if isinstance(error, TypeError):
        return TypeError(f"{name}: not defined for these dtypes, convert them first; got {got}")
    return ValueError(f"{name}: {error}; got {got}")


def _elementwise_edge(
    op: Operation, place: int, inputs: tuple[Any, ...], shape: Any, out: Any, attributes: Any
) -> Any:
    rule, x = op.rule_list[place], inputs[place]
    if rule is None:
        return None
    pullback, keep, node = rule.pullback, rule.keep, x._node
    if node.shape != shape:
        pullback = functools.partial(_unbroadcast, pullback, node.shape)
    return node, pullback, keep(inputs, out, None, attributes) if keep is not None else ()


def _unbroadcast(
    pullback: Callable[..., Any], shape: tuple[int, ...], grad: Any, *saved: Any
) -> Any:
    return sum_to_shape(pullback(grad, *saved), shape=shape)


def _conform_one(name: str, x: Any, floating: bool) -> Any:
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name}: input must be a Tensor or an array; got {type(x).__name__}")
    if floating and not is_floating_point(x.dtype):
        return cast(x, dtype=get_default_dtype())
    return x


def conform(name: str, x: Any, y: Any, floating: bool = False) -> tuple[Any, Any]:
    """Bring the arrays among x and y to their common dtype; Python numbers stay as they are."""
    # A NumPy scalar beside an array is a number; in an ordinary backward it stands for a 0-d array.
    alone = not any(isinstance(value, Variable) or getattr(value, "shape", ()) for value in (x, y))
    scalar = np.asarray if alone else np.generic.item
    x, y = values = [scalar(v) if isinstance(v, np.generic) else v for v in (x, y)]
    arrays = [hasattr(value, "dtype") for value in values]
    for value, is_array in zip(values, arrays, strict=True):
        if not is_array and not isinstance(value, (bool, int, float)):
            raise TypeError(
                f"{name}: inputs must be Tensors, arrays or numbers; got {type(value).__name__}"
            )
    if not any(arrays):
        raise TypeError(
            f"{name}: one of the inputs must be a Tensor or an array; got {x!r} and {y!r}"
        )
    dtype = result_type(*values)
    if floating and not is_floating_point(dtype):
        dtype = get_default_dtype()
    x, y = (
        cast(value, dtype=dtype) if is_array and value.dtype != dtype else value
        for value, is_array in zip(values, arrays, strict=True)
    )
    return x, y


def _call_elementwise(
    op: Operation, floating: bool, arrays: Sequence[Any], attributes: dict[str, Any]
) -> Any:
    """Run an elementwise forward where it is more than a call of NumPy's, keeping memory's order."""
    compute = op.compute
    dtypes = [array.dtype for array in arrays if hasattr(array, "dtype")]
    # Beside a Python number NumPy and CuPy make bfloat16 float32, and most functions of floats have
    # several steps, each of which would round.
    if is_bfloat16(dtypes[0]) and (floating or len(dtypes) < len(arrays)):
        compute = functools.partial(_in_float32, op, dtypes[0])
    return call_on_device(op.name, compute, arrays, attributes, devices.in_memory_order)


def _in_float32(op: Operation, dtype: Any, *arrays: Any, **attributes: Any) -> Any:
    """Compute arrays of bfloat16, `dtype`, in float32; a result of numbers is rounded to it once."""
    out = op.in_one_pass(*arrays)  # CUDA's take them as they are
    if out is not None:
        return out
    wide = [widened(array) if hasattr(array, "dtype") else array for array in arrays]
    out = op.compute(*wide, **attributes)
    return out.astype(dtype) if out.dtype == float32 else out
