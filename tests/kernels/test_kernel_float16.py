"""Half precision, on CUDA only: sums are taken in float32."""

import numpy as np
import pytest

from gradengine.kernels.cuda import conv2d, pooling
from gradengine.kernels.geometry import conv2d_geometry, pool2d_geometry
from tests.kernels import references as reference


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 4, 7, 6)).astype(np.float16)


def assert_half_close(got, expected):
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_convolution(x, rng):
    weight = rng.standard_normal((3, 4, 3, 3)).astype(np.float16)
    geometry = conv2d_geometry(x.shape, weight.shape, 2, 1)
    attributes = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = conv2d.conv2d(x, weight, None, geometry)
    assert_half_close(out, reference.conv2d(x, weight, None, *attributes))
    by_x, by_weight = reference.conv2d_gradients(out, x, weight, *attributes)
    assert_half_close(conv2d.conv2d_grad_input(out, weight, geometry), by_x)
    assert_half_close(conv2d.conv2d_grad_weight(out, x, geometry), by_weight)


def test_average_of_many_pixels():
    x = np.full((1, 1, 70, 70), 0.1, np.float16)
    geometry = pool2d_geometry("avg_pool2d", x.shape, 70)
    np.testing.assert_array_equal(pooling.avg_pool2d(x, geometry), x[:, :, :1, :1])


def test_gradients_of_overlapping_windows():
    x = np.zeros((1, 1, 65, 65), np.float16)
    average = pool2d_geometry("avg_pool2d", x.shape, 64, 1, divisor_override=10)
    ones = np.ones(average.output_shape, np.float16)
    by_x = pooling.avg_pool2d_grad(ones, average)
    assert by_x.dtype == np.float16
    np.testing.assert_allclose(by_x[0, 0, 32, 32], 0.4, rtol=1e-3)
    x[0, 0, 32, 32] = 1
    largest = pool2d_geometry("max_pool2d", x.shape, 33)
    out, indices = pooling.max_pool2d(x, largest)
    by_x = pooling.max_pool2d_scatter(out, indices, largest)
    assert by_x.dtype == np.float16
    np.testing.assert_array_equal(by_x, x)
