"""Backward hooks of modules: a gate on the tape at each end of a module's call.

A gate is one node through which the gradients of several tensors pass together, so that a hook sees
all of them at once and can replace them before any goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from gradengine.devices import array_module
from gradengine.grad_mode import grad_mode
from gradengine.tape import Node, Variable

Gradients = tuple[Any, ...]  # one place for each tensor, None where no gradient is wanted


class Boundary:
    """The two ends of one call of a module that has backward hooks."""

    def __init__(self, module: Any, hooks: Sequence[Callable[..., Any]], inputs: int) -> None:
        self._module = module
        self._hooks = hooks
        self._inputs = inputs
        self._reaches_inputs = False
        self._grad_output: Gradients | None = None

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the module's arguments as they leave the gate."""
        self._reaches_inputs = grad_mode.enabled and any(_wants_gradient(x) for x in args)
        return _through_gate(args, self._leave_backward) if self._reaches_inputs else args

    def leave(self, output: Any) -> Any:
        """Return the module's result as it leaves the gate."""
        several = isinstance(output, (tuple, list))
        outputs = tuple(output) if several else (output,)
        if not all(isinstance(x, Variable) for x in outputs):
            raise TypeError(
                "backward hook: the module's output should be a Tensor or a tuple of Tensors; "
                f"got {type(output).__name__}"
            )
        if not grad_mode.enabled or not any(_wants_gradient(x) for x in outputs):
            return output
        outputs = _through_gate(outputs, self._enter_backward)
        return type(output)(outputs) if several else outputs[0]

    def _enter_backward(self, gradients: Gradients) -> Gradients:
        self._grad_output = gradients
        if not self._reaches_inputs:
            self._leave_backward((None,) * self._inputs)
        return gradients

    def _leave_backward(self, gradients: Gradients) -> Gradients:
        grad_output, self._grad_output = self._grad_output, None
        if grad_output is None:  # the gradient's way began inside the module
            return gradients
        for hook in self._hooks:
            changed = hook(self._module, gradients, grad_output)
            if changed is not None:
                changed = changed if isinstance(changed, tuple) else (changed,)
                _check_changed(changed, gradients)
                gradients = changed
        return gradients


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Variable) and value.node is not None


def _check_changed(changed: Gradients, gradients: Gradients) -> None:
    got, expected = (
        [None if x is None else tuple(x.shape) for x in xs] for xs in (changed, gradients)
    )
    if got != expected:
        raise RuntimeError(
            "backward hook: grad_input that a hook returns must have the places and shapes of the "
            f"one it was given; got {got}, expected {expected}"
        )


class _Bundle:
    """Gradients by position on their way into a gate: to the tape, one value that adds up."""

    shape = ()
    dtype = None

    def __init__(self, gradients: dict[int, Any]) -> None:
        self.gradients = gradients
        self.passed: Gradients | None = None

    def __add__(self, other: _Bundle) -> _Bundle:
        return _Bundle(self.gradients | other.gradients)


def _through_gate(
    tensors: tuple[Any, ...], function: Callable[[Gradients], Gradients]
) -> tuple[Any, ...]:
    """Return `tensors` such that backward passes their gradients, together, through `function`."""
    wanted = [(x.shape, x.dtype) if _wants_gradient(x) else None for x in tensors]
    # In the order of creation: the walk reaches the gate after all tensors that leave it.
    gate = Node("BackwardHookFunctionBackward", _Bundle.shape, _Bundle.dtype)
    gate.edges = [
        (x.node, functools.partial(_share, function, wanted, position), ())
        if wanted[position]
        else None
        for position, x in enumerate(tensors)
    ]
    return tuple(
        _leaving(x, gate, position) if wanted[position] else x for position, x in enumerate(tensors)
    )


def _leaving(x: Any, gate: Node, position: int) -> Any:
    node = Node("BackwardHookFunctionBackward", x.shape, x.dtype)
    node.edges = ((gate, lambda grad: _Bundle({position: grad}), ()),)
    result = Variable.Result(x.array, node)
    result._counter = x.version()
    return result


def _share(
    function: Callable[[Gradients], Gradients],
    wanted: Sequence[Any],
    position: int,
    bundle: _Bundle,
) -> Any:
    """Return the gradient that leaves the gate for one tensor."""
    if bundle.passed is None:  # the first tensor's turn
        bundle.passed = _pass(function, wanted, bundle.gradients)
    return bundle.passed[position]


def _pass(
    function: Callable[[Gradients], Gradients], wanted: Sequence[Any], gradients: dict[int, Any]
) -> Gradients:
    first = next(iter(gradients.values()))
    recorded = isinstance(first, Variable)  # create_graph: the walk itself is on Tensors
    xp = array_module(first.array if recorded else first)
    full: list[Any] = []
    for position, kind in enumerate(wanted):
        grad = gradients.get(position)
        if grad is None and kind is not None:  # a tensor that the result does not depend on
            grad = xp.zeros(*kind)
        is_array = grad is not None and not isinstance(grad, Variable)
        full.append(Variable.Result(grad) if is_array else grad)
    passed = function(tuple(full))
    return passed if recorded else tuple(x if x is None else x.array for x in passed)
