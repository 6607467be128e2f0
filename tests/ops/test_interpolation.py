"""Interpolation beside the table: messages, nan, sizes against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradengine.ops.interpolation import interpolate

X = np.arange(24.0).reshape(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of size and scale_factor"),
        ({"size": 2, "scale_factor": 2}, "one of size and scale_factor"),
        (
            {"size": 2, "mode": "bicubic"},
            "mode must be 'nearest' or 'bilinear'; got mode='bicubic'",
        ),
        ({"size": 2, "align_corners": False}, "for mode='bilinear'"),
        ({"size": 2, "antialias": True}, "for mode='bilinear'"),
        ({"size": 0}, "must not be empty"),
        ({"scale_factor": 0.1}, "must not be empty"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"interpolate: .*{message}"):
        interpolate(X, **options)


def test_only_images_of_floats_are_bilinear():
    with pytest.raises(ValueError, match=r"interpolate: x must be 4-D .*got x\.shape=\(3, 4\)"):
        interpolate(X[0, 0], size=2)
    with pytest.raises(TypeError, match=r"interpolate: .*got x\.dtype=int64"):
        interpolate(X.astype(np.int64), size=2, mode="bilinear")


def test_nan_reaches_its_neighbours_only():
    x = np.ones((1, 1, 8, 8))
    x[0, 0, 0, 0] = np.nan
    found = interpolate(x, size=4, mode="bilinear")
    assert np.isnan(found[0, 0, 0, 0])
    assert np.isfinite(found[0, 0, 1:]).all()


def test_result_is_channels_last():
    assert interpolate(X, size=5).transpose(0, 2, 3, 1).flags.c_contiguous


@given(st.integers(1, 40), st.integers(1, 40))
def test_nearest_chooses_pytorchs_pixels(size, out):
    torch = pytest.importorskip("torch")
    x = np.arange(size, dtype=np.float32).reshape(1, 1, 1, size)
    expected = torch.nn.functional.interpolate(torch.tensor(x), size=(1, out)).numpy()
    np.testing.assert_array_equal(interpolate(x, size=(1, out)), expected)


@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.booleans())
def test_bilinear_weighs_as_pytorch(size, out, align_corners, antialias):
    torch = pytest.importorskip("torch")
    x = np.cos(np.arange(size * 2.0)).reshape(1, 2, 1, size)
    options = {
        "size": (1, out),
        "mode": "bilinear",
        "align_corners": align_corners,
        "antialias": antialias,
    }
    expected = torch.nn.functional.interpolate(torch.tensor(x), **options).numpy()
    np.testing.assert_allclose(interpolate(x, **options), expected, rtol=1e-12, atol=1e-12)
