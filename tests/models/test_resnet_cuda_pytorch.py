"""ResNet-18 on a GPU beside PyTorch on the same GPU, from the same weights.

In every precision both are held to PyTorch's float64, and this package may be no further away than a
few times PyTorch itself: its error is what the precision costs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import models
from gradengine.kernels import settings
from gradengine.nn import functional as F

torch = pytest.importorskip("torch")

from tests.models.torch_resnet import resnet  # noqa: E402 - it skips without torch

Results = dict[str, Any]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
STEPS = 5
# How many times PyTorch's error ours may be, and what is let pass where PyTorch happens to be closer:
# logits, all gradients together, any one gradient, statistics, the change of all parameters.
TIMES = 2.5
FLOORS = {
    "float32": (5e-6, 3e-3, 1e-2, 1e-6, 3e-3),
    "tf32": (3e-4, 0.03, 0.05, 1e-4, 0.03),
    "bfloat16": (3e-3, 0.05, 0.1, 1e-3, 0.05),
    "float16": (5e-4, 0.03, 0.05, 1e-4, 0.03),
}
SCALE = 1024.0  # of float16's losses


@pytest.fixture(scope="module")
def initial() -> Any:
    """Give PyTorch's model with random weights, whose blocks add little to their shortcuts.

    So do those of trained networks; otherwise rounding errors would double with each block.
    """
    torch.manual_seed(0)
    model = resnet(18)
    for name, parameter in model.named_parameters():
        if "conv" in name or "downsample.0" in name:
            torch.nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        if name.endswith("bn2.weight"):
            torch.nn.init.constant_(parameter, 0.2)
    return model.state_dict()


def batches(count: int, pixels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(1)
    shape = (count, 3, pixels, pixels)
    return [
        (random.standard_normal(shape, np.float32), random.integers(0, 1000, count))
        for _ in range(STEPS)
    ]


@contextlib.contextmanager
def torch_precision(precision: str) -> Iterator[Any]:
    """Let PyTorch compute in this precision; give the context of its forward passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that newer versions rename
        usual = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        autocast = torch.autocast("cuda", getattr(torch, precision, None), precision in _LOW)
        tf32 = precision == "tf32"
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=tf32):
                yield autocast
        finally:
            torch.set_float32_matmul_precision(usual)


_LOW = ("bfloat16", "float16")


