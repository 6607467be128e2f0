"""Adam, and AdamW, whose weight decay is no part of the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradengine import kernels
from gradengine.devices import array_module
from gradengine.kernels.cuda.capture import postpone, repeated
from gradengine.optim.optimizer import Optimizer
from gradengine.tensor import Tensor


class Adam(Optimizer):
    """Step along the running mean of the gradient, over the root of that of its square.

    `betas` are the shares that the two means keep; eps is added to the root, and weight_decay * p
    to the gradient. Kingma and Ba, arXiv:1412.6980. Raises ValueError for options out of range.
    """

    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"maximize": maximize})

    def check_options(self, options: dict[str, Any]) -> None:
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(
                f"Adam: Invalid betas, each must be in [0, 1); got betas={options['betas']}"
            )
        for name in ("lr", "eps", "weight_decay"):
            if not options[name] >= 0:
                meaning = "learning rate" if name == "lr" else name
                raise ValueError(
                    f"Adam: Invalid {meaning}, it must not be negative ({name} >= 0); "
                    f"got {name}={options[name]}"
                )

    def update_all(
        self, updates: list[tuple[Any, Any, dict[str, Any]]], options: dict[str, Any]
    ) -> None:
        values, grads, states = zip(*updates, strict=True)
        for array, state in zip(values, states, strict=True):
            if not state:
                postpone()  # replays would start anew each time
                state["step"] = 0
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = Tensor(array_module(array).zeros_like(array))
        repeated(lambda: _count(states))
        averages, squares = (
            [state[name].array for state in states] for name in ("exp_avg", "exp_avg_sq")
        )
        kernels.adam(values, grads, averages, squares, states, options, decoupled=self.decoupled)


def _count(states: Sequence[dict[str, Any]]) -> None:
    for state in states:
        state["step"] += 1


class AdamW(Adam):
    """Adam that shrinks p by lr * weight_decay instead of adding weight_decay * p to the gradient.

    Loshchilov and Hutter, arXiv:1711.05101.
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
