"""ResNet-18 on the CPU: a training step, a step with a frozen backbone, and the forward pass alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.models import resnet18

Make = Callable[[Any, Any, Any, Any], Callable[[], Any]]  # (library, model, images, labels) -> run
SIZES = [(16, 224), (8, 64), (1, 64)]


@pytest.fixture(params=SIZES, ids=lambda size: f"batch{size[0]}-{size[1]}px")
def data(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, H, W) and labels (N,)."""
    batch, pixels = request.param
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, 3, pixels, pixels), dtype=np.float32)
    return images, random.integers(0, 1000, batch)


def _step(library: Any, model: Any, images: Any, labels: Any) -> Callable[[], None]:
    """Return one training step of `model` with SGD, momentum 0.9 and cross entropy."""
    optimizer = library.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion = library.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


def _theirs(torch: Any, data: Any, make: Make) -> Callable[[], Any]:
    """Return make(torch, model, images, labels) in the memory layout that is the faster here."""
    from tests.models import torch_resnet

    images, labels = map(torch.from_numpy, data)
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = torch_resnet.resnet(18).to(memory_format=layout)
        runs.append(make(torch, model, images.contiguous(memory_format=layout), labels))
    return min(runs, key=_seconds)


def _seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _frozen_step(library: Any, model: Any, images: Any, labels: Any) -> Callable[[], None]:
    """Return a training step of a new last layer on a frozen backbone."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = library.nn.Linear(512, 1000)
    return _step(library, model, images, labels)


def _forward(library: Any, model: Any, images: Any, labels: Any) -> Callable[[], Any]:
    model.eval()
    return library.no_grad()(lambda: model(images))


@pytest.mark.filterwarnings("ignore:BatchNorm")  # frozen by hand: statistics move, as in PyTorch
@pytest.mark.parametrize(
    "make", [_step, _frozen_step, _forward], ids=["training_step", "frozen_step", "forward"]
)
def test_resnet18(race: Any, torch: Any, data: Any, make: Any) -> None:
    rounds = 5 if data[0].shape[-1] > 64 else 15
    ours = make(ge, resnet18(), *map(ge.from_numpy, data))
    race(ours, _theirs(torch, data, make) if torch else None, rounds=rounds)
