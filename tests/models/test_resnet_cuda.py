"""A whole training step on the CUDA kernels: emulated without a GPU, and the real thing on one.

Each is held to float64 on the CPU and to the CPU's kernels: logits, loss, gradients, running statistics,
and parameters after steps of SGD. Comparisons with PyTorch on the same GPU are in
test_resnet_cuda_pytorch.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from benchmarks.gpu_profile import timed_launches
from gradengine import nn
from gradengine.examples import finetune, tutorial
from gradengine.kernels import settings
from gradengine.models.resnet import BasicBlock, resnet18
from gradengine.nn import functional as F

Results = dict[str, np.ndarray]
Data = list[tuple[np.ndarray, np.ndarray]]


class SmallResNet(nn.Module):
    """A stem and two blocks, the second of which halves the image, for images of 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = BasicBlock(16, 16)
        halving = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.layer2 = BasicBlock(16, 32, 2, halving)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        x = self.maxpool(nn.conv_norm(x, self.conv1, self.bn1, activation=self.relu))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


def small(dtype: str = "float32") -> Any:
    ge.manual_seed(5)
    return SmallResNet().to(dtype=dtype)


def large(dtype: str = "float32") -> Any:
    """Return a ResNet-18 whose blocks add little to their shortcuts, as trained ones do.

    With its usual first weights, the rounding errors of gradients would double with each block.
    """
    ge.manual_seed(5)
    model = resnet18(num_classes=100)
    with ge.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                parameter.fill_(0.2)
    return model.to(dtype=dtype)


def batches(count: int, images: int, pixels: int, classes: int) -> Data:
    random = np.random.default_rng(3)
    shape = (images, 3, pixels, pixels)
    return [
        (random.standard_normal(shape, np.float32), random.integers(0, classes, images))
        for _ in range(count)
    ]


