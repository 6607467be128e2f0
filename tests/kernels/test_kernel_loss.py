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


def counted(place, target, weight, *arguments):
    found = kernels.class_scale(place.give(target), place.give(weight), *arguments)
    return tuple(map(place.take, found))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target_dtype", [np.int64, np.int16, np.uint8])
def test_targets_count_by_their_class(target_dtype, weighted, place, rng):
    classes, ignore_index = 6, 4
    target = rng.integers(0, classes + 3, (300, 7)).astype(target_dtype)[
        :, ::2
    ]  # some are no class
    if target_dtype != np.uint8:
        target[0, :2] = -1, -100
    weight = rng.random(classes) + 1 if weighted else None
    safe, scale = counted(place, target, weight, ignore_index, classes, np.dtype(np.float64))
    ignored, known = target == ignore_index, (target >= 0) & (target < classes)
    np.testing.assert_array_equal(safe, np.where(known & ~ignored, target, 0))
    assert safe.dtype == target.dtype
    expected = np.ones(target.shape) if weight is None else weight[np.where(known, target, 0)]
    expected = np.where(ignored, 0, np.where(known, expected, np.nan))
    np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_targets_of_any_shape_count(shape, place):
    target = np.full(shape, 2, np.int32)
    safe, scale = counted(place, target, None, -100, 3, np.dtype(np.float32))
    assert (safe.shape, scale.shape, scale.dtype) == (shape, shape, np.float32)
    np.testing.assert_array_equal(safe, target)
    np.testing.assert_array_equal(scale, np.ones(shape, np.float32))


def test_a_negative_index_to_ignore_is_no_unsigned_target(place):
    target = np.array([156, 3], np.uint8)  # 156 is -100 in 8 bits
    _, scale = counted(place, target, None, -100, 200, np.dtype(np.float32))
    np.testing.assert_array_equal(scale, [1, 1])
