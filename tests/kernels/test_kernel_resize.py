"""Weighted sums along one axis against their definition."""

import numpy as np
import pytest

from gradengine import kernels
from tests.kernels.memory import assert_close

POSITIONS = np.array([[0, 1, -1], [3, -1, 3], [-1, -1, -1], [2, 0, 1], [-1, 2, -1]])


def by_definition(x, positions, weights, axis):
    moved = np.moveaxis(x.astype(np.float64), axis, 0)
    out = np.zeros((len(positions), *moved.shape[1:]))
    for place, tap in np.ndindex(*positions.shape):
        if positions[place, tap] >= 0:
            out[place] += weights[place, tap] * moved[positions[place, tap]]
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 37), 0), ((2, 4, 5), 1), ((6, 1, 4), 2)])
def test_matches_its_definition(shape, axis, dtype, place, rng):
    weights = rng.standard_normal(POSITIONS.shape)
    x = rng.standard_normal(shape).astype(dtype)
    expected = by_definition(x, POSITIONS, weights, axis)
    assert_close(place("weigh", x, POSITIONS, weights, axis), expected, dtype)
    strided = np.repeat(x, 2, axis=0)[::2]
    strided.flags.writeable = False
    assert_close(place("weigh", strided, POSITIONS, weights, axis), expected, dtype)


def test_nan_reaches_only_what_it_is_part_of(place):
    x = np.arange(8.0).reshape(4, 2)
    x[3, 0] = np.nan
    found = place("weigh", x, POSITIONS, np.ones(POSITIONS.shape), 0)
    np.testing.assert_array_equal(np.isnan(found), [[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float16])
def test_other_dtypes_keep_their_own(dtype, rng):
    x = rng.integers(0, 2, (3, 4)).astype(dtype)
    positions = np.array([[3], [0], [0]])
    found = kernels.weigh(x, positions, np.ones((3, 1)), 1)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x[:, [3, 0, 0]])


def test_empty_arrays(place):
    x = np.zeros((0, 4, 3))
    assert place("weigh", x, POSITIONS, np.ones(POSITIONS.shape), 1).shape == (0, 5, 3)


@pytest.mark.parametrize("position", [4, -2])
def test_positions_outside_are_refused(position):
    x, positions = np.zeros((4, 3)), np.array([[0, position]])
    with pytest.raises(ValueError, match=r"weigh: positions must lie in x .*x\.shape\[0\]"):
        kernels.weigh(x, positions, np.ones((1, 2)), 0)
    with pytest.raises(ValueError, match="weigh: weights must have"):
        kernels.weigh(x, POSITIONS, np.ones((1, 2)), 0)
