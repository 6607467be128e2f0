"""Training is the same in either form of the convolution, and so is inference with folded weights."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as F
from gradengine import kernels, models, optim
from gradengine.kernels.cpu import conv2d, winograd

STEPS = 15
CLASSES = 4


@pytest.fixture
def chosen(monkeypatch):
    """Give the algorithms that convolutions used since the list was last cleared."""
    found = []
    choose = conv2d._algorithm

    def noted(geometry, dtype):
        found.append(choose(geometry, dtype))
        return found[-1]

    monkeypatch.setattr(conv2d, "_algorithm", noted)
    return found


def trained(allowed: bool, monkeypatch) -> tuple[models.ResNet, list[float]]:
    """Train a new ResNet-18 for some steps; give it and its losses."""
    monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
    ge.manual_seed(0)
    model = models.resnet18(num_classes=CLASSES)
    optimizer = optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    images, labels = ge.randn(8, 3, 64, 64), ge.arange(8) % CLASSES
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_training_curves_agree(chosen, monkeypatch):
    _, with_winograd = trained(True, monkeypatch)
    assert winograd in chosen
    chosen.clear()
    _, without = trained(False, monkeypatch)
    assert winograd not in chosen
    assert with_winograd[-1] < 0.5 * with_winograd[0]
    assert with_winograd != without  # they were computed in different ways
    np.testing.assert_allclose(with_winograd[:2], without[:2], rtol=1e-3)
    # Training enlarges what roundings make: 0.017 at most, as measured
    np.testing.assert_allclose(with_winograd, without, rtol=4e-2)


def test_folded_weights_follow_the_setting(chosen, monkeypatch):
    ge.manual_seed(0)
    model = models.resnet18(num_classes=CLASSES).eval()
    images = ge.randn(4, 3, 64, 64)
    packed = []
    pack = kernels.pack_conv2d
    monkeypatch.setattr(kernels, "pack_conv2d", lambda *given: packed.append(given) or pack(*given))
    logits = {}
    with ge.no_grad():
        for allowed in (True, False):
            monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
            packed.clear()
            chosen.clear()
            logits[allowed] = model(images).array
            assert packed
            assert (winograd in chosen) == allowed
            packed.clear()
            np.testing.assert_array_equal(model(images).array, logits[allowed])
            assert not packed  # kept from the call before
        monkeypatch.setattr(ge.backends.cpu, "winograd", True)
        np.testing.assert_array_equal(model(images).array, logits[True])
    assert (logits[True] != logits[False]).any()
    scale = abs(logits[False]).max()
    np.testing.assert_allclose(logits[True], logits[False], rtol=0, atol=1e-4 * scale)
