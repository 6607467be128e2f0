"""Gradients of activations against what they are by definition."""

import numpy as np
import pytest

from gradengine import kernels
from tests.kernels.memory import MEMORIES, laid_out


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 4, 5)])
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


# Arrays that all cores share: their length is no multiple of a piece, and few are left over.
LONG = (3, 5, 70, 71)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_long_arrays_keep_their_layout(dtype, memory, place, rng):
    assert np.prod(LONG) > kernels.PARALLEL_SIZE
    x, grad = (laid_out(rng.standard_normal(LONG).astype(dtype), memory) for _ in range(2))
    out = np.where(x > 0, x, 0)
    by_x = place("relu_grad", grad, laid_out(out, memory))
    np.testing.assert_array_equal(by_x, np.where(x > 0, grad, 0))
    if place.name == "cpu" and memory in ("nchw", "nhwc"):
        assert by_x.strides == grad.strides


def test_long_arrays_of_unlike_layout(place, rng):
    grad, out = rng.standard_normal((2, *LONG))
    out = np.maximum(out, 0)
    expected = np.where(out > 0, grad, 0)
    np.testing.assert_array_equal(place("relu_grad", grad, laid_out(out, "nhwc")), expected)
    np.testing.assert_array_equal(place("relu_grad", laid_out(grad, "nhwc"), out), expected)
    row = np.array(grad[0, 0, 0])
    found = place("relu_grad", np.broadcast_to(row, LONG), out)
    np.testing.assert_array_equal(found, np.where(out > 0, row, 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_of_special_values(dtype, place):
    x = np.tile(np.array([np.nan, -np.inf, np.inf, -0.0, -1.0, 1.0], dtype), kernels.PARALLEL_SIZE)
    expected = np.tile([np.nan, 0, np.inf, 0, 0, 1], kernels.PARALLEL_SIZE)
    x, expected = (x, expected) if place.name == "cpu" else (x[:2051], expected[:2051])
    np.testing.assert_array_equal(place.formula("relu", x), expected)


# packs, several blocks, no whole number of packs
@pytest.mark.parametrize("shape", [(40,), (2, 16, 13, 11), (5, 1027)])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_every_element_type(name, shape, cuda_place, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)
    x, grad = rng.standard_normal((2, *shape)).astype(dtype)
    x.reshape(-1)[[0, -1]] = np.nan, -np.inf
    out = cuda_place.formula("relu", x)
    assert out.dtype == dtype
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(out.astype(np.float64), np.where(wide < 0, 0, wide))
    by_x = cuda_place("relu_grad", grad, out)
    assert by_x.dtype == dtype
    np.testing.assert_array_equal(by_x, np.where(wide <= 0, np.zeros((), dtype), grad))
