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
from gradengine.dtypes import (
    float32,
    narrowed,
    sum_dtype,
)
from gradengine.grad_mode import grad_mode
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
        self.has_kernel = False  # see `elementwise`
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

    def in_one_pass(self, *arrays: Any) -> Any:
        """Return what a kernel makes of the inputs in one pass, or None where none is worth it."""
        return kernels.elementwise(self.name, *arrays) if self.has_kernel else None

    def compute(self, *arrays: Any, **attributes: Any) -> Any:
        """Run the kernel if there is one that is worth it, and the forward if not."""
        out = self.in_one_pass(*arrays)
        return self.forward(*arrays, **attributes) if out is None else out

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
        kernel = getattr(pullback, "kernel", None)
        if kernel is not None:
            self.pullback = _large_by_kernel(kernel, pullback)
        self.joint = "wanted" in names
        self.positional = "position" in names
        self.saves_output = "out" in names
        getters = [_getter(operation, name) for name in names if name not in ("wanted", "position")]
        self.keep = _keeper(getters) if getters else None


def by_kernel(name: str, pullback: Callable[..., Any]) -> Callable[..., Any]:
    """Say that a pullback of large arrays is the formula `name` of `kernels.elementwise`."""
    pullback.kernel = name  # pyright: ignore[reportFunctionMemberAccess]
    return pullback


def _large_by_kernel(name: str, pullback: Callable[..., Any]) -> Callable[..., Any]:
    def compute(grad: Any, *saved: Any) -> Any:
        small = (
            type(grad) is _ndarray and grad.size < kernels.PARALLEL_SIZE
        )  # asked here: it is cheap
        if not small and not isinstance(grad, Variable):
            out = kernels.elementwise(name, grad, *saved)
            if out is not None:
                return out
        return pullback(grad, *saved)

    return compute


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
    return publish(record, _general(record))


def publish(record: Operation, apply: Any) -> Any:
    """Give a function of Tensors and arrays the record of its operation, and what declares pullbacks."""
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
            call_on_device(op.name, forward, arrays, attributes)
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


@operation
def sum_to_shape(x, *, shape):
    """Sum over the axes along which `shape` was broadcast to x's: the adjoint of broadcasting."""
    added = x.ndim - len(shape)
    stretched = tuple(
        added + axis for axis, size in enumerate(shape) if size == 1 != x.shape[added + axis]
    )
    axes = (*range(added), *stretched)
    if x.size >= kernels.PARALLEL_SIZE:
        total = kernels.sum_over(x, axes)
        if total is not None:
            return total.reshape(shape)
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


def call_on_device(
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
