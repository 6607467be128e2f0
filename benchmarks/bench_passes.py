"""What only moves memory: batch norm with residual and relu in both directions, and SGD's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.models import resnet18
from gradengine.ops.normalization import batch_norm_act

GROUP = "Passes over memory, training"
SHAPES = [(16, 64, 112, 112), (16, 64, 56, 56), (16, 128, 28, 28), (16, 512, 7, 7)]
# Passes over an array as large as x. Forward: x is read for its statistics, then x and residual to
# write out. Backward: grad, x and out are read for two sums, then again to write two gradients.
FORWARD_PASSES, BACKWARD_PASSES = 4, 8


def _arrays(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return x, residual and grad (N, C, H, W), channels last."""
    random = np.random.default_rng(0)
    n, channels, height, width = shape
    made = random.standard_normal((3, n, height, width, channels), dtype=np.float32)
    return list(made.transpose(0, 1, 4, 2, 3))


def _ours(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    return batch_norm_act(x, None, None, weight, bias, residual, relu=True, training=True)


def _torch_s(torch: Any) -> Callable[..., Any]:
    functional = torch.nn.functional

    def forward(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        out = functional.batch_norm(x, None, None, weight, bias, training=True)
        return functional.relu(out + residual, inplace=True)

    return forward


def _run(
    library: Any, forward: Callable[..., Any], arrays: list[Any], backward: bool
) -> Callable[[], Any]:
    x, residual, grad = arrays
    weight, bias = library.ones(x.shape[1]), library.zeros(x.shape[1])
    inputs = [tensor.requires_grad_(backward) for tensor in (x, residual, weight, bias)]
    if not backward:
        return lambda: forward(*inputs)
    out = forward(*inputs)
    return lambda: library.autograd.grad(out, inputs, grad, retain_graph=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_add_relu(race: Any, torch: Any, shape: tuple[int, ...], direction: str) -> None:
    backward = direction == "backward"
    runs = {"gradengine": _run(ge, _ours, list(map(ge.from_numpy, _arrays(shape))), backward)}
    if torch:
        nhwc = list(map(torch.from_numpy, _arrays(shape)))
        nchw = [tensor.contiguous() for tensor in map(torch.from_numpy, _arrays(shape))]
        runs["PyTorch nchw"] = _run(torch, _torch_s(torch), nchw, backward)
        runs["PyTorch nhwc"] = _run(torch, _torch_s(torch), nhwc, backward)
    passes = BACKWARD_PASSES if backward else FORWARD_PASSES
    name = f"batch norm + add + relu, {' x '.join(map(str, shape))}, {direction}"
    race(GROUP, name, runs, moved=4.0 * passes * np.prod(shape), seconds=1.5)


def test_sgd(race: Any, torch: Any) -> None:
    arrays = [np.array(p.detach()) for p in resnet18().parameters()]

    def stepper(library: Any, **options: Any) -> Callable[[], None]:
        parameters = [
            library.from_numpy(array.copy(order="K")).requires_grad_() for array in arrays
        ]
        for parameter, array in zip(parameters, arrays, strict=True):
            parameter.grad = library.from_numpy(1e-3 * array)
        optimizer = library.optim.SGD(
            parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, **options
        )
        return optimizer.step

    runs = {"gradengine": stepper(ge)}
    if torch:
        runs |= {"PyTorch": stepper(torch), "PyTorch fused": stepper(torch, fused=True)}
    # Parameter and velocity are read and written, the gradient is read.
    moved = 5.0 * sum(array.nbytes for array in arrays)
    race(GROUP, "SGD, momentum and weight decay, all of ResNet-18", runs, moved=moved)
