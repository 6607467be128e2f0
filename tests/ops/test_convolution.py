"""Convolution beside the table: messages, labels, what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.ops.convolution import conv1d, conv2d


def tensor(*shape, requires_grad=False):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return ge.tensor(array, device="cpu", requires_grad=requires_grad)


def test_channels_must_agree():
    message = (
        r"conv2d: x and weight must agree on input channels .*"
        r"got x\.shape=\(8, 3, 4, 4\), weight\.shape=\(6, 4, 3, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        conv2d(tensor(8, 3, 4, 4), tensor(6, 4, 3, 3))


def test_bias_must_fit():
    with pytest.raises(ValueError, match=r"conv2d: bias must have the shape .*bias\.shape=\(5,\)"):
        conv2d(tensor(1, 3, 4, 4), tensor(6, 3, 3, 3), tensor(5))


def test_conv1d_checks_ranks():
    with pytest.raises(
        ValueError, match=r"conv1d: .*weight\.ndim == 3.*got x.shape=\(1, 2, 3, 4\)"
    ):
        conv1d(tensor(1, 2, 3, 4), tensor(1, 2, 3))


@pytest.mark.parametrize(
    "dtypes", [("f4", "f8"), ("f2", "f2"), ("i8", "i8"), ("f4", "f4", "f8")], ids=str
)
def test_dtypes_are_checked(dtypes):
    shapes = ((1, 2, 3, 3), (2, 2, 2, 2), (2,))
    arrays: list[Any] = [
        np.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    with pytest.raises(
        TypeError, match=r"conv2d: arrays must be of one dtype \(float32 or float64"
    ):
        conv2d(*arrays)


def test_frozen_inputs_keep_nothing_for_themselves():
    x, weight, bias = tensor(1, 2, 4, 4), tensor(3, 2, 3, 3), tensor(3, requires_grad=True)
    node = conv2d(x, weight, bias).grad_fn
    assert node.name() == "ConvolutionBackward0"
    assert [edge and edge[2] for edge in node.edges] == [None, None, ()]
    x.requires_grad_()
    kept = conv2d(x, weight, bias).grad_fn.edges[0][2]
    assert any(value is weight for value in kept)
    assert not any(value is x for value in kept)


def test_results_are_channels_last():
    x, weight = tensor(2, 3, 5, 6, requires_grad=True), tensor(4, 3, 3, 3, requires_grad=True)
    out = conv2d(x, weight, padding=1)
    assert out.array.transpose(0, 2, 3, 1).flags.c_contiguous
    out.sum().backward()
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_empty_batch():
    x, weight = tensor(0, 3, 5, 6, requires_grad=True), tensor(4, 3, 3, 3, requires_grad=True)
    out = conv2d(x, weight, tensor(4))
    assert out.shape == (0, 4, 3, 4)
    out.sum().backward()
    assert not weight.grad.numpy().any()


def test_third_derivative_is_recorded():
    x = ge.tensor(np.ones((1, 1, 3, 3)), device="cpu", requires_grad=True)
    weight = ge.tensor(np.full((1, 1, 2, 2), 0.5), device="cpu", requires_grad=True)
    cube = (conv2d(x, weight) ** 3).sum()
    (first,) = ge.autograd.grad(cube, [x], create_graph=True)
    (second,) = ge.autograd.grad(first.sum(), [x], create_graph=True)
    (third,) = ge.autograd.grad(second.sum(), [x])
    # Each output is the sum s of four halves: d3(s**3) along ones is 6 * 2**3 * 0.5 / 2 a tap.
    taps = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    np.testing.assert_allclose(third.numpy()[0, 0], taps * 6 * 2 * 2 * 0.5)


def test_a_convolution_adds_its_share_to_the_gradient_there_is(monkeypatch):
    """As in a residual block, whose input's gradient comes from the shortcut first."""
    x = ge.randn(2, 3, 6, 5, dtype=ge.float64, requires_grad=True)
    weight = ge.randn(3, 3, 3, 3, dtype=ge.float64)
    (expected,) = ge.autograd.grad(ge.conv2d(x, weight, padding=1).sum(), x)
    given = []
    kernel = kernels.conv2d_grad_input

    def spy(grad, weight, geometry, onto=None):
        given.append(onto is not None)
        return kernel(grad, weight, geometry, onto)

    monkeypatch.setattr(kernels, "conv2d_grad_input", spy)
    y = ge.conv2d(x, weight, padding=1)
    (y + 2 * x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), expected.numpy() + 2)
    x.grad = None
    shortcut = 2 * x
    (ge.conv2d(x, weight, padding=1) + shortcut).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), expected.numpy() + 2)
    assert given == [True, False]  # the newest operation is walked first
