"""Pooling beside the table: ties, labels, what is kept, messages."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine.ops.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d


def tensor(*shape, requires_grad=True):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return ge.tensor(array, device="cpu", requires_grad=requires_grad)


def test_the_first_of_equal_pixels_gets_the_gradient():
    x = ge.tensor(np.zeros((1, 1, 2, 4)), device="cpu", requires_grad=True)
    max_pool2d(x, 2).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy()[0, 0], [[1, 0, 1, 0], [0, 0, 0, 0]])


def test_max_pool_keeps_the_indices_only():
    x = tensor(2, 3, 4, 4)
    node = max_pool2d(x, 2).grad_fn
    assert node.name() == "MaxPool2DWithIndicesBackward0"
    (edge,) = node.edges
    arrays = [value for value in edge[2] if hasattr(value, "dtype")]
    assert [array.dtype for array in arrays] == [np.int32]


def test_indices_are_int64_and_not_recorded():
    out, indices = max_pool2d(tensor(2, 3, 4, 4), 2, return_indices=True)
    assert out.grad_fn.name() == "MaxPool2DWithIndicesBackward0"
    assert indices.dtype == np.int64
    assert not indices.requires_grad
    _, unbatched = max_pool2d(tensor(3, 4, 4), 2, return_indices=True)
    assert unbatched.shape == (3, 2, 2)


def test_labels_are_pytorchs():
    x = tensor(2, 3, 4, 4)
    assert avg_pool2d(x, 2).grad_fn.name() == "AvgPool2DBackward0"
    assert adaptive_avg_pool2d(x, 1).grad_fn.name() == "MeanBackward1"
    assert adaptive_avg_pool2d(x, (2, 3)).grad_fn.name() == "AdaptiveAvgPool2DBackward0"


def test_averages_keep_no_array():
    for function in (avg_pool2d, adaptive_avg_pool2d):
        (edge,) = function(tensor(2, 3, 4, 4), 2).grad_fn.edges
        assert not any(isinstance(value, ge.Tensor | np.ndarray) for value in edge[2])


def test_nan_reaches_its_own_windows_only():
    x = np.ones((1, 1, 5, 5))
    x[0, 0, 0, 0] = np.nan
    assert np.isnan(adaptive_avg_pool2d(x, 3)).sum() == 1


def test_results_are_channels_last():
    x = tensor(2, 3, 6, 7)
    for out in (max_pool2d(x, 2), avg_pool2d(x, 2), adaptive_avg_pool2d(x, 4)):
        assert out.array.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("function", [max_pool2d, avg_pool2d])
def test_shapes_are_checked(function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: padding must be at most half"):
        function(tensor(1, 1, 4, 4), 2, padding=2)
    with pytest.raises(ValueError, match=rf"{name}: x must have four dim.*got x\.shape=\(4, 4\)"):
        function(tensor(4, 4), 2)


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 4), 1), ((1, 1, 4, 4), 0), ((1, 1, 4, 4), (1, 2, 3))]
)
def test_adaptive_pool_checks_its_arguments(shape, size):
    with pytest.raises(ValueError, match=r"adaptive_avg_pool2d: .*got x\.shape=.*output_size="):
        adaptive_avg_pool2d(tensor(*shape), size)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (1, 5, 1, 1), (3, 70, 2, 9)])
def test_one_average_of_each_plane_is_its_mean(shape, dtype):
    x = tensor(*shape).detach().to(dtype).requires_grad_()
    out = adaptive_avg_pool2d(x, 1)
    assert (out.dtype, out.grad_fn.name()) == (dtype, "MeanBackward1")
    expected = x.detach().numpy().astype(np.float64).mean((2, 3), keepdims=True)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=2 * np.finfo(dtype).eps)
    grad = tensor(*shape[:2], 1, 1).detach().to(dtype)
    out.backward(grad)
    share, eps = grad.numpy() / dtype(shape[2] * shape[3]), np.finfo(dtype).eps
    np.testing.assert_allclose(x.grad.numpy(), np.broadcast_to(share, shape), rtol=2 * eps)
    assert tuple(adaptive_avg_pool2d(tensor(0, 3, 4, 4), 1).shape) == (0, 3, 1, 1)
