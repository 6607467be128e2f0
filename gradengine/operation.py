"""What an operation is: a forward on arrays, and one pullback for each input that can need a gradient.

    @operation
    def matmul(x, y):
        return x @ y

    matmul.pullbacks(x=lambda grad, y: grad @ y.mT, y=lambda grad, x: x.mT @ grad)

Positional parameters are inputs, keyword-only ones are attributes. A pullback takes the incoming gradient
first. Its other parameters name what it needs, and nothing else is kept until backward: an input (`x`), its
shape or dtype alone (`x_shape`, `x_dtype`), the dtype that its gradient may have instead of its own
(`x_grad_dtype`: float32 where x was converted to 16 bits, else None), the result (`out`), an attribute, a
name listed in `keeps` (what forward returns beside its result) or, for an operation on `*inputs`, the
`position` of the input it is for.
With a keyword-only `onto=None` it may be handed the input's gradient so far, and returns the sum.

Operations are polymorphic: given Tensors they return, and record, a Tensor; given arrays they return an
array. Pullbacks are written in operations and operators, so that one formula runs on arrays in an ordinary
backward and is itself recorded under `create_graph`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradengine import devices, kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.dtypes import (
    float32,
    get_default_dtype,
    is_bfloat16,
    is_floating_point,
    narrowed,
    result_type,
    sum_dtype,
    widened,
)
from gradengine.grad_mode import grad_mode
from gradengine.kernels.cuda import capture
from gradengine.tape import Node, SavedOutput, Variable
from gradengine.views import share_memory

_ndarray = np.ndarray

# Where operations get their nodes; `autograd/saved_hooks.py` puts its own class here while it is on.
new_node: Any = Node


class Operation:
    """The record behind an operation's function: its forward, its pullbacks and what they keep."""

    def __init__(
        self,
        forward: Callable[..., Any],
        label: Any,
        keeps: tuple[str, ...] = (),
        view: bool | str = False,
    ) -> None:
        code = forward.__code__
        self.forward = forward
        self.name = forward.__name__.lstrip("_")  # as users know it
        self.label: Any = label or _camel_case(self.name) + "Backward0"  # or label(**attributes)
        self.keeps = keeps
        self.view = view
        self.variadic = bool(code.co_flags & 0x04)  # has *inputs
        names = code.co_varnames
        end = code.co_argcount + code.co_kwonlyargcount
        self.attributes = names[code.co_argcount : end]
        self.inputs = names[end : end + 1] if self.variadic else names[: code.co_argcount]
        if "out" in self.inputs + self.attributes:
            raise TypeError(
                f"{self.name}: no parameter may be called out: in a pullback it is the result"
            )
        self.rules: dict[str, Rule] = {}
        self.saves_output = False
        self.converts = False  # and so does its pullback: see Node.grad_dtype

    def pullbacks(self, **functions: Callable[..., Any]) -> None:
        """Give the pullback of each named input; an input without one never gets a gradient."""
        for name, function in functions.items():
            if name not in self.inputs:
                raise TypeError(
                    f"{self.name}: a pullback must be for one of {self.inputs}; got {name}"
                )
            self.rules[name] = Rule(self, function)
        self.saves_output = any(rule.saves_output for rule in self.rules.values())
        self.rule_list = [self.rules.get(name) for name in self.inputs]

    def joint_pullback(self, function: Callable[..., Any]) -> None:
        """Give one function (grad, wanted, ...) for all inputs, for gradients that share work.

        It returns one gradient for each input, in order. `wanted` says which will be used; the others
        may be None.
        """
        self.pullbacks(**dict.fromkeys(self.inputs, function))


class Rule:
    """The pullback of one input, and the gathering of what it names."""

    def __init__(self, operation: Operation, pullback: Callable[..., Any]) -> None:
        code = pullback.__code__
        names = code.co_varnames[1 : code.co_argcount]
        if pullback.__kwdefaults__ not in (None, {"onto": None}):
            raise TypeError(f"{operation.name}: a pullback's one keyword may be onto=None")
        self.pullback = pullback
        self.joint = "wanted" in names
        self.positional = "position" in names
        self.saves_output = "out" in names
        getters = [_getter(operation, name) for name in names if name not in ("wanted", "position")]
        self.keep = _keeper(getters) if getters else None


