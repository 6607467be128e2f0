"""The error function against the standard library."""

import numpy as np
import pytest

from gradengine import kernels
from tests.kernels import references as reference
from tests.kernels.memory import assert_close


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (2, 3, 4, 5), (2, 1, 3, 1, 2)])
def test_erf_matches_the_standard_library(shape, dtype, place, rng):
    x = (rng.standard_normal(shape) * 2).astype(dtype) if shape else np.array(0.5, dtype)
    out = place("erf", x)
    assert isinstance(out, np.ndarray)
    assert_close(out, reference.erf(x.astype(np.float64)), dtype)


def test_erf_of_special_values(place):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-300])
    out = place("erf", x)
    np.testing.assert_array_equal(out[:5], [0.0, -0.0, 1.0, -1.0, np.nan])
    np.testing.assert_array_equal(np.signbit(out[:2]), [False, True])
    assert 0 < out[5] < 2e-300


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf_is_exact_wherever_it_is_small(dtype, place):
    x = np.concatenate([np.linspace(-6, 6, 4001), np.logspace(-30, 0, 200), [0.927734375]])
    x = x.astype(dtype)
    expected = reference.erf(x.astype(np.float64))
    np.testing.assert_allclose(place("erf", x), expected, rtol=4 * np.finfo(dtype).eps)


def test_any_strides_keep_channels_last(rng):
    x = rng.standard_normal((2, 4, 5, 3)).transpose(0, 3, 1, 2)
    out = kernels.erf(x)
    assert out.strides == x.strides
    np.testing.assert_array_equal(out, reference.erf(x))
    np.testing.assert_array_equal(kernels.erf(x[:, :, ::-2]), reference.erf(x)[:, :, ::-2])
    broadcast = np.broadcast_to(x[:, :, :1, :1], x.shape)
    np.testing.assert_array_equal(kernels.erf(broadcast), reference.erf(broadcast))
