"""ResNet-18 on the CPU: a training step, a step with a frozen backbone, and the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.models import resnet18

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


def _freeze_backbone(library: Any, model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = library.nn.Linear(512, 1000)


def _theirs(torch: Any, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Any]:
    """Return PyTorch's model and data, channels last where that is its faster layout."""
    layout = torch.channels_last if images.shape[-1] > 64 else torch.contiguous_format
    from tests.models import torch_resnet

    model = torch_resnet.resnet(18).to(memory_format=layout)
    return (
        model,
        torch.from_numpy(images).contiguous(memory_format=layout),
        torch.from_numpy(labels),
    )


@pytest.mark.filterwarnings("ignore:BatchNorm")  # frozen by hand: statistics move, as in PyTorch
@pytest.mark.parametrize("frozen", [False, True], ids=["training_step", "frozen_step"])
def test_step(race: Any, torch: Any, data: Any, frozen: bool) -> None:
    images, labels = data
    runs: list[Any] = [None, None]
    sides = [(ge, (resnet18(), ge.from_numpy(images), ge.from_numpy(labels)))]
    if torch:
        sides.append((torch, _theirs(torch, images, labels)))
    for place, (library, (model, x, y)) in enumerate(sides):
        if frozen:
            _freeze_backbone(library, model)
        runs[place] = _step(library, model, x, y)
    race(*runs, rounds=5 if images.shape[-1] > 64 else 15)


def test_forward(race: Any, torch: Any, data: Any) -> None:
    images, labels = data
    model, x = resnet18().eval(), ge.from_numpy(images)
    peer = None
    if torch:
        their_model, their_x, _ = _theirs(torch, images, labels)
        their_model.eval()
        peer = torch.no_grad()(lambda: their_model(their_x))
    race(ge.no_grad()(lambda: model(x)), peer, rounds=5 if images.shape[-1] > 64 else 15)
