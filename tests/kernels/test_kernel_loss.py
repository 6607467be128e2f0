"""Softmax cross entropy against its definition in float64."""

import numpy as np
import pytest

from gradengine import kernels
from tests.kernels.memory import assert_close


def by_definition(x, target):
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    share = powers / powers.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    losses = np.log(powers.sum(axis=1)) - shifted[rows, target]
    share[rows, target] -= 1
    return losses, share


# Classes around the lengths that vectors, strips and chunks of rows have.
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (17, 2), (8, 7), (9, 8), (3, 65), (2, 255), (2, 256), (5, 1000)]
)
def test_matches_its_definition(shape, dtype, place, rng):
    x = (rng.standard_normal(shape) * 20 - 300).astype(dtype)
    target = rng.integers(0, shape[1], shape[0])
    losses, share = by_definition(x, target)
    found, shifts = place("softmax_cross_entropy", x, target)
    assert_close(found, losses, dtype)
    grad = rng.standard_normal(shape[0]).astype(dtype)
    by_x = place("softmax_cross_entropy_grad", grad, x, target, shifts)
    assert_close(by_x, share * grad[:, None], dtype)


def test_float32_powers_are_exact_over_their_whole_range(rng):
    difference = np.concatenate([np.linspace(-110, 0, 20001), -(np.float64(2.0) ** -np.arange(40))])
    x = np.stack([difference, np.zeros_like(difference)], axis=1).astype(np.float32)
    target = np.ones(len(x), np.int64)
    _, shifts = kernels.softmax_cross_entropy(x, target)
    ones = np.ones(len(x), np.float32)
    found = kernels.softmax_cross_entropy_grad(ones, x, target, shifts)[:, 0]
    exponent = (x[:, 0] - shifts[:, 0]) - shifts[:, 1]
    np.testing.assert_allclose(found, np.exp(exponent.astype(np.float64)), rtol=2e-7, atol=2e-38)


def test_arrays_that_do_not_fit_are_refused():
    x, target = np.zeros((3, 4)), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="softmax_cross_entropy: target must"):
        kernels.softmax_cross_entropy(x, target)
    with pytest.raises(ValueError, match="softmax_cross_entropy_grad: shifts must"):
        kernels.softmax_cross_entropy_grad(x[:, 0], x, np.zeros(3, np.int64), x)
