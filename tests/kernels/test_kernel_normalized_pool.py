"""Batch norm, ReLU and a max pool together: what the three kernels give one after the other."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.geometry import pool2d_geometry
from tests.emulator.emulator import ORDERS, Schedule
from tests.kernels import references as reference
from tests.kernels.memory import MEMORIES, laid_out

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, (np.float16, np.float32, np.float64))
ROUNDING = {FLOAT16: 2**-11, BFLOAT16: 2**-8, FLOAT32: 1e-6, FLOAT64: 1e-14}
EPS = 1e-5

# x shape; kernel_size, stride, padding, dilation, ceil_mode
STEM = (3, 2, 1, 1, False)
CASES = {
    "even": ((2, 8, 8, 10), STEM),
    "odd": ((3, 8, 7, 9), STEM),
    "single_channels": ((2, 5, 6, 5), STEM),
    "one_pixel": ((3, 4, 1, 1), STEM),
    "one_column": ((2, 4, 5, 1), STEM),
    "several_blocks": ((5, 72, 9, 34), STEM),
    "many_packs": ((2, 200, 4, 3), STEM),
    "ceil_mode": ((2, 4, 8, 7), (3, 2, 1, 1, True)),
    "other_window": ((2, 4, 7, 8), (2, 2, 0, 1, False)),
}


def make(shape, rng, dtype, vector_dtype):
    x = rng.standard_normal(shape).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[1]) * rng.choice([-1, 1], shape[1])  # negative ones as well
    bias = rng.standard_normal(shape[1])
    return x, weight.astype(vector_dtype), bias.astype(vector_dtype)


def channels(vector):
    return vector.astype(np.float64)[:, None, None]


def in_steps(x, weight, bias, options, grad):
    """Give out, mean, inv_std and the gradients by x, weight and bias, in float64."""
    x, weight, bias, grad = (array.astype(np.float64) for array in (x, weight, bias, grad))
    normalized, mean, variance = reference.batch_norm(x, weight, bias, EPS)
    geometry = pool2d_geometry("max_pool2d", x.shape, *options)
    out, indices = kernels.max_pool2d(np.maximum(normalized, 0), geometry)
    passed = kernels.max_pool2d_scatter(np.where(out == 0, 0, grad), indices, geometry)
    inv_std = 1 / np.sqrt(variance + EPS)
    normal = (x - channels(mean)) * channels(inv_std)
    axes = (0, 2, 3)
    along = (passed * normal).mean(axes, keepdims=True)
    by_x = passed - passed.mean(axes, keepdims=True) - normal * along
    by_x = by_x * channels(weight * inv_std)
    return (out, mean, inv_std), (by_x, (passed * normal).sum(axes), passed.sum(axes))


def assert_rounded(got, expected, dtype):
    """Compare with what was computed in float64, but for its rounding to dtype."""
    assert got.dtype == dtype
    scale = np.abs(expected).max(initial=1.0)
    tolerance = 2 * ROUNDING[dtype]
    atol = min(tolerance, 3e-5) * scale
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=atol)


def check(place, case, dtype, vector_dtype, rng, memory="nchw"):
    shape, options = case
    x, weight, bias = make(shape, rng, dtype, vector_dtype)
    geometry = pool2d_geometry("max_pool2d", shape, *options)
    grad = rng.standard_normal(geometry.output_shape).astype(dtype)
    expected, expected_grads = in_steps(x, weight, bias, options, grad)
    sums = FLOAT32 if dtype.itemsize == 2 else dtype
    x, grad = laid_out(x, memory), laid_out(grad, memory)
    results = place("batch_norm_relu_max_pool", x, weight, bias, EPS, geometry)
    for got, wanted, kind in zip(results, expected, (dtype, sums, sums), strict=False):
        assert_rounded(got, wanted, kind)
    out, mean, inv_std, winners, peaks = results
    arguments = (grad, x, out, winners, peaks, weight, bias, mean, inv_std, geometry)
    grads = place("batch_norm_relu_max_pool_grad", *arguments)
    kinds = (dtype, vector_dtype, vector_dtype)
    for got, wanted, kind in zip(grads, expected_grads, kinds, strict=True):
        assert_rounded(got, wanted, kind)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype, place, rng):
    check(place, CASES[name], dtype, dtype, rng)


@pytest.mark.parametrize(
    ("dtype", "vector_dtype"),
    [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["odd", "single_channels", "several_blocks"])
def test_16_bits(name, dtype, vector_dtype, cuda_place, rng):
    check(cuda_place, CASES[name], dtype, vector_dtype, rng)


@pytest.mark.parametrize("memory", MEMORIES)
def test_any_memory(memory, place, rng):
    check(place, CASES["odd"], FLOAT32, FLOAT32, rng, memory)


def test_many_rows_are_shared_by_blocks(place, rng):
    check(place, ((2, 4, 90, 20), STEM), FLOAT32, FLOAT32, rng)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_running_statistics_and_known_moments(known, affine, place, rng):
    x, weight, bias = make(CASES["odd"][0], rng, FLOAT32, FLOAT32)
    if not affine:
        weight = bias = None
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    _, mean, variance = reference.batch_norm(x.astype(np.float64), None, None, EPS)
    moments = (mean, variance) if known else None
    running = [place.give(np.full(8, value, np.float32)) for value in (0.5, 2)]
    arguments = (x, weight, bias, EPS, geometry, moments, *running, 0.3)
    results = place("batch_norm_relu_max_pool", *arguments)
    unbiased = variance * (189 / 188)
    assert_rounded(place.take(running[0]), 0.35 + 0.3 * mean, FLOAT32)
    assert_rounded(place.take(running[1]), 1.4 + 0.3 * unbiased, FLOAT32)
    arguments = (x, weight, bias, None, True, EPS)
    expected = place("batch_norm_act", *arguments)
    out, _ = place("max_pool2d", expected[0], geometry)
    for got, wanted in zip(results, (out, *expected[1:3]), strict=False):
        assert_rounded(got, wanted, FLOAT32)


def test_positions_of_winners(place, rng):
    x, weight, bias = make(CASES["odd"][0], rng, FLOAT32, FLOAT32)
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    normalized = place("batch_norm_act", x, weight, bias, None, True, EPS)[0]
    expected_out, expected = place("max_pool2d", normalized, geometry)
    out, _, _, winners, _ = place("batch_norm_relu_max_pool", x, weight, bias, EPS, geometry)
    positions = place.take(kernels.winning_positions(place.give(winners), geometry))
    assert positions.dtype == np.int32
    np.testing.assert_allclose(out, expected_out, rtol=1e-6)
    np.testing.assert_array_equal(np.where(out == 0, 0, positions), np.where(out == 0, 0, expected))


def test_ties_nan_and_infinity(place):
    x = np.zeros((2, 4, 4, 4), np.float32)
    x[0, 0] = 1  # all equal: the first pixel of a window wins
    x[1, 0] = -1
    x[0, 1, 2, 2] = x[0, 1, 1, 1] = np.nan
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    ones = np.ones(4, np.float32)
    moments = (np.zeros(4, np.float64), np.ones(4, np.float64))
    results = place("batch_norm_relu_max_pool", x, ones, 0 * ones, EPS, geometry, moments)
    out, mean, inv_std, winners, peaks = results
    assert (out[0, 0] > 0.9).all()
    np.testing.assert_array_equal(out[:, 2:], 0)
    assert np.isnan(out[0, 1]).all()
    grad = np.ones(out.shape, np.float32)
    arguments = (grad, x, out, winners, peaks, ones, ones * 0, mean, inv_std, geometry)
    _, by_weight, by_bias = place("batch_norm_relu_max_pool_grad", *arguments)
    assert by_bias[0] == 4
    assert by_bias[1] == 4
    assert np.isnan(by_weight[1])
    np.testing.assert_array_equal(by_bias[2:], 0)
    positions = place.take(kernels.winning_positions(place.give(winners), geometry))
    np.testing.assert_array_equal(positions[0, 0], [[0, 1], [4, 5]])
    np.testing.assert_array_equal(positions[0, 1], [[5, 5], [5, 10]])


def test_an_empty_batch(place):
    x, ones = np.zeros((0, 4, 6, 6)), np.ones(4)
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    running = [place.give(np.full(4, 0.5)) for _ in range(2)]
    results = place("batch_norm_relu_max_pool", x, ones, ones, EPS, geometry, None, *running, 0.3)
    out, mean, inv_std, winners, peaks = results
    assert out.shape == (0, 4, 3, 3)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal([place.take(array) for array in running], 0.5)
    arguments = (out, x, out, winners, peaks, ones, ones, mean, inv_std, geometry)
    by_x, by_weight, by_bias = place("batch_norm_relu_max_pool_grad", *arguments)
    assert by_x.shape == x.shape
    np.testing.assert_array_equal([by_weight, by_bias], 0)


def test_every_schedule_gives_the_same_bits(emulated_cuda, rng):
    x, weight, bias = make((2, 16, 37, 20), rng, BFLOAT16, FLOAT32)
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    grad = rng.standard_normal(geometry.output_shape).astype(BFLOAT16)
    found = []
    for order in ORDERS:
        with emulated_cuda.scheduled(Schedule(order)):
            results = kernels.batch_norm_relu_max_pool(x, weight, bias, EPS, geometry)
            out, mean, inv_std, winners, peaks = results
            arguments = (winners, peaks, weight, bias, mean, inv_std, geometry)
            grads = kernels.batch_norm_relu_max_pool_grad(grad, x, out, *arguments)
            found.append((*results, *grads))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_arrays_that_do_not_fit_are_refused():
    x, ones = np.zeros((2, 3, 5, 5)), np.ones(3)
    geometry = pool2d_geometry("max_pool2d", (2, 3, 6, 5), *STEM)
    with pytest.raises(ValueError, match=r"batch_norm_relu_max_pool: x must .*\(2, 3, 5, 5\)"):
        kernels.batch_norm_relu_max_pool(x, ones, ones, EPS, geometry)
    geometry = pool2d_geometry("max_pool2d", x.shape, *STEM)
    with pytest.raises(ValueError, match=r"batch_norm_relu_max_pool: bias must .*\(4,\)"):
        kernels.batch_norm_relu_max_pool(x, ones, np.ones(4), EPS, geometry)
    pooled = np.zeros((2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"batch_norm_relu_max_pool_grad: grad must .*"):
        kernels.batch_norm_relu_max_pool_grad(
            x, x, pooled, pooled, pooled, ones, ones, ones, ones, geometry
        )