def _getter(operation: Operation, name: str) -> Callable[..., Any]:
    """Return get(inputs, out, kept, attributes) for one parameter of a pullback."""
    if name == "out":
        return lambda inputs, out, kept, attributes: out
    if name in operation.keeps:
        place = operation.keeps.index(name)
        return lambda inputs, out, kept, attributes: kept[place]
    if operation.variadic and name in operation.inputs:
        return lambda inputs, out, kept, attributes: inputs
    if name in operation.inputs:
        place = operation.inputs.index(name)
        return lambda inputs, out, kept, attributes: inputs[place]
    if name in operation.attributes:
        return lambda inputs, out, kept, attributes: attributes[name]
    if name.removesuffix("_shape") in operation.inputs:
        place = operation.inputs.index(name.removesuffix("_shape"))
        return lambda inputs, out, kept, attributes: inputs[place].shape
    if name.removesuffix("_grad_dtype") in operation.inputs:
        place = operation.inputs.index(name.removesuffix("_grad_dtype"))
        return lambda inputs, out, kept, attributes: _grad_dtype(inputs[place])
    if name.removesuffix("_dtype") in operation.inputs:
        place = operation.inputs.index(name.removesuffix("_dtype"))
        return lambda inputs, out, kept, attributes: inputs[place].dtype
    raise TypeError(f"{operation.name}: a pullback names {name}, which the operation does not have")


def _grad_dtype(x: Any) -> Any:
    """Return the dtype that an input's gradient may have instead of the input's own, or None."""
    return x._node.grad_dtype if isinstance(x, Variable) and x._node is not None else None


def _keeper(getters: list[Callable[..., Any]]) -> Callable[..., tuple[Any, ...]]:
    if len(getters) == 1:  # the common case, without a loop
        get = getters[0]
        return lambda inputs, out, kept, attributes: (get(inputs, out, kept, attributes),)
    return lambda inputs, out, kept, attributes: tuple(
        [get(inputs, out, kept, attributes) for get in getters]
    )


