"""The ledger of backward's memory adds up, and what it says a checkpoint would save is what one saves."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import checkpoint, memory

HERE = "test_memory.py"


def line() -> int:
    return sys._getframe(1).f_lineno


def test_what_is_saved_counts_once_with_its_line() -> None:
    x = ge.ones(1000, dtype=ge.float64, requires_grad=True)
    with memory() as m:
        y = x.exp()  # saves its result
        first = line() - 1
        z = y.sin() + y[10:].sum()  # saves y, which is counted
        w = z * y
        second = line() - 1
    assert w.requires_grad
    assert m.total == 16000  # y and z; x is a leaf
    assert [(s.bytes, s.shape, s.dtype, s.operation) for s in m.saved] == [
        (8000, (1000,), "float64", "ExpBackward0"),
        (8000, (1000,), "float64", "MulBackward0"),
    ]
    assert [s.line.rpartition(HERE)[2] for s in m.saved] == [f":{first}", f":{second}"]
    assert list(m.by("operation").values()) == [8000, 8000]


def test_what_is_freed_does_not_count() -> None:
    x = ge.ones(1000, requires_grad=True)
    with memory() as m:
        x.exp().sin()
        y = x.sin()
    assert m.total == 0  # sin saved the leaf alone
    assert y.requires_grad
    assert "0 B" in m.table()


def test_the_account_is_taken_before_backward_frees() -> None:
    x = ge.ones(1000, requires_grad=True)
    with memory() as m:
        x.exp().sum().backward()
        x.sum().backward()
    assert m.total == 4000


@pytest.mark.parametrize(
    "build", [lambda x: x.exp(), lambda x: x @ x.T, lambda x: ge.softmax(x, 0)]
)
def test_operations_of_every_kind_are_seen(build: Any) -> None:
    x = ge.ones(10, 10, requires_grad=True)
    with memory() as m:
        out = build(x * 1)
    assert out.requires_grad
    assert m.total >= 400


def model_and_images() -> tuple[Any, Any]:
    ge.manual_seed(0)
    return ge.models.resnet18(num_classes=10), ge.randn(2, 3, 32, 32)


def test_modules_are_named_even_in_fused_layers() -> None:
    model, images = model_and_images()
    with memory() as m:
        loss = model(images).sum()
    assert loss.requires_grad
    sums = m.by("module")
    assert {"ResNet.conv1", "ResNet.bn1", "ResNet.layer1.0.bn2", "ResNet.fc"} <= sums.keys()
    assert sum(sums.values()) == m.total == sum(m.by("line").values())
    assert len(m.by("line")) == 1
    text = m.table(rows=3)
    assert text.splitlines()[0].endswith("kept for backward")
    assert "ResNet.bn1" in text
    assert "less with checkpoint(ResNet.layer1, ...)" in text
    assert str(m) == m.table()
    with pytest.raises(ValueError, match='by must be "module", "line" or "operation"'):
        m.table("file")


@pytest.mark.parametrize("name", ["layer1", "layer2", "layer4", "layer3.1", "conv1", "fc"])
def test_checkpoints_save_what_is_foretold(name: str) -> None:
    model, images = model_and_images()
    with memory() as before:
        loss = model(images).sum()
    rows = {row.module: row for row in before.checkpoints()}
    if name in ("conv1", "fc"):  # keep what a checkpoint would
        assert f"ResNet.{name}" not in rows
        return
    foretold = rows[f"ResNet.{name}"]
    del loss

    block = model.get_submodule(name)
    plain = block.forward
    block.__dict__["forward"] = lambda x: checkpoint(plain, x)
    with memory() as after:
        loss = model(images).sum()
    assert loss.requires_grad
    assert before.total - after.total == foretold.bytes
    assert foretold.share == pytest.approx(foretold.bytes / before.total)


def test_an_input_that_nobody_else_keeps_is_the_checkpoints_price() -> None:
    class Twice(ge.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.sin().exp().exp()  # keeps x, and two results, one of which is returned

    module = Twice()
    x = ge.ones(1000, requires_grad=True)
    with memory() as m:
        y = module(x + 1)
    assert y.requires_grad
    (row,) = m.checkpoints()
    assert m.total == 12000  # x + 1, and both results of exp
    assert row.bytes == 8000
    with memory() as m:
        y = checkpoint(module, x + 1)
    assert y.requires_grad
    assert m.total == 4000


def test_frozen_layers_keep_nothing() -> None:
    model, images = model_and_images()
    model.freeze()
    model.fc = ge.nn.Linear(512, 10)
    with memory() as m:
        loss = model(images).sum()
    assert loss.requires_grad
    assert set(m.by("module")) == {"ResNet.fc"}
    assert m.total == 2 * 512 * 4


def test_masks_and_other_plain_arrays_count() -> None:
    x = ge.ones(1000, requires_grad=True)
    with memory() as m:
        y = ge.where(ge.tensor(np.arange(1000) % 2 == 0), x, 0.0)
    assert y.requires_grad
    assert m.total == 1000


def test_nothing_is_watched_afterwards() -> None:
    before = sys.getprofile()
    with memory(), pytest.raises(ZeroDivisionError), memory():
        raise ZeroDivisionError
    assert sys.getprofile() is before
