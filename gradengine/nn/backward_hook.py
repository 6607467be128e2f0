"""Backward hooks of modules: a gate on the tape at each end of a module's call.

A gate is a Function that changes nothing, through which the tensors of one end pass together: the hooks
of its node see all their gradients at once. A tensor that has passed a gate cannot be written in place,
since the gate's backward would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradengine.autograd import Function
from gradengine.grad_mode import grad_mode
from gradengine.tape import Node, Variable

Gradients = tuple[
    Any, ...
]  # one place for each argument or result, None where there is no gradient


class BackwardHookFunction(Function):
    """The gate."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Any:
        """Return the tensors as they are."""
        ctx.mark_non_differentiable(*[x for x in tensors if not x.requires_grad])
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients as they are."""
        return gradients


class Boundary:
    """The two ends of one call of a module that has backward hooks."""

    def __init__(
        self,
        module: Any,
        before: Sequence[Callable[..., Any]],
        after: Sequence[Callable[..., Any]],
        inputs: int,
    ) -> None:
        self._module = module
        self._before = before
        self._after = after
        self._inputs = inputs
        self._reaches_inputs = False
        self._grad_output: Gradients | None = None

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the module's arguments as they leave the gate."""
        args, places, node = _through_gate(args)
        self._reaches_inputs = node is not None
        if node is not None:
            node.register_hook(
                lambda grads, _: self._leave_backward(_spread(grads, places, self._inputs), places)
            )
        return args

    def leave(self, output: Any) -> Any:
        """Return the module's result as it leaves the gate."""
        several = isinstance(output, (tuple, list))
        outputs = tuple(output) if several else (output,)
        if not any(isinstance(x, Variable) for x in outputs):
            raise TypeError(
                "backward hook: the module's output should be a Tensor or a tuple of Tensors; "
                f"got {type(output).__name__}"
            )
        outputs, places, node = _through_gate(outputs)
        if node is None:
            return output
        count = len(outputs)
        node.register_hook(
            lambda _, grads: self._enter_backward(_spread(grads, places, count), places)
        )
        return type(output)(outputs) if several else outputs[0]

    def _enter_backward(self, gradients: Gradients, places: Sequence[int]) -> Gradients:
        for hook in self._before:
            gradients = _changed(
                "pre hook", "grad_output", hook(self._module, gradients), gradients
            )
        self._grad_output = gradients
        if not self._reaches_inputs:
            self._leave_backward((None,) * self._inputs, ())
        return tuple([gradients[place] for place in places])

    def _leave_backward(self, gradients: Gradients, places: Sequence[int]) -> Gradients | None:
        grad_output, self._grad_output = self._grad_output, None
        if grad_output is None:  # the gradient's way began inside the module
            return None
        for hook in self._after:
            changed = hook(self._module, gradients, grad_output)
            gradients = _changed("hook", "grad_input", changed, gradients)
        return tuple([gradients[place] for place in places])


def _through_gate(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int], Node | None]:
    """Return values as they leave a gate, which of them are tensors, and the gate's node.

    It is None, and they are as they were, where no gradient is wanted.
    """
    places = [place for place, value in enumerate(values) if isinstance(value, Variable)]
    if not grad_mode.enabled or not any(values[place].requires_grad for place in places):
        return values, places, None
    passed = list(values)
    node = None
    for place, tensor in zip(
        places, BackwardHookFunction.apply(*[values[place] for place in places]), strict=True
    ):
        passed[place] = tensor
        node = tensor.grad_fn or node
    return tuple(passed), places, node


def _spread(gradients: Gradients, places: Sequence[int], count: int) -> Gradients:
    """Return the gradients of tensors in their places among `count` values."""
    spread: list[Any] = [None] * count
    for place, gradient in zip(places, gradients, strict=True):
        spread[place] = gradient
    return tuple(spread)


def _changed(kind: str, what: str, changed: Any, gradients: Gradients) -> Any:
    """Return what a hook left of the gradients; raises unless it has their places and shapes."""
    if changed is None:
        return gradients
    changed = changed if isinstance(changed, tuple) else (changed,)
    if len(changed) != len(gradients):
        raise RuntimeError(
            f"backward {kind}: returned an invalid number of {what}; got {len(changed)}, "
            f"but expected {len(gradients)}"
        )
    for value, gradient in zip(changed, gradients, strict=True):
        if value is not None and not isinstance(value, Variable):
            raise TypeError(
                f"backward {kind}: {what} must be Tensors or None; got {type(value).__name__}"
            )
        shapes = [None if x is None else tuple(x.array.shape) for x in (value, gradient)]
        if value is not None and shapes[0] != shapes[1]:
            raise RuntimeError(
                f"backward {kind}: {what} that a hook returns must have the places and shapes of the "
                f"one it was given; got {shapes[0]}, expected {shapes[1]}"
            )
    return changed
