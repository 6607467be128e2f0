"""Matrix products, forward and with both gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradengine as ge


@pytest.mark.parametrize("size", [64, 256, 1024, 2048])
def test_matmul(race: Any, torch: Any, size: int) -> None:
    a, b = np.random.default_rng(0).random((2, size, size), dtype=np.float32)
    x, y = ge.from_numpy(a), ge.from_numpy(b)
    theirs = [torch.from_numpy(a), torch.from_numpy(b)] if torch else []
    race(lambda: x @ y, (lambda: theirs[0] @ theirs[1]) if torch else None, flop=2 * size**3)


@pytest.mark.parametrize("size", [256, 1024])
def test_matmul_and_gradients(race: Any, torch: Any, size: int) -> None:
    a, b, seed = np.random.default_rng(0).random((3, size, size), dtype=np.float32)

    def step(x: Any, y: Any, grad: Any) -> None:
        x.grad = y.grad = None
        (x @ y).backward(grad)

    ours = [ge.from_numpy(array.copy()) for array in (a, b, seed)]
    theirs = [torch.from_numpy(array.copy()) for array in (a, b, seed)] if torch else []
    for x in (*ours[:2], *theirs[:2]):
        x.requires_grad_()
    race(lambda: step(*ours), (lambda: step(*theirs)) if torch else None, flop=6 * size**3)