def _camel_case(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def operation(
    forward: Callable[..., Any] | None = None,
    *,
    label: str | Callable[..., str] | None = None,
    keeps: tuple[str, ...] = (),
    view: bool | str = False,
) -> Any:
    """Make an operation of a forward on arrays.

    `label` is the node's printed name, or a function of the attributes that gives it; `keeps` names what
    forward returns after its result; `view` says that the result may share memory with the first input:
    True, or "one of several" for a part of what returns several views.
    """
    if forward is None:
        return functools.partial(operation, label=label, keeps=keeps, view=view)
    record = Operation(forward, label, keeps, view)
    return _publish(record, _general(record))


def elementwise(
    forward: Callable[..., Any] | None = None,
    *,
    label: str | None = None,
    floating: bool = False,
    needs_range: bool = False,
) -> Any:
    """Make an operation of an elementwise forward on one or two arrays.

    Inputs are converted to their common dtype by PyTorch's rules (`floating`: integers become the default
    float; `needs_range`, for one input: 16-bit floats become float32 under autocast), and pullbacks need
    not undo broadcasting: that is done here, once.
    """
    if forward is None:
        return functools.partial(
            elementwise, label=label, floating=floating, needs_range=needs_range
        )
    record = Operation(forward, label)
    if len(record.inputs) == 1:
        return _publish(record, _unary(record, floating, needs_range))
    return _publish(record, _binary(record, floating))


def _publish(record: Operation, apply: Any) -> Any:
    apply = functools.wraps(record.forward)(apply)
    apply.operation = record
    apply.pullbacks = record.pullbacks
    apply.joint_pullback = record.joint_pullback
    return apply


def _general(op: Operation) -> Callable[..., Any]:
    forward, keeps, view = op.forward, op.keeps, op.view

    def apply(*inputs: Any, **attributes: Any) -> Any:
        arrays = []
        plain, wanted, foreign = True, False, False
        for x in inputs:
            if isinstance(x, Variable):
                plain = False
                if x._node is not None:
                    wanted = True
                x = x.array
            if type(x) is not _ndarray and x is not None:
                foreign = True
            arrays.append(x)
        out = (
            _call(op.name, forward, arrays, attributes)
            if foreign
            else forward(*arrays, **attributes)
        )
        kept = None
        if keeps:
            out, *kept = out
        if plain:
            return out
        if wanted and op.rules and grad_mode.enabled:
            result = _record(op, inputs, out, kept, attributes)
        else:
            result = Variable.Result(out)
        if view:
            share_memory(op.view, inputs[0], result, apply, attributes)
        return result

    return apply


def _record(
    op: Operation, inputs: Sequence[Any], out: Any, kept: Any, attributes: dict[str, Any]
) -> Any:
    """Return the result with its node: one edge for each input that needs a gradient."""
    # Views that are out of date take their nodes before this one, in the order in which backward walks.
    wanted = [
        isinstance(x, Variable) and (x._node if x._view is None else x.node) is not None
        for x in inputs
    ]
    label = op.label if type(op.label) is str else op.label(**attributes)
    node = new_node(label, out.shape, out.dtype)
    result = Variable.Result(out, node)
    if op.saves_output:
        out = result._counter = SavedOutput(result.array)
    rules = op.rule_list * len(inputs) if op.variadic else op.rule_list
    joint: Any = None
    saved: Any = None
    edges: list[Any] = []
    for position, (x, rule) in enumerate(zip(inputs, rules, strict=True)):
        if rule is None or not wanted[position]:
            edges.append(None)
            continue
        pullback = rule.pullback
        if joint is None:  # else the function is the one before, and so is what it names
            saved = rule.keep(inputs, out, kept, attributes) if rule.keep else ()
        if rule.joint:
            joint = joint or Joint(pullback, tuple(wanted))
            pullback = functools.partial(joint.share, position)
        elif rule.positional:
            pullback = functools.partial(_at_position, pullback, position)
        edges.append((x._node, pullback, saved))
    node.edges = edges
    if op.converts and node.dtype.itemsize == 2 and inputs[0].dtype == float32:
        node.grad_dtype = float32
    return result


def node_of(apply: Any, inputs: Sequence[Any], out: Any, **attributes: Any) -> Node | None:
    """Return the node that an operation on these inputs is recorded as, for `out` computed otherwise."""
    if not any(isinstance(x, Variable) and x.requires_grad for x in inputs):
        return None
    return _record(apply.operation, inputs, out, None, attributes).node


def _at_position(pullback: Callable[..., Any], position: int, grad: Any, *saved: Any) -> Any:
    return pullback(grad, position, *saved)


class Joint:
    """One computation of several inputs' gradients, run once for each incoming gradient."""

    def __init__(self, function: Callable[..., Any], wanted: tuple[bool, ...]) -> None:
        self._function = function
        self._wanted = wanted
        # The last incoming gradient with its shares; another thread may put its own here at any time.
        self._last: tuple[Any, list[Any]] | None = None

    def known_share(self, position: int, grad: Any) -> Any:
        """Return, and forget, the gradient of the input at `position` if it was computed before."""
        last = self._last
        if last is None or last[0] is not grad:
            return None
        share, last[1][position] = last[1][position], None
        return share

    def share(self, position: int, grad: Any, *saved: Any) -> Any:
        """Return the gradient of the input at `position`, and forget it."""
        share = self.known_share(position, grad)
        if share is None:
            shares = list(self._function(grad, self._wanted, *saved))
            share, shares[position] = shares[position], None
            self._last = grad, shares
        return share


def array_of(value: Any) -> Any:
    """Return the array of a Tensor, and anything else as it is."""
    return value.array if isinstance(value, Variable) else value


# ---- elementwise ---------------------------------------------------------------------------------


def _unary(op: Operation, floating: bool, needs_range: bool) -> Callable[..., Any]:
    """Spell out the general case for one input: with `_binary`, the path of every small operation."""
    forward = op.forward

    def apply(x: Any, **attributes: Any) -> Any:
        if needs_range and autocast_mode.dtype is not None:
            x = raised(x)
        a = x.array if isinstance(x, Variable) else x
        try:
            if type(a) is _ndarray and (not floating or a.dtype.kind == "f"):
                out = forward(a, **attributes)
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
        node = new_node(op.label, out.shape, out.dtype)
        result = Variable.Result(out, node)
        if op.saves_output:
            out = result._counter = SavedOutput(result.array)
        node.edges = (_elementwise_edge(op, 0, (x,), node.shape, out, attributes),)
        return result

    return apply


def _binary(op: Operation, floating: bool) -> Callable[..., Any]:
    """Spell out the general case for two inputs: this is the path of every small operation."""
    forward = op.forward

    def apply(x: Any, y: Any) -> Any:
        a = x.array if isinstance(x, Variable) else x
        b = y.array if isinstance(y, Variable) else y
        if type(a) is _ndarray and (
            (type(b) is _ndarray and a.dtype is b.dtype and (not floating or a.dtype.kind == "f"))
            or ((type(b) is float or type(b) is int) and a.dtype.kind == "f")
        ):
            try:
                out = forward(a, b)
            except (ValueError, TypeError) as error:
                raise _refusal(error, op.name, x=x, y=y) from None
        else:
            x, y = conform(op.name, x, y, floating)
            try:
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
        node = new_node(op.label, shape, out.dtype)
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


@operation
def sum_to_shape(x, *, shape):
    """Sum over the axes along which `shape` was broadcast to x's: the adjoint of broadcasting."""
    added = x.ndim - len(shape)
    stretched = tuple(
        added + axis for axis, size in enumerate(shape) if size == 1 != x.shape[added + axis]
    )
    axes = (*range(added), *stretched)
    if x.dtype.itemsize > 2:
        return x.sum(axis=axes, keepdims=True).reshape(shape)
    total = x.sum(axis=axes, keepdims=True, dtype=sum_dtype(x.dtype))
    return narrowed(total, x.dtype).reshape(shape)


@operation(label="ExpandBackward0", view=True)
def broadcast_to(x, *, shape):
    """Return x repeated along new and size-1 axes up to `shape`, without a copy."""
    return devices.array_module(x).broadcast_to(x, shape)


sum_to_shape.pullbacks(x=lambda grad, x_shape: broadcast_to(grad, shape=x_shape))
broadcast_to.pullbacks(x=lambda grad, x_shape: sum_to_shape(grad, shape=x_shape))


@operation(label="ToCopyBackward0")
def cast(x, *, dtype):
    """Return x with its elements converted to `dtype`."""
    return x.astype(dtype)


cast.operation.converts = True
cast.pullbacks(x=lambda grad, x_dtype: grad if grad.dtype == x_dtype else cast(grad, dtype=x_dtype))


# ---- precision under autocast --------------------------------------------------------------------
# An operation that autocast has a say in asks `if autocast_mode.dtype is not None` and then one of
# these. They convert floating point arrays on CUDA, but leave float64 as it is.


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
            converted = _record(cast.operation, (leaf,), array, None, {"dtype": dtype})
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
    forward = op.forward
    dtypes = [array.dtype for array in arrays if hasattr(array, "dtype")]
    # Beside a Python number NumPy and CuPy make bfloat16 float32, and most functions of floats have
    # several steps, each of which would round.
    if is_bfloat16(dtypes[0]) and (floating or len(dtypes) < len(arrays)):
        forward = functools.partial(_in_float32, forward, dtypes[0])
    return _call(op.name, forward, arrays, attributes, devices.in_memory_order)


def _in_float32(forward: Callable[..., Any], dtype: Any, *arrays: Any, **attributes: Any) -> Any:
    """Compute arrays of bfloat16, `dtype`, in float32; a result of numbers is rounded to it once."""
    wide = [widened(array) if hasattr(array, "dtype") else array for array in arrays]
    out = forward(*wide, **attributes)
    return out.astype(dtype) if out.dtype == float32 else out


def _call(
    name: str,
    forward: Callable[..., Any],
    arrays: Sequence[Any],
    attributes: dict[str, Any],
    call: Any = operator.call,
) -> Any:
    """Run a forward on arrays that are not all NumPy's: on their device, after checking that it is one."""
    located = [array for array in arrays if hasattr(array, "dtype")]
    devices.check_same_device(name, *located)
    for array in located:
        if type(array) is not _ndarray and devices.array_module(array) is not np:
            with array.device:
                return call(forward, *arrays, **attributes)
    return forward(*arrays, **attributes)
