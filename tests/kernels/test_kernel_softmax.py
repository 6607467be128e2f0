"""Softmax and its logarithm along rows against their definitions in float64."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu.reductions import TERMS
from gradengine.kernels.cpu.softmax import TOGETHER
from tests.kernels.memory import assert_close, at_the_end

DTYPES = [np.float32, np.float64]
# Around the lengths of vectors, of what is summed at once and of what shares a loop.
SHAPES = [(1, 1), (5, 1), (17, 2), (8, 7), (3, 65), (2 * TOGETHER // 64 + 1, 64), (3, 2, 33)]
SHAPES += [
    (2, TERMS - 1),
    (3, TERMS + 1),
    (2, TOGETHER),
    (3, TOGETHER + 9),
    (0, 5),
    (4, 0),
    (2, 0, 3),
]


def by_definition(x):
    """Give softmax and log_softmax."""
    below = x.astype(np.float64) - x.max(axis=-1, keepdims=True, initial=-np.inf)
    powers = np.exp(below)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / total, below - np.log(np.maximum(total, 1))  # of no elements it is 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_they_match_their_definitions(shape, dtype, rng, place):
    x = (rng.standard_normal(shape) * 10 - 300).astype(dtype)
    grad = rng.standard_normal(shape).astype(dtype)
    share, logs = by_definition(x)
    out, log_out = place("softmax", x), place("log_softmax", x)
    assert (out.dtype, log_out.dtype) == (dtype, dtype)
    assert_close(out, share, dtype)
    assert_close(log_out, logs, dtype)
    by_x = share * (grad - (grad * share).sum(axis=-1, keepdims=True))
    assert_close(place("softmax_grad", grad, out), by_x, dtype)
    by_x = grad - share * grad.sum(axis=-1, keepdims=True, dtype=np.float64)
    assert_close(place("log_softmax_grad", grad, log_out), by_x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_are_exact_over_their_whole_range(dtype, place):
    lowest = np.log(np.finfo(dtype).tiny)
    below = np.concatenate([np.linspace(lowest, 0, 20001), -(np.float64(2.0) ** -np.arange(60))])
    x = np.stack([below, np.zeros_like(below)], axis=1).astype(dtype)
    expected = np.exp(x.astype(np.longdouble))
    expected /= expected.sum(axis=1, keepdims=True)
    found = place("softmax", x)
    limits = {"rtol": 4 * np.finfo(dtype).eps, "atol": 2 * np.finfo(dtype).tiny}
    np.testing.assert_allclose(found, expected.astype(np.float64), **limits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 6, 40, TOGETHER + 3])
def test_special_values(length, dtype, rng, place):
    x = rng.standard_normal((7, length)).astype(dtype)
    x[1, -1], x[2, length // 2], x[3], x[4, 0] = np.nan, np.inf, -np.inf, -np.nan
    x[5] = np.finfo(dtype).min  # whose difference from others is -inf
    x[5, 0] = np.finfo(dtype).max
    x[6, 1:] = -np.inf
    for found in (place("softmax", x), place("log_softmax", x)):
        assert np.isnan(found[1:5]).all()
        assert np.isfinite(found[0]).all()
    alone = np.eye(1, length, dtype=dtype)[0]
    with np.errstate(divide="ignore"):
        for row in (5, 6):
            np.testing.assert_array_equal(place("softmax", x)[row], alone)
        np.testing.assert_array_equal(place("log_softmax", x)[6], np.log(alone))
    out, grad = place("log_softmax", x), np.ones_like(x)
    np.testing.assert_array_equal(place("log_softmax_grad", grad, out)[6], 1 - length * alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sign_of_all_elements_is_minded(dtype, rng, place):
    x = (rng.standard_normal((20, 37)) * 1e3).astype(dtype)
    for values in (-abs(x), abs(x), x, -np.zeros_like(x), x * np.finfo(dtype).tiny):
        share, _ = by_definition(values)
        assert_close(place("softmax", values), share, dtype)


def test_any_memory_is_read_and_none_behind_it(rng):
    x, grad = rng.standard_normal((2, 6, 50)).astype(np.float32)
    out = kernels.softmax(x)
    by_x = kernels.softmax_grad(grad, out)
    read_only = x.copy()
    read_only.flags.writeable = False
    room = np.full((12, 100), np.nan, np.float32)
    room[::-2, 1::2] = x
    for given in (read_only, room[::-2, 1::2], np.asfortranarray(x), at_the_end(x)):
        np.testing.assert_array_equal(kernels.softmax(given), out)
    row = np.broadcast_to(grad[0], x.shape)
    expected = kernels.softmax_grad(row.copy(), out)
    np.testing.assert_array_equal(kernels.softmax_grad(row, out), expected)
    np.testing.assert_array_equal(kernels.softmax_grad(at_the_end(grad), at_the_end(out)), by_x)


def test_long_rows_of_float32_keep_their_digits(place):
    x = np.full((2, 300_001), 0.1, np.float32)
    np.testing.assert_allclose(place("softmax", x), 1 / x.shape[1], rtol=3e-7)
    np.testing.assert_allclose(place("log_softmax", x), -np.log(x.shape[1]), rtol=3e-7)
    x = np.linspace(-3, 0, 300_001, dtype=np.float32)[None]
    np.testing.assert_allclose(place("softmax", x), by_definition(x)[0], rtol=5e-7)


def test_arrays_that_do_not_fit_are_refused():
    x = np.zeros((3, 4))
    for name in ("softmax_grad", "log_softmax_grad"):
        with pytest.raises(ValueError, match=f"{name}: grad must"):
            getattr(kernels, name)(x[:2], x)
        with pytest.raises(TypeError, match=f"{name}: arrays must be of one dtype"):
            getattr(kernels, name)(x.astype(np.float32), x)
    for name in ("softmax", "log_softmax"):
        with pytest.raises(TypeError, match=rf"{name}: .*got x\.dtype=float16"):
            getattr(kernels, name)(x.astype(np.float16))


@pytest.mark.parametrize(
    "length", [7, 40, 256, 257, 1000]
)  # a warp's and a block's, whole packs or not
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_short_floats(name, length, cuda_place, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    x, grad = (rng.standard_normal((2, 5, length)) * 3).astype(dtype)
    share, logs = by_definition(x.astype(np.float64))
    out, log_out = cuda_place("softmax", x), cuda_place("log_softmax", x)
    slope = grad.astype(np.float64)
    found = cuda_place("softmax_grad", grad, out), cuda_place("log_softmax_grad", grad, log_out)
    given = out.astype(np.float64), np.exp(log_out.astype(np.float64))
    by_x = given[0] * (slope - (slope * given[0]).sum(axis=1, keepdims=True))
    by_log = slope - given[1] * slope.sum(axis=1, keepdims=True)
    rounding = 2**-8 if name == "bfloat16" else 2**-11
    for result, expected in zip((out, log_out, *found), (share, logs, by_x, by_log), strict=True):
        assert result.dtype == dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            result.astype(np.float64), expected, rtol=rounding, atol=1e-3 * rounding * scale
        )
