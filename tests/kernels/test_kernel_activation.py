"""Gradients of activations against what they are by definition."""

import numpy as np
import pytest

from gradengine import kernels


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 4), (2, 3, 4, 5)])
def test_relu_grad_passes_where_relu_did(shape, dtype, place, rng):
    grad = np.asarray(rng.standard_normal(shape), dtype)
    out = np.asarray(np.maximum(rng.standard_normal(shape), 0), dtype)
    expected = np.where(out > 0, grad, 0)
    found = place("relu_grad", grad, out)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_relu_grad_of_special_values(place):
    grad = np.array([np.inf, np.nan, np.inf, 2.0])
    out = np.array([0.0, 0.0, np.nan, np.inf])
    np.testing.assert_array_equal(place("relu_grad", grad, out), [0.0, 0.0, np.inf, 2.0])


def test_relu_grad_keeps_channels_last(rng):
    out = rng.standard_normal((2, 4, 5, 3)).transpose(0, 3, 1, 2)
    grad = np.ones_like(out)
    assert kernels.relu_grad(grad, out).strides == out.strides
