"""Layer normalization of rows against its definition in float64."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu.layer_norm import BLOCK_ROWS, LEAST_ROWS, MOST_PARTS
from gradengine.kernels.cpu.reductions import TERMS
from tests.kernels.conftest import Place
from tests.kernels.memory import assert_close, at_the_end

EPS = 1e-5
DTYPES = [np.float32, np.float64]
ON_CPU = Place("cpu")
# Around the lengths of vectors and of what is summed at once; around the rows of blocks and parts.
SHAPES = [(1, 1), (5, 1), (3, 2), (8, 7), (3, 65), (2, TERMS - 1), (3, TERMS + 1), (0, 5), (4, 0)]
SHAPES += [(LEAST_ROWS + 1, 3), (MOST_PARTS * LEAST_ROWS + 1, 5), (MOST_PARTS * BLOCK_ROWS + 77, 4)]


def by_definition(x, weight, bias, grad):
    """Give out, mean, inv_std, and the gradients by x, weight and bias."""
    x, weight, bias, grad = (array.astype(np.float64) for array in (x, weight, bias, grad))
    if not x.size:
        nothing = np.full((2, len(x)), np.nan)
        return x, *nothing, x, np.zeros_like(weight), np.zeros_like(bias)
    mean = x.mean(axis=1, keepdims=True)
    inv_std = 1 / np.sqrt(x.var(axis=1, keepdims=True) + EPS)
    normal, weighted = (x - mean) * inv_std, grad * weight
    along = (weighted * normal).mean(axis=1, keepdims=True)
    by_x = inv_std * (weighted - weighted.mean(axis=1, keepdims=True) - normal * along)
    by_vectors = (grad * normal).sum(axis=0), grad.sum(axis=0)
    return normal * weight + bias, mean[:, 0], inv_std[:, 0], by_x, *by_vectors


def drawn(shape, dtype, rng):
    """Give x, weight, bias and grad."""
    shapes = (shape, shape[1:], shape[1:], shape)
    x, *others = (rng.standard_normal(each).astype(dtype) for each in shapes)
    return 3 * x + 5, *others


def everything(run, x, weight, bias, grad):
    out, mean, inv_std = run("layer_norm", x, weight, bias, EPS)
    return out, mean, inv_std, *run("layer_norm_grad", grad, x, weight, mean, inv_std)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_its_definition(shape, dtype, rng, place):
    given = drawn(shape, dtype, rng)
    for got, expected in zip(everything(place, *given), by_definition(*given), strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, dtype)


def test_vectors_may_be_left_out(rng, place):
    x, weight, bias, grad = drawn((9, 21), np.float64, rng)
    one, zero = np.ones_like(weight), np.zeros_like(bias)
    for given in ((None, None), (weight, None), (None, bias)):
        full = (one if given[0] is None else weight, zero if given[1] is None else bias)
        for got, expected in zip(
            everything(place, x, *given, grad), by_definition(x, *full, grad), strict=True
        ):
            assert_close(got, expected, np.float64)


def test_gradients_by_vectors_are_made_where_they_are_wanted(place, rng):
    x, weight, bias, grad = drawn((40, 21), np.float64, rng)
    _, mean, inv_std = place("layer_norm", x, weight, bias, EPS)
    given = grad, x, weight, mean, inv_std
    by_x, by_weight, by_bias = place("layer_norm_grad", *given, False)
    assert by_weight is None
    assert by_bias is None
    np.testing.assert_array_equal(by_x, place("layer_norm_grad", *given, True)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_far_from_zero_costs_no_more_than_rounding(dtype, rng, place):
    x, weight, bias, grad = drawn((4, 3 * TERMS + 5), dtype, rng)
    x = (x / 64 + 1000).astype(dtype)
    got, expected = everything(place, x, weight, bias, grad), by_definition(x, weight, bias, grad)
    # the mean itself is rounded to the row's dtype
    rounding = np.finfo(dtype).eps * 1000 / x.std()
    np.testing.assert_allclose(got[0], expected[0], atol=4 * rounding)
    np.testing.assert_allclose(got[1:3], expected[1:3], rtol=4 * np.finfo(dtype).eps)


def test_special_values(rng, place):
    given = drawn((5, 40), np.float32, rng)
    x = given[0]
    x[1, 7], x[2, 39], x[3], x[4] = np.nan, np.inf, 2.5, 3e38
    out, mean, inv_std, by_x, _, by_bias = everything(place, *given)
    assert np.isnan(out[1:3]).all()
    assert np.isnan(by_x[1:3]).all()
    np.testing.assert_array_equal(out[3], given[2])
    np.testing.assert_allclose(inv_std[3], EPS**-0.5, rtol=1e-6)
    np.testing.assert_allclose(mean[0], x[0].mean(), rtol=1e-6)
    np.testing.assert_allclose(by_bias, given[3].sum(axis=0), rtol=1e-5, atol=1e-6)


def test_any_memory_is_read_and_none_behind_it(rng):
    given = drawn((6, 50), np.float32, rng)
    expected = everything(ON_CPU, *given)
    room = [np.full([2 * size for size in array.shape], np.nan, array.dtype) for array in given]
    strided = [wide[(slice(None, None, -2),) * wide.ndim] for wide in room]
    read_only = [array.copy() for array in given]
    for array, target in zip(given, strided, strict=True):
        target[...] = array
    for array in read_only:
        array.flags.writeable = False
    for others in (strided, read_only, map(at_the_end, given)):
        for got, same in zip(everything(ON_CPU, *others), expected, strict=True):
            np.testing.assert_array_equal(got, same)


def test_arrays_that_do_not_fit_are_refused():
    x, vector, rows = np.zeros((3, 4)), np.zeros(4), np.zeros(3)
    with pytest.raises(ValueError, match="layer_norm: weight must"):
        kernels.layer_norm(x, rows, None, EPS)
    with pytest.raises(ValueError, match="layer_norm: bias must"):
        kernels.layer_norm(x, None, rows, EPS)
    with pytest.raises(TypeError, match="layer_norm: arrays must be of one dtype"):
        kernels.layer_norm(x, vector.astype(np.float32), None, EPS)
    with pytest.raises(ValueError, match="layer_norm_grad: grad must"):
        kernels.layer_norm_grad(x[:2], x, None, rows, rows)
    with pytest.raises(ValueError, match="layer_norm_grad: inv_std must"):
        kernels.layer_norm_grad(x, x, None, rows, vector)


@pytest.mark.parametrize("shape", [(3, 7), (70, 40), (5, 257), (130, 1000)])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_short_floats(name, shape, cuda_place, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    given = [array.astype(dtype) for array in drawn(shape, np.float64, rng)]
    out, mean, inv_std = cuda_place("layer_norm", *given[:3], EPS)
    x, weight, _, grad = given
    grads = cuda_place("layer_norm_grad", grad, x, weight, mean, inv_std)
    assert mean.dtype == inv_std.dtype == np.float32
    rounding = 2**-8 if name == "bfloat16" else 2**-11
    results = (out, mean, inv_std, *grads)
    for result, expected in zip(results, by_definition(*given), strict=True):
        limits = {"rtol": rounding, "atol": 2e-6 * np.abs(expected).max()}
        np.testing.assert_allclose(result.astype(np.float64), expected, **limits)
    assert {result.dtype for result in (out, *grads)} == {np.dtype(dtype)}
