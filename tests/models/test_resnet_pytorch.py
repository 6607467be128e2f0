"""ResNet-18 beside the same network in PyTorch, from one weight file: results, gradients, training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as F
from gradengine import models, optim

torch = pytest.importorskip("torch")

from tests.models.torch_resnet import resnet  # noqa: E402 - it skips without torch


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Give PyTorch's model, with statistics of real batches, and the file of its weights."""
    torch.manual_seed(0)
    model = resnet(18)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.fixture
def pair(reference):
    """Give PyTorch's model, and ours as loaded from its file."""
    model, path = reference
    return copy.deepcopy(model), models.resnet18(weights=path)


def batch(count, size, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((count, 3, size, size), dtype=np.float32)
    return images, generator.integers(0, 1000, count)


def relative(ours, theirs):
    """Return the distance as a share of the length of `theirs`."""
    ours, theirs = ours.detach().array.astype(float), theirs.detach().double().numpy()
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)


def test_the_file_gives_every_tensor(pair):
    theirs, ours = pair
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert len(state) == 122
    for name, tensor in ours.state_dict().items():
        np.testing.assert_array_equal(tensor.array, state[name].numpy(), err_msg=name)
    assert ours.conv1.weight.requires_grad


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_structure_at_every_depth(depth):
    with torch.device("meta"):
        theirs = resnet(depth)
    ours = getattr(models, f"resnet{depth}")()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs).replace("affine=True, bias=True", "affine=True")


# In float32 a rectifier's input near 0 may round to the other side, in either of the two libraries: that
# turns one pixel's gradient on or off. In float64 that does not happen, and so all must agree closely.
GRADIENT_TOLERANCE = {"float32": 2e-2, "float64": 1e-10}
LOGIT_TOLERANCE = {"float32": 1e-4, "float64": 1e-11}


@pytest.mark.parametrize(
    ("count", "size", "training", "dtype"),
    [
        (2, 64, True, "float32"),
        (2, 64, False, "float32"),
        (2, 64, True, "float64"),
        (2, 64, False, "float64"),
        (1, 224, True, "float64"),
        (2, 224, False, "float32"),
    ],
)
def test_logits_gradients_and_statistics(pair, count, size, training, dtype):
    theirs, ours = pair
    theirs.to(getattr(torch, dtype)).train(training)
    ours.to(dtype).train(training)
    images, labels = batch(count, size)
    x = ge.tensor(images.astype(dtype), requires_grad=True)
    x_theirs = torch.tensor(images.astype(dtype), requires_grad=True)
    logits, logits_theirs = ours(x), theirs(x_theirs)
    difference = abs(logits.detach().array - logits_theirs.detach().numpy()).max()
    assert difference < LOGIT_TOLERANCE[dtype]
    F.cross_entropy(logits, ge.tensor(labels)).backward()
    torch.nn.functional.cross_entropy(logits_theirs, torch.tensor(labels)).backward()
    parameters = dict(theirs.named_parameters())
    found = {name: relative(p.grad, parameters[name].grad) for name, p in ours.named_parameters()}
    found["x"] = relative(x.grad, x_theirs.grad)
    assert max(found.values()) < GRADIENT_TOLERANCE[dtype], max(found, key=found.__getitem__)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert relative(buffer, buffers[name]) < 1e-5, name


@pytest.mark.parametrize("training", [True, False])
def test_five_steps_of_sgd(pair, training):
    theirs, ours = (model.double().train(training) for model in pair)
    options: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}
    optimizer = optim.SGD(ours.parameters(), **options)
    optimizer_theirs = torch.optim.SGD(theirs.parameters(), **options)
    for step in range(5):
        images, labels = batch(2, 64, step)
        images = images.astype(float)
        optimizer.zero_grad()
        F.cross_entropy(ours(ge.tensor(images)), ge.tensor(labels)).backward()
        optimizer.step()
        optimizer_theirs.zero_grad()
        logits = theirs(torch.tensor(images))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        optimizer_theirs.step()
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert relative(tensor, state[name]) < 1e-8, name


def test_trained_weights_go_back_to_pytorch(pair, tmp_path):
    theirs, ours = pair
    ge.save(ours.state_dict(), tmp_path / "ours.pth")
    fresh = resnet(18)
    fresh.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    images, _ = batch(1, 64)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(images))
        assert torch.equal(fresh.eval()(torch.tensor(images)), expected)
