"""What users do with the tape: gradients as values, backward from several roots, checks."""

from __future__ import annotations

from typing import Any

from gradengine.autograd import functional, graph
from gradengine.autograd.anomaly import (
    detect_anomaly,
    is_anomaly_check_nan_enabled,
    is_anomaly_enabled,
    set_detect_anomaly,
)
from gradengine.autograd.checkpoint import checkpoint
from gradengine.autograd.custom_kernel import kernel
from gradengine.autograd.diff import diff
from gradengine.autograd.explain import explain, record_reasons
from gradengine.autograd.function import Function, once_differentiable
from gradengine.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from gradengine.autograd.lines import trace_lines
from gradengine.autograd.memory import memory
from gradengine.autograd.node_hooks import NodeHooks
from gradengine.autograd.trace import load_trace, trace
from gradengine.backward_walk import accumulate_gradients, gradients_of
from gradengine.factories import zeros_like
from gradengine.grad_mode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from gradengine.tape import Node
from gradengine.tensor import Tensor

__all__ = [
    "Function",
    "GradcheckError",
    "Node",
    "backward",
    "checkpoint",
    "detect_anomaly",
    "diff",
    "enable_grad",
    "explain",
    "functional",
    "grad",
    "gradcheck",
    "gradgradcheck",
    "graph",
    "is_anomaly_check_nan_enabled",
    "is_anomaly_enabled",
    "is_grad_enabled",
    "kernel",
    "load_trace",
    "memory",
    "no_grad",
    "once_differentiable",
    "record_reasons",
    "set_detect_anomaly",
    "set_grad_enabled",
    "trace",
    "trace_lines",
]

Node.Hooks = NodeHooks


def _as_tuple(name: str, value: Any, count: int | None = None) -> tuple[Any, ...]:
    """Return one tensor, several, or None (for `count` of them) as a tuple."""
    if value is None:
        return (None,) * (count or 0)
    values = (value,) if isinstance(value, (Tensor, graph.GradientEdge)) else tuple(value)
    if count is not None and len(values) != count:
        raise RuntimeError(f"{name}: got {count} tensors and {len(values)} gradients")
    return values


def _as_outputs(tensors: tuple[Any, ...], gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        [
            x.as_output(gradient) if isinstance(x, graph.GradientEdge) else x
            for x, gradient in zip(tensors, gradients, strict=True)
        ]
    )


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Add the gradients of `tensors`, weighed by `grad_tensors`, to `grad` of the leaves they depend on.

    Both are one tensor or several; the rest is as in `Tensor.backward`.
    """
    tensors = _as_tuple("backward", tensors)
    seeds = _as_tuple("backward", grad_tensors, len(tensors))
    tensors = _as_outputs(tensors, seeds)
    accumulate_gradients(tensors, seeds, retain_graph, create_graph, inputs)


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """Return the gradient of `outputs` by each of `inputs`, as a tuple; no tensor's `grad` is touched.

    `grad_outputs` weighs the outputs' elements (needed where an output has more than one). A
    `graph.GradientEdge` may stand for an output or an input.
    An input that the outputs do not depend on raises RuntimeError, or gives None with `allow_unused`, or
    zeros with `materialize_grads`.
    """
    outputs, inputs = _as_tuple("grad", outputs), _as_tuple("grad", inputs)
    seeds = _as_tuple("grad", grad_outputs, len(outputs))
    outputs = _as_outputs(outputs, seeds)
    found = gradients_of(outputs, inputs, seeds, retain_graph, create_graph)
    for position, (gradient, tensor) in enumerate(zip(found, inputs, strict=True)):
        if gradient is not None:
            continue
        if materialize_grads:
            if isinstance(tensor, graph.GradientEdge):
                raise RuntimeError(
                    "grad: materialize_grads cannot be used when the given input is a GradientEdge"
                )
            found[position] = zeros_like(tensor)
        elif not allow_unused:
            raise RuntimeError(
                f"grad: the differentiated Tensor at index {position} appears to not have been used in the "
                "graph; set allow_unused=True if this is the desired behavior"
            )
    return tuple(found)