def train(
    model: Any,
    data: Data,
    device: str = "cpu",
    precision: Callable[[], Any] = nullcontext,
    scaler: Any = None,
    lr: float = 1e-2,
) -> Results:
    """Return the first step's logits, loss, gradients and statistics, and all parameters at the end."""
    model.to(device)
    optimizer = ge.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    scaler = scaler or ge.amp.GradScaler(enabled=False)
    dtype = model.fc.weight.dtype
    found: Results = {}
    for images, labels in data:
        optimizer.zero_grad()
        with precision():
            logits = model(ge.asarray(images.astype(dtype), device=device))
            loss = F.cross_entropy(logits, ge.asarray(labels, device=device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not found:
            found |= {"logits": numbers(logits), "loss": numbers(loss)}
            found |= {f"grad of {name}": numbers(p.grad) for name, p in model.named_parameters()}
            found |= {name: numbers(b) for name, b in model.named_buffers() if "running" in name}
        scaler.step(optimizer)
        scaler.update()
    return found | {f"after: {name}": numbers(p) for name, p in model.named_parameters()}


def numbers(tensor: Any) -> np.ndarray:
    """Return a tensor's values on the CPU, in float64."""
    return tensor.detach().cpu().numpy().astype(np.float64)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Return how far apart two arrays are, as a share of the length of the second."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def kind_of(name: str) -> str:
    return next((kind for kind in ("grad", "running", "after") if kind in name), "logits")


def gradients(results: Results) -> np.ndarray:
    """Return all gradients in one array."""
    found = [array.ravel() for name, array in results.items() if kind_of(name) == "grad"]
    return np.concatenate(found)


def assert_close(found: Results, expected: Results, grads: float, **tolerances: float) -> None:
    """Check each array to the tolerance of its kind, and all gradients together to `grads`.

    A rounded product may turn a rectifier on or off, which a small gradient shows much more.
    Biases of batch norms begin at 0, so that afterwards they are all change.
    """
    assert found.keys() == expected.keys()
    far = distance(gradients(found), gradients(expected))
    assert far <= grads, f"gradients: {far:.2e}, at most {grads}"
    for name, array in expected.items():
        far, most = distance(found[name], array), tolerances[kind_of(name)]
        assert far <= most, f"{name}: {far:.2e}, at most {most}"


def assert_same_bits(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


EXACT = {"grads": 2e-6, "logits": 1e-6, "grad": 5e-6, "running": 1e-6, "after": 5e-6}
TF32 = {"grads": 0.05, "logits": 1e-3, "grad": 0.15, "running": 1.5e-3, "after": 0.2}
LOW = {"grads": 0.15, "logits": 1.2e-2, "grad": 0.25, "running": 0.012, "after": 0.25}
HALF = {"grads": 0.06, "logits": 1.5e-3, "grad": 0.15, "running": 1.5e-3, "after": 0.2}


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no float32 product round its factors."""
    monkeypatch.setattr(settings.cuda, "conv_tf32", False)
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "highest")


@pytest.fixture
def tf32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all float32 products round their factors to TF32."""
    monkeypatch.setattr(settings.cuda, "conv_tf32", True)
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "high")


# ---- without a GPU -------------------------------------------------------------------------------

SMALL_DATA = batches(3, 4, 32, 10)
LARGE_DATA = batches(1, 2, 48, 100)


@pytest.fixture(scope="module")
def exact() -> Results:
    """Give the small network's training in float64, by the CPU's kernels."""
    return train(small("float64"), SMALL_DATA)


@pytest.fixture(scope="module")
def on_the_cpu() -> Results:
    """Give it in float32, by the CPU's kernels."""
    return train(small(), SMALL_DATA)


@pytest.fixture(scope="module")
def exact_resnet18() -> Results:
    """Give a step of ResNet-18 in float64, by the CPU's kernels."""
    return train(large("float64"), LARGE_DATA)


def test_emulated_training_agrees_in_float32(exact, on_the_cpu, exact_products, emulated_cuda):
    found = train(small(), SMALL_DATA)
    assert_close(found, exact, **EXACT)
    # The CPU's Winograd convolution is a little further away itself.
    assert_close(found, on_the_cpu, **{name: 5 * most for name, most in EXACT.items()})


def test_emulated_training_agrees_in_tf32(exact, tf32_products, emulated_cuda):
    found = train(small(), SMALL_DATA)
    assert_close(found, exact, **TF32)
    # That it did round: exact products are a hundred times closer.
    assert distance(found["logits"], exact["logits"]) > 2e-5


@pytest.mark.parametrize(("dtype", "tolerances"), [("bfloat16", LOW), ("float16", HALF)])
def test_emulated_training_agrees_in_mixed_precision(dtype, tolerances, exact, emulated_cuda):
    pytest.importorskip("ml_dtypes")
    scaler = ge.amp.GradScaler(init_scale=256.0, enabled=dtype == "float16")
    found = train(small(), SMALL_DATA, "cpu", lambda: ge.autocast("cuda", dtype=dtype), scaler)
    assert_close(found, exact, **tolerances)
    assert distance(found["logits"], exact["logits"]) > 2e-5


def test_emulated_training_is_the_same_bits_twice(emulated_cuda):
    first, second = (train(small(), SMALL_DATA[:2]) for _ in range(2))
    assert_same_bits(first, second)


def test_every_part_of_a_step_runs_on_the_cuda_kernels(emulated_cuda):
    with timed_launches(lambda: None) as launches:
        train(small(), SMALL_DATA[:1])
    names = " ".join(launch.name for launch in launches)
    for part in ("conv2d_forward", "grad_input", "grad_weight", "batch_norm", "max_pool", "sgd"):
        assert part in names, part


def test_an_emulated_step_of_resnet18_agrees(exact_resnet18, tf32_products, emulated_cuda):
    loose = {"grads": 0.12, "logits": 2.5e-3, "grad": 0.25, "running": 2.5e-3, "after": 0.25}
    assert_close(train(large(), LARGE_DATA), exact_resnet18, **loose)


# ---- on a GPU ------------------------------------------------------------------------------------

GPU_DATA = batches(3, 8, 64, 100)
LR = 1e-3


@pytest.fixture(scope="module")
def exact_on_the_cpu() -> Results:
    """Give ResNet-18's training in float64, by the CPU's kernels."""
    return train(large("float64"), GPU_DATA, lr=LR)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
def test_resnet18_on_a_gpu_agrees_with_the_cpu_in_float32(exact_on_the_cpu):
    found = train(large(), GPU_DATA, "cuda", lr=LR)
    # A rectifier on the other side of zero moves its gradient by more than all rounding.
    loose = {"grads": 5e-3, "grad": 2e-2, "logits": 5e-6, "running": 5e-6, "after": 2e-2}
    assert_close(found, exact_on_the_cpu, **loose)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32_products")
def test_resnet18_on_a_gpu_agrees_with_the_cpu_in_tf32(exact_on_the_cpu):
    found = train(large(), GPU_DATA, "cuda", lr=LR)
    # An H200's gradients are 0.052 away. On the CPU, factors rounded to the nearest TF32 give 0.039, and
    # logits 0.00098 away.
    loose = TF32 | {"grads": 0.08, "logits": 2e-3}
    assert_close(found, exact_on_the_cpu, **loose)
    assert distance(found["logits"], exact_on_the_cpu["logits"]) > 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resnet18_on_a_gpu_agrees_with_the_cpu_in_mixed_precision(dtype, exact_on_the_cpu):
    scaler = ge.amp.GradScaler(init_scale=1024.0, enabled=dtype == "float16")
    precision = lambda: ge.autocast("cuda", dtype=dtype)  # noqa: E731
    found = train(large(), GPU_DATA, "cuda", precision, scaler, lr=LR)
    # PyTorch's own gradients in bfloat16 are 0.17 away on this network.
    loose = {"grads": 0.35, "grad": 0.6, "logits": 3e-2, "running": 0.03, "after": 0.6}
    assert_close(found, exact_on_the_cpu, **loose)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [False, True], ids=["tf32", "bfloat16"])
def test_training_on_a_gpu_is_the_same_bits_twice(mixed):
    precision = (lambda: ge.autocast("cuda", dtype="bfloat16")) if mixed else nullcontext
    first, second = (train(large(), GPU_DATA, "cuda", precision) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [False, True], ids=["tf32", "bfloat16"])
def test_captured_steps_on_a_gpu_train_to_the_same_bits(mixed, monkeypatch):
    monkeypatch.setattr(
        settings.cuda, "own_matmul", True
    )  # no graph can hold cuBLAS, which rounds otherwise
    data = [
        tuple(ge.asarray(array, device="cuda") for array in batch)
        for batch in batches(6, 8, 64, 100)
    ]
    precision = (lambda: ge.autocast("cuda", dtype="bfloat16")) if mixed else nullcontext
    results = []
    for captured in (False, True):
        model = large().to("cuda")
        step = training_step(model, precision)
        step = ge.cuda.graph(step) if captured else step
        found = {f"loss {number}": numbers(step(*batch)) for number, batch in enumerate(data)}
        results.append(found | {name: numbers(t) for name, t in model.state_dict().items()})
    assert_same_bits(*results)


def training_step(model: Any, precision: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    optimizer = ge.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)

    def step(images: Any, labels: Any) -> Any:
        optimizer.zero_grad()
        with precision():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
def test_a_new_head_on_a_frozen_network_trains_as_on_the_cpu():
    images, labels = GPU_DATA[0]
    results = []
    for device in ("cpu", "cuda"):
        model = large().freeze()
        ge.manual_seed(6)
        model.fc = nn.Linear(512, 100)
        model.to(device)
        before = {name: numbers(tensor) for name, tensor in model.state_dict().items()}
        optimizer = ge.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)
        x, y = ge.asarray(images, device=device), ge.asarray(labels, device=device)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        after = {name: numbers(tensor) for name, tensor in model.state_dict().items()}
        moved = [name for name in after if not np.array_equal(after[name], before[name])]
        assert moved == ["fc.weight", "fc.bias"]
        assert losses[-1] < losses[0]
        results.append((losses, after["fc.weight"]))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)
    assert distance(results[1][1], results[0][1]) < 1e-4


@pytest.fixture
def _default_device_is_put_back():
    yield
    ge.set_default_device("cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("_default_device_is_put_back")
def test_the_example_on_a_gpu_ends_near_the_accuracy_of_the_cpu(tmp_path: Path, capsys):
    accuracies = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        assert finetune.main(["--device", device, "--epochs", "2", "--out", str(out)]) == 0
        history = json.loads((out / "history.json").read_text())
        accuracies[device] = [entry["accuracy"] for entry in history]
    capsys.readouterr()
    assert accuracies["cpu"][-1] > 0.8
    assert abs(accuracies["cuda"][-1] - accuracies["cpu"][-1]) < 0.04


@pytest.mark.gpu
@pytest.mark.usefixtures("_default_device_is_put_back")
def test_the_tutorial_prints_the_same_facts_on_a_gpu(capsys):
    printed = []
    for device in ("cpu", "cuda"):
        ge.set_default_device(device)
        tutorial.main()
        printed.append(capsys.readouterr().out.splitlines())
    cpu, gpu = printed
    assert len(cpu) == len(gpu)
    for ours, theirs in zip(gpu, cpu, strict=True):
        if "loss:" not in ours:  # a number of many digits
            assert ours.replace(", device='cuda:0'", "") == theirs
