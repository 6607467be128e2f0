"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradengine import kernels
from gradengine.devices import array_module
from gradengine.kernels.cuda.capture import postpone, valid_while
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

    def update_all(
        self, updates: list[tuple[Any, Any, dict[str, Any]]], options: dict[str, Any]
    ) -> None:
        values, grads, states = zip(*updates, strict=True)
        moves = bool(options["momentum"])
        valid_while(lambda: bool(options["momentum"]) == moves)
        fresh, velocities = [], []
        if moves:
            fresh = ["momentum_buffer" not in state for state in states]
            if any(fresh):
                postpone()  # replays would start anew each time
            for array, state, starts in zip(values, states, fresh, strict=True):
                if starts:
                    state["momentum_buffer"] = Tensor(array_module(array).empty_like(array))
            velocities = [state["momentum_buffer"].array for state in states]
        kernels.sgd(values, grads, velocities, fresh, options)
