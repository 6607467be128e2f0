"""What layers promise beyond their functions: checks, counts, modes."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn
from gradengine.nn import functional as F


def test_functional_has_the_operations_under_pytorchs_path():
    assert F.__name__ == "gradengine.nn.functional"
    assert F.conv2d is ge.functional.conv2d


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm2d(3, device="cpu"), (2, 3), "BatchNorm2d: expected 4D input; got 2D input"),
        (nn.BatchNorm1d(3, device="cpu"), (2, 3, 4, 5), "expected 2D or 3D input; got 4D input"),
        (nn.BatchNorm1d(3, device="cpu"), (1, 3), "Expected more than 1 value per channel"),
    ],
)
def test_batch_norm_refuses_other_inputs(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(ge.ones(shape))
    assert layer.num_batches_tracked.item() == 0
    assert (layer.running_mean.array == 0).all()


def test_batch_norm_counts_and_forgets_batches():
    layer = nn.BatchNorm2d(2)
    layer(ge.randn(2, 2, 3, 3) + 4)
    layer(ge.randn(2, 2, 3, 3) + 4)
    assert layer.num_batches_tracked.item() == 2
    assert (layer.running_mean.array > 0.5).all()
    with ge.no_grad():
        layer.weight.fill_(3)
    layer.reset_running_stats()
    assert layer.num_batches_tracked.item() == 0
    assert (layer.running_mean.array == 0).all()
    assert (layer.running_var.array == 1).all()
    assert (layer.weight.array == 3).all()
    layer.reset_parameters()
    assert (layer.weight.array == 1).all()


def test_batch_norm_statistics_move_under_no_grad_too():
    layer = nn.BatchNorm1d(2)
    with ge.no_grad():
        layer(ge.randn(8, 2) + 1)
    assert layer.num_batches_tracked.item() == 1


def test_convolution_channels_must_be_divisible():
    with pytest.raises(
        ValueError,
        match="Conv2d: groups must divide both .*; got in_channels=3, out_channels=4, groups=2",
    ):
        nn.Conv2d(3, 4, 1, groups=2)


def test_dropout_is_active_in_training_only():
    ge.manual_seed(0)
    layer = nn.Dropout(0.25)
    x = ge.ones(10_000)
    kept = layer(x).array
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)}
    assert (kept == 0).mean() == pytest.approx(0.25, abs=0.02)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match=r"p must be a probability \(0 <= p <= 1\); got p=1.5"):
        nn.Dropout(1.5)


def test_relu_never_overwrites():
    x = ge.tensor([-1.0, 2.0])
    assert nn.ReLU(inplace=True)(x).tolist() == [0, 2]
    assert x.tolist() == [-1, 2]


def test_max_pool_gives_indices_if_asked():
    values, indices = nn.MaxPool2d(2, return_indices=True)(ge.arange(16.0).reshape(1, 1, 4, 4))
    assert values.tolist() == [[[[5, 7], [13, 15]]]]
    assert indices.tolist() == values.tolist()


def test_layers_take_dtype_and_device():
    for layer in (
        nn.Linear(2, 2, dtype="float64", device="cpu"),
        nn.Conv2d(2, 2, 1, dtype="float64", device="cpu"),
        nn.BatchNorm2d(2, dtype="float64", device="cpu"),
        nn.LayerNorm(2, dtype="float64", device="cpu"),
    ):
        assert all(parameter.dtype == ge.float64 for parameter in layer.parameters())
