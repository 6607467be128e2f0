"""What users write between the layers: elementwise operations, softmax, norms, sums, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge

GROUP = "Operations on 1024 x 1024 float32"
SHAPE, ROW, COLUMN = (1024, 1024), (1024,), (1024, 1)
# By name: the operation of a library, and the shapes of its inputs
OPERATIONS: dict[str, tuple[Any, ...]] = {
    "x + y": (lambda lib, x, y: x + y, SHAPE, SHAPE),
    "x * a row": (lambda lib, x, y: x * y, SHAPE, ROW),
    "x / a column": (lambda lib, x, y: x / y, SHAPE, COLUMN),
    "exp": (lambda lib, x: lib.exp(x), SHAPE),
    "tanh": (lambda lib, x: lib.tanh(x), SHAPE),
    "sigmoid": (lambda lib, x: lib.sigmoid(x), SHAPE),
    "relu": (lambda lib, x: lib.relu(x), SHAPE),
    "gelu": (lambda lib, x: lib.nn.functional.gelu(x), SHAPE),
    "gelu, tanh": (lambda lib, x: lib.nn.functional.gelu(x, approximate="tanh"), SHAPE),
    "silu": (lambda lib, x: lib.nn.functional.silu(x), SHAPE),
    "softmax": (lambda lib, x: lib.softmax(x, dim=-1), SHAPE),
    "log_softmax": (lambda lib, x: lib.log_softmax(x, dim=-1), SHAPE),
    "layer_norm": (
        lambda lib, x, w, b: lib.nn.functional.layer_norm(x, ROW, w, b),
        SHAPE,
        ROW,
        ROW,
    ),
    "sum": (lambda lib, x: x.sum(), SHAPE),
    "mean of rows": (lambda lib, x: x.mean(1), SHAPE),
    "mse_loss": (lambda lib, x, y: lib.nn.functional.mse_loss(x, y), SHAPE, SHAPE),
    "copy of the transposed": (lambda lib, x: x.mT.contiguous(), SHAPE),
}


def _run(library: Any, name: str, backward: bool) -> Callable[[], Any]:
    operation, *shapes = OPERATIONS[name]
    random = np.random.default_rng(0)
    made = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    inputs = [library.from_numpy(array).requires_grad_(backward) for array in made]
    if not backward:
        return lambda: operation(library, *inputs)
    out = operation(library, *inputs)
    grad = library.from_numpy(random.standard_normal(tuple(out.shape), dtype=np.float32))
    return lambda: library.autograd.grad(out, inputs, grad, retain_graph=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(race: Any, torch: Any, name: str, direction: str) -> None:
    libraries = {"gradengine": ge} | ({"PyTorch": torch} if torch else {})
    runs = {key: _run(it, name, direction == "backward") for key, it in libraries.items()}
    race(GROUP, f"{name}, {direction}", runs, seconds=0.5)
