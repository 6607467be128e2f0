"""What one small recorded operation costs: chains of 2,000 on eight numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge

OPERATIONS = 2000

CHAINS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "multiply-add": (2, lambda y, x: y * x + x),
    "negate": (1, lambda y, x: -y),
    "scale": (1, lambda y, x: y * 0.5),
    "sine": (1, lambda y, x: y.sin()),
    "tanh": (1, lambda y, x: y.tanh()),
    "relu": (1, lambda y, x: y.relu()),
}


def _run(leaf: Any, seed: Any, count: int, step: Callable[[Any, Any], Any]) -> Callable[[], None]:
    def run() -> None:
        leaf.grad = None
        y = leaf
        for _ in range(count):
            y = step(y, leaf)
        y.backward(seed)

    return run


@pytest.mark.parametrize("name", CHAINS)
def test_chain(race: Any, torch: Any, name: str) -> None:
    per_step, step = CHAINS[name]
    count = OPERATIONS // per_step
    values = np.ones(8, np.float32)
    ours = ge.tensor(values, device="cpu", requires_grad=True)
    runs = {"gradengine": _run(ours, ge.ones(8, device="cpu"), count, step)}
    if torch:
        leaf = torch.tensor(values, requires_grad=True)
        runs["PyTorch"] = _run(leaf, torch.ones(8), count, step)
    race("One recorded operation, forward and backward", name, runs, calls=OPERATIONS)
