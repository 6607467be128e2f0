"""Winograd's transforms in exact fractions, and what holds for numbers that are not finite."""

from fractions import Fraction

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import conv2d, winograd
from gradengine.kernels.cpu.winograd import PATCH, TILE
from gradengine.kernels.geometry import conv2d_geometry


def matrix(transform, size):
    """Give a transform as the matrix of fractions that it multiplies by."""
    columns = [transform([Fraction(int(i == j)) for i in range(size)]) for j in range(size)]
    # 1/24 is no binary number: what was meant is the fraction close by
    exact = [[Fraction(value).limit_denominator(1000) for value in column] for column in columns]
    return np.array(exact, dtype=object).T


def test_one_dimension_is_a_correlation():
    taken, given = matrix(winograd.transform_input, PATCH), matrix(winograd.transform_output, PATCH)
    weighed = matrix(winograd.transform_weight, 3)
    assert (taken.shape, given.shape, weighed.shape) == ((6, 6), (4, 6), (6, 3))
    for tap in range(3):
        found = given @ np.diag(weighed[:, tap]) @ taken
        expected = np.eye(TILE, PATCH, tap)
        assert (found == expected).all()


@pytest.mark.parametrize(
    ("transform", "size", "adjoint", "adjoint_size"),
    [
        (winograd.transform_output, PATCH, winograd.spread_output, TILE),
        (winograd.transform_weight, 3, winograd.gather_weight, PATCH),
    ],
)
def test_adjoints(transform, size, adjoint, adjoint_size):
    assert (matrix(adjoint, adjoint_size) == matrix(transform, size).T).all()


@pytest.fixture
def geometry(monkeypatch):
    monkeypatch.setattr(conv2d, "_algorithm", lambda geometry, dtype: winograd)
    return conv2d_geometry((2, 16, 12, 17), (32, 16, 3, 3), 1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 8), (4, 3), (11, 16)])
def test_a_pixel_that_is_not_finite_spoils_only_the_tiles_that_read_it(value, place, geometry, rng):
    """A direct sum would spoil 3 x 3 pixels; here whole tiles of 4 x 4 become NaN, inf or not."""
    x = rng.standard_normal(geometry.input_shape).astype(np.float32)
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    expected = kernels.conv2d(x, weight, None, geometry)
    x[1, 5, *place] = value
    found = kernels.conv2d(x, weight, None, geometry)
    read = np.zeros((12, 17), bool)
    for top in range(0, 12, TILE):
        for left in range(0, 17, TILE):
            inside = all(
                start - 1 <= at < start - 1 + PATCH
                for at, start in zip(place, (top, left), strict=True)
            )
            read[top : top + TILE, left : left + TILE] = inside
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1][:, ~read], expected[1][:, ~read])
    y, z = place
    assert not np.isfinite(found[1, :, max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2]).any()


def test_a_weight_that_is_not_finite_spoils_its_own_channel_only(geometry, rng):
    x = rng.standard_normal(geometry.input_shape).astype(np.float32)
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    expected = kernels.conv2d(x, weight, None, geometry)
    weight[7, 3, 1, 1] = np.nan
    found = kernels.conv2d(x, weight, None, geometry)
    assert np.isnan(found[:, 7]).all()
    others = np.arange(32) != 7
    np.testing.assert_array_equal(found[:, others], expected[:, others])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_errors_are_relative(scale, geometry, rng):
    x = rng.standard_normal(geometry.input_shape).astype(np.float32)
    weight = rng.standard_normal(geometry.weight_shape).astype(np.float32)
    expected = kernels.conv2d(x, weight, None, geometry)
    found = kernels.conv2d(x * np.float32(scale), weight, None, geometry)
    assert abs(found / np.float32(scale) - expected).max() < 3e-5 * abs(expected).max()
