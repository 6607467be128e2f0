"""Optimizers, one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence

from gradengine.devices import array_module
from gradengine.kernels.layout import Array


def sgd(
    values: Sequence[Array],
    grads: Sequence[Array],
    velocities: Sequence[Array],
    fresh: Sequence[bool],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    for place, (value, grad) in enumerate(zip(values, grads, strict=True)):
        step = _with_decay(value, grad, weight_decay, maximize)
        if momentum:
            velocity = velocities[place]
            if fresh[place]:
                velocity[...] = step
            else:
                velocity *= momentum
                velocity += (1 - dampening) * step if dampening else step
            step = step + momentum * velocity if nesterov else velocity
        value -= lr * step


def adam(
    values: Sequence[Array],
    grads: Sequence[Array],
    averages: Sequence[Array],
    squares: Sequence[Array],
    steps: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    for value, grad, average, square, step in zip(
        values, grads, averages, squares, steps, strict=True
    ):
        if decoupled:
            value *= 1 - lr * weight_decay
        grad = _with_decay(value, grad, 0 if decoupled else weight_decay, maximize)
        for mean, term, beta in zip((average, square), (grad, grad * grad), betas, strict=True):
            mean *= beta
            mean += (1 - beta) * term
        # both averages start at 0, too low by these factors
        first, second = (1 - beta**step for beta in betas)
        root = array_module(value).sqrt(square)
        root /= second**0.5
        root += eps
        value -= (lr / first) * (average / root)


def _with_decay(value: Array, grad: Array, weight_decay: float, maximize: bool) -> Array:
    grad = -grad if maximize else grad
    return grad + weight_decay * value if weight_decay else grad
