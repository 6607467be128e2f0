"""ResNet-18 on the CPU: a training step, a step with a frozen backbone, and the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from benchmarks import engines, timing
from gradengine.models import resnet18

# (library, model, images, labels, what to compute the loss in) -> one run
Make = Callable[[Any, Any, Any, Any, Any], Callable[[], Any]]
GROUP = "ResNet-18"


def _data(batch: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 3, H, W) and labels (N,)."""
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, 3, pixels, pixels), dtype=np.float32)
    return images, random.integers(0, 1000, batch)


def _state(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value.detach()) for name, value in model.state_dict().items()}


def _runs(
    make: Make, torch: Any, model: Any, images: np.ndarray, labels: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Return one run of each library that is installed; PyTorch's start from `model`'s weights."""
    state = _state(model)
    ours = make(ge, model, ge.from_numpy(images), ge.from_numpy(labels), nullcontext())
    runs = {"gradengine": ours}
    if torch is None:
        return runs
    from tests.models import torch_resnet

    for name, layout, autocast in (
        ("PyTorch nchw", torch.contiguous_format, nullcontext()),
        ("PyTorch nhwc", torch.channels_last, nullcontext()),
        ("PyTorch nhwc bf16", torch.channels_last, torch.autocast("cpu", torch.bfloat16)),
    ):
        theirs = torch_resnet.resnet(18)
        theirs.load_state_dict({key: torch.tensor(array) for key, array in state.items()})
        theirs.to(memory_format=layout)
        data = torch.tensor(images).contiguous(memory_format=layout)
        runs[name] = make(torch, theirs, data, torch.tensor(labels), autocast)
    return runs


def _step(library: Any, model: Any, images: Any, labels: Any, autocast: Any) -> Callable[[], None]:
    """Return one training step of `model` with SGD, momentum 0.9 and cross entropy."""
    optimizer = library.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion = library.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _frozen_step(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any
) -> Callable[[], None]:
    """Return a training step of a new last layer on a frozen backbone."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = library.nn.Linear(512, 1000)
    return _step(library, model, images, labels, autocast)


def _fixed_step(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any
) -> Callable[[], None]:
    """Return such a step where batch norm takes its running statistics and leaves them alone."""
    step = _frozen_step(library, model, images, labels, autocast)
    model.eval()
    return step


def _forward(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any
) -> Callable[[], Any]:
    """Return the forward pass in eval mode, without a graph."""
    model.eval()

    def forward() -> Any:
        with library.no_grad(), autocast:
            return model(images)

    return forward


TRAINING = {
    "training step": _step,
    "frozen backbone, new fc": _frozen_step,
    "frozen backbone in eval mode, new fc": _fixed_step,
}


@pytest.mark.filterwarnings("ignore:BatchNorm")  # frozen by hand: statistics move, as in PyTorch
@pytest.mark.parametrize("size", [(16, 224), (8, 64), (1, 64)], ids=str)
@pytest.mark.parametrize("what", TRAINING)
def test_training(race: Any, torch: Any, what: str, size: tuple[int, int]) -> None:
    runs = _runs(TRAINING[what], torch, resnet18(), *_data(*size))
    race(GROUP, _name(what, size), runs, seconds=12 if size[1] > 64 else 5)


@pytest.mark.parametrize("size", [(16, 224), (1, 224), (1, 64)], ids=str)
def test_forward(race: Any, torch: Any, size: tuple[int, int]) -> None:
    images, labels = _data(*size)
    model = resnet18()
    runs = _runs(_forward, torch, model, images, labels)
    runs |= engines.forward_runs(_state(model), images)
    _check_same(runs)
    race(GROUP, _name("forward in eval mode", size), runs, seconds=10, pause=timing.LONG_PAUSE)


def _name(what: str, size: tuple[int, int]) -> str:
    return f"{what}, {size[0]} x {size[1]} px"


def _check_same(runs: dict[str, Callable[[], Any]]) -> None:
    """Stop unless all contestants compute the same logits."""
    ours = np.asarray(runs["gradengine"]())
    for name, run in runs.items():
        result = run()
        theirs = np.asarray(result.float() if "PyTorch" in name else result)
        tolerance = 5e-2 if "bf16" in name else 1e-4
        assert np.abs(theirs - ours).max() <= tolerance * np.abs(ours).max(), name