def train_theirs(
    initial: Any, data: Any, precision: str, training: bool, device: str = "cuda"
) -> Results:
    """Return PyTorch's first logits, gradients and statistics, and the change of its parameters."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = resnet(18)
    model.load_state_dict(initial)
    model.to(device, dtype).train(training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    scale = SCALE if precision == "float16" else 1.0
    found: Results = {}
    with torch_precision(precision) as autocast:
        for images, labels in data:
            optimizer.zero_grad()
            with autocast:
                logits = model(torch.tensor(images, device=device, dtype=dtype))
                target = torch.tensor(labels, device=device)
                loss = torch.nn.functional.cross_entropy(logits, target)
            (loss * scale).backward()
            for parameter in model.parameters():
                parameter.grad /= scale
            if not found:
                grads = {name: p.grad for name, p in model.named_parameters()}
                found = first_step(logits, grads, model.named_buffers())
            optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return found | {"moved": flat(moved)}


def train_ours(
    initial: Any, data: Any, precision: str, training: bool, device: str = "cuda"
) -> Results:
    """Return ours, the same."""
    model = models.resnet18()
    model.load_state_dict({name: ge.asarray(t.numpy()) for name, t in initial.items()})
    model.to(device).train(training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ge.optim.SGD(model.parameters(), **OPTIONS)
    low = precision in _LOW
    scaler = ge.amp.GradScaler(init_scale=SCALE, enabled=precision == "float16")
    found: Results = {}
    for images, labels in data:
        optimizer.zero_grad()
        with ge.autocast("cuda", precision if low else "bfloat16", enabled=low):
            logits = model(ge.asarray(images, device=device))
            loss = F.cross_entropy(logits, ge.asarray(labels, device=device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not found:
            grads = {name: p.grad for name, p in model.named_parameters()}
            found = first_step(logits, grads, model.named_buffers())
        scaler.step(optimizer)
        scaler.update()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return found | {"moved": flat(moved)}


def first_step(logits: Any, grads: dict[str, Any], buffers: Any) -> Results:
    return {
        "logits": numbers(logits),
        "gradients": flat(grads),
        "each": {name: numbers(grad) for name, grad in grads.items()},
        "statistics": flat({name: b for name, b in buffers if "running" in name}),
    }


def numbers(tensor: Any) -> np.ndarray:
    """Return a tensor of either library on the CPU, in float64."""
    tensor = tensor.detach()
    double = tensor.double() if isinstance(tensor, torch.Tensor) else tensor.to("float64")
    return np.array(double.cpu().numpy())


def flat(tensors: dict[str, Any]) -> np.ndarray:
    return np.concatenate([numbers(tensor).ravel() for tensor in tensors.values()])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Return how far apart two arrays are, as a share of the length of the second."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def assert_as_close(ours: Results, theirs: Results, exact: Results, precision: str) -> None:
    """Check that our errors are within a few times PyTorch's."""
    logits, gradients, each, statistics, moved = FLOORS[precision]
    floors = {"logits": logits, "gradients": gradients, "statistics": statistics, "moved": moved}
    for name, floor in floors.items():
        mine, usual = (distance(found[name], exact[name]) for found in (ours, theirs))
        assert mine <= max(TIMES * usual, floor), f"{name}: {mine:.2e}, PyTorch {usual:.2e}"
    for name, expected in exact["each"].items():
        mine, usual = (distance(found["each"][name], expected) for found in (ours, theirs))
        assert mine <= max(2 * TIMES * usual, each), f"{name}: {mine:.2e}, PyTorch {usual:.2e}"


def set_precision(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    tf32 = precision == "tf32"
    monkeypatch.setattr(settings.cuda, "conv_tf32", tf32)
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "high" if tf32 else "highest")


@pytest.fixture(scope="module")
def exact(initial: Any) -> dict[bool, Results]:
    """Give PyTorch's training in float64, with statistics of the batch and with running ones."""
    data = batches(16, 96)
    return {mode: train_theirs(initial, data, "float64", mode) for mode in (True, False)}


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_five_steps_are_as_close_to_float64_as_pytorch_s(
    initial: Any, exact: Any, precision: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_precision(monkeypatch, precision)
    data = batches(16, 96)
    theirs = train_theirs(initial, data, precision, training)
    ours = train_ours(initial, data, precision, training)
    assert_as_close(ours, theirs, exact[training], precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_logits_of_whole_images_are_as_close_to_float64_as_pytorch_s(
    initial: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_precision(monkeypatch, precision)
    images = np.random.default_rng(2).standard_normal((32, 3, 224, 224), np.float32)
    theirs = resnet(18)
    theirs.load_state_dict(initial)
    theirs.to("cuda").eval()
    x = torch.tensor(images, device="cuda")
    with torch.no_grad():
        with torch_precision(precision) as autocast, autocast:
            usual = numbers(theirs(x))
        exact = numbers(theirs.double()(x.double()))
    ours = models.resnet18()
    ours.load_state_dict({name: ge.asarray(t.numpy()) for name, t in initial.items()})
    ours.to("cuda").eval()
    low = precision in _LOW
    with ge.no_grad(), ge.autocast("cuda", precision if low else "bfloat16", enabled=low):
        found = numbers(ours(ge.asarray(images, device="cuda")))
    allowed = max(TIMES * distance(usual, exact), FLOORS[precision][0])
    assert distance(found, exact) <= allowed
