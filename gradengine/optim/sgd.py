"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradengine.devices import array_module
from gradengine.optim.optimizer import Optimizer
from gradengine.tensor import Tensor


class SGD(Optimizer):
    """Step p <- p - lr * v along v <- momentum * v + (1 - dampening) * g.

    g is the gradient + weight_decay * p, and v starts as the first g. `nesterov` steps along
    g + momentum * v instead (Sutskever et al., ICML 2013); `maximize` climbs. Raises ValueError for
    options out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_options(self, options: dict[str, Any]) -> None:
        meanings = {"lr": "learning rate", "momentum": "momentum value"}
        for name in ("lr", "momentum", "weight_decay"):
            if not options[name] >= 0:
                raise ValueError(
                    f"SGD: Invalid {meanings.get(name, name)}, it must not be negative "
                    f"({name} >= 0); got {name}={options[name]}"
                )
        momentum, dampening = options["momentum"], options["dampening"]
        if options["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "SGD: Nesterov momentum requires a momentum and zero dampening; "
                f"got {momentum=}, {dampening=}"
            )

    def update(
        self, values: Any, grad: Any, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        if options["maximize"]:
            grad = -grad
        if options["weight_decay"]:
            grad = grad + options["weight_decay"] * values
        momentum = options["momentum"]
        if momentum:
            velocity = _velocity(values, grad, state, momentum, options["dampening"])
            grad = grad + momentum * velocity if options["nesterov"] else velocity
        values -= options["lr"] * grad


def _velocity(
    values: Any, grad: Any, state: dict[str, Any], momentum: float, dampening: float
) -> Any:
    """Move the velocity that is kept between steps by one step, and return its array."""
    if "momentum_buffer" not in state:
        velocity = array_module(values).empty_like(values)
        velocity[...] = grad
        state["momentum_buffer"] = Tensor(velocity)
        return velocity
    velocity = state["momentum_buffer"].array
    velocity *= momentum
    velocity += (1 - dampening) * grad if dampening else grad
    return velocity
