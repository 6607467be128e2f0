"""Matrix products: square from 16 to 4096, and the tall, flat and transposed ones of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge

GROUP = "Products of float32 matrices"
SQUARE = [(size, size, size, "NN") for size in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)]
# (M, K, N, kind): the first is M x K, the second K x N, T marks the one that is a transposed view
OTHERS = [
    (256, 256, 256, "NT"),
    (256, 256, 256, "TN"),
    (2048, 2048, 2048, "NT"),
    (2048, 2048, 2048, "TN"),
    (16, 512, 1000, "NT"),  # ResNet-18's last layer, forward
    (16, 1000, 512, "NN"),  # its gradient by input
    (1000, 16, 512, "TN"),  # and by weight
    (50176, 64, 64, "NN"),  # many pixels, few channels
    (64, 50176, 64, "TN"),
    (1, 4096, 4096, "NN"),
    (8, 4096, 4096, "NN"),
]


def _matrix(rows: int, columns: int, kind: str) -> np.ndarray:
    random = np.random.default_rng(rows)
    if kind == "T":
        return random.random((columns, rows), dtype=np.float32).T
    return random.random((rows, columns), dtype=np.float32)


def _products(torch: Any, a: np.ndarray, b: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return a @ b by each library that is installed, without a copy of a or b."""
    x, y = ge.from_numpy(a), ge.from_numpy(b)
    runs: dict[str, Callable[[], Any]] = {"gradengine": lambda: x @ y, "NumPy": lambda: a @ b}
    if torch:
        u, v = torch.from_numpy(a), torch.from_numpy(b)
        runs["PyTorch"] = lambda: u @ v
    return runs


@pytest.mark.parametrize("case", SQUARE + OTHERS, ids=str)
def test_matmul(race: Any, torch: Any, case: tuple[int, int, int, str]) -> None:
    rows, inner, columns, kind = case
    runs = _products(torch, _matrix(rows, inner, kind[0]), _matrix(inner, columns, kind[1]))
    name = f"{rows} x {inner} by {inner} x {columns}, {kind}"
    race(GROUP, name, runs, flop=2 * rows * inner * columns, seconds=1.5)


def test_batched_matmul(race: Any, torch: Any) -> None:
    a, b = np.random.default_rng(0).random((2, 64, 128, 128), dtype=np.float32)
    runs = _products(torch, a, b.transpose(0, 2, 1))
    race(GROUP, "64 times 128 x 128 by 128 x 128, NT", runs, flop=2 * 64 * 128**3)


def test_matmul_and_gradients(race: Any, torch: Any) -> None:
    size = 1024
    arrays = np.random.default_rng(0).random((3, size, size), dtype=np.float32)

    def step(x: Any, y: Any, grad: Any) -> None:
        x.grad = y.grad = None
        (x @ y).backward(grad)

    def contestant(library: Any) -> Any:
        tensors = [library.from_numpy(array.copy()) for array in arrays]
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
        return lambda: step(*tensors)

    libraries = {"gradengine": ge} | ({"PyTorch": torch} if torch else {})
    runs = {name: contestant(library) for name, library in libraries.items()}
    race(GROUP, f"{size} x {size}, with both gradients", runs, flop=6 * size**3)
