"""Batch normalization on CUDA: 16-bit arrays beside float32 vectors, many blocks and few, any schedule."""

import numpy as np
import pytest

from gradengine import kernels
from tests.emulator.emulator import ORDERS, Schedule
from tests.kernels import references as reference

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, (np.float16, np.float32, np.float64))
ROUNDING = {FLOAT16: 2**-11, BFLOAT16: 2**-8, FLOAT32: 1e-6, FLOAT64: 1e-14}
# of arrays and of vectors
PAIRS = [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16)]
EPS = 1e-5

SHAPES = {
    "few_rows": (2, 64, 7, 7),  # fewer packs than a block has side by side in one launch for all
    "one_image": (1, 24, 3, 5),
    "single_channels": (3, 5, 4, 3),
    "many_rows": (3, 64, 24, 24),  # every block has several shares of the rows, the last one a part
    "many_channels": (5, 520, 15, 14),  # more packs than a block has, and not a multiple
    "many_single_channels": (5, 21, 15, 14),
}


def make(shape, rng, dtype, vector_dtype):
    x, grad, residual = (rng.standard_normal((3, *shape)) + 0.5).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[1]).astype(vector_dtype)
    bias = rng.standard_normal(shape[1]).astype(vector_dtype)
    return x, grad, residual, weight, bias


def channels(vector):
    return vector.astype(np.float64)[:, None, None]


def exact(x, weight, bias, residual):
    """Give batch norm plus residual in float64, and its mean and variance."""
    x, weight, bias = (array.astype(np.float64) for array in (x, weight, bias))
    out, mean, variance = reference.batch_norm(x, weight, bias, EPS)
    return out + residual.astype(np.float64), mean, variance


def exact_grad(passed, x, weight, mean, inv_std):
    """Give the gradients by x, weight and bias in float64, of what relu let pass."""
    passed, x = passed.astype(np.float64), x.astype(np.float64)
    normal = (x - channels(mean)) * channels(inv_std)
    axes = (0, 2, 3)
    along = (passed * normal).mean(axes, keepdims=True)
    by_x = passed - passed.mean(axes, keepdims=True) - normal * along
    by_x = by_x * channels(weight) * channels(inv_std)
    return by_x, (passed * normal).sum(axes), passed.sum(axes)


def assert_rounded(got, expected, dtype):
    """Compare with what was computed in float64, but for its rounding to dtype."""
    assert got.dtype == dtype
    scale = np.abs(expected).max(initial=1.0)
    tolerance = 2 * ROUNDING[dtype]
    atol = min(tolerance, 3e-5) * scale
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("dtype", "vector_dtype"), PAIRS[:3], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, dtype, vector_dtype, known, cuda_place, rng):
    x, _, residual, weight, bias = make(SHAPES[name], rng, dtype, vector_dtype)
    expected, mean, variance = exact(x, weight, bias, residual)
    moments = None
    if known:
        moments = tuple(cuda_place.give(array.astype(np.float32)) for array in (mean, variance))
    running = [cuda_place.give(np.full(x.shape[1], 0.5, vector_dtype)) for _ in range(2)]
    arguments = (x, weight, bias, residual, True, EPS, moments, *running, 0.25)
    out, got_mean, inv_std, _ = cuda_place("batch_norm_act", *arguments)
    assert_rounded(out, np.maximum(expected, 0), dtype)
    assert_rounded(got_mean, mean, FLOAT32)
    assert_rounded(inv_std, 1 / np.sqrt(variance + EPS), FLOAT32)
    count = x.size // x.shape[1]
    running = [cuda_place.take(array) for array in running]
    assert_rounded(running[0], 0.375 + 0.25 * mean, vector_dtype)
    assert_rounded(running[1], 0.375 + 0.25 * variance * count / (count - 1), vector_dtype)


@pytest.mark.parametrize("wants_residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("dtype", "vector_dtype"), [*PAIRS, (FLOAT32, FLOAT32)], ids=str)
@pytest.mark.parametrize("name", ["few_rows", "many_rows", "many_single_channels"])
def test_gradients(name, dtype, vector_dtype, relu, wants_residual, cuda_place, rng):
    x, grad, residual, weight, bias = make(SHAPES[name], rng, dtype, vector_dtype)
    results = cuda_place("batch_norm_act", x, weight, bias, residual, relu, EPS)
    out, mean, inv_std, passed = results
    arguments = (grad, x, out, passed, weight, mean, inv_std, relu, wants_residual)
    by_x, by_weight, by_bias, by_residual = cuda_place("batch_norm_act_grad", *arguments)
    behind_relu = np.where(out == 0, np.zeros((), dtype), grad) if relu else grad
    expected = exact_grad(behind_relu, x, weight, mean, inv_std)
    assert_rounded(by_x, expected[0], dtype)
    assert_rounded(by_weight, expected[1], vector_dtype)
    assert_rounded(by_bias, expected[2], vector_dtype)
    if wants_residual:
        np.testing.assert_array_equal(by_residual, behind_relu)
    else:
        assert by_residual is None


def test_relu_passes_what_is_not_zero_after_rounding(cuda_place):
    tiny = np.array([2.0**-26, 2.0**-24, -1, 0], np.float32)  # float16's smallest number is 2^-24
    x = np.zeros((2, 4, 1, 1), np.float16)
    out, mean, inv_std, passed = cuda_place(
        "batch_norm_act", x, np.ones(4, np.float32), tiny, None, True, EPS
    )
    np.testing.assert_array_equal(out[0, :, 0, 0], [0, 2.0**-24, 0, 0])
    arguments = (x + 1, x, out, passed, np.ones(4, np.float32), mean, inv_std, True, True)
    by_residual = cuda_place("batch_norm_act_grad", *arguments)[3]
    np.testing.assert_array_equal(by_residual[0, :, 0, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 20, 30)])
def test_nan_passes_relu_in_both_directions(shape, cuda_place):
    x, ones = np.ones(shape, np.float32), np.ones(3, np.float32)
    x[1, 1, 0, 0] = np.nan
    out, mean, inv_std, passed = cuda_place("batch_norm_act", x, ones, ones, None, True, EPS)
    assert np.isnan(out[:, 1]).all()
    assert np.isnan([mean[1], inv_std[1]]).all()
    np.testing.assert_array_equal(out[:, ::2], 1)
    arguments = (x * 0 + 1, x, out, passed, ones, mean, inv_std, True, True)
    by_residual = cuda_place("batch_norm_act_grad", *arguments)[3]
    np.testing.assert_array_equal(by_residual[0], 1)


@pytest.mark.parametrize("vector_dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["few_rows", "many_single_channels"])
def test_scale_shift(name, vector_dtype, cuda_place, rng):
    x, _, residual, scale, shift = make(SHAPES[name], rng, BFLOAT16, vector_dtype)
    expected = x.astype(np.float64) * channels(scale) + channels(shift)
    for added, relu in ((residual, True), (None, False)):
        wanted = expected if added is None else expected + added.astype(np.float64)
        wanted = np.maximum(wanted, 0) if relu else wanted
        out = cuda_place("scale_shift", x, scale, shift, added, relu)
        assert_rounded(out, wanted, BFLOAT16)


def test_arrays_that_begin_between_packs(cuda_place, rng):
    shape = (2, 8, 30, 20)
    x, grad, residual, weight, bias = make(shape, rng, FLOAT32, FLOAT32)
    expected = cuda_place("batch_norm_act", x, weight, bias, residual, True, EPS)
    arguments = (weight, *expected[1:3], True, True)
    expected_grads = cuda_place("batch_norm_act_grad", grad, x, *expected[::3], *arguments)
    moved = []
    for array in (x, grad, residual):
        memory = cuda_place.give(np.zeros(array.size + 1, np.float32))
        view = memory[1:].reshape(2, 30, 20, 8).transpose(0, 3, 1, 2)
        view[...] = cuda_place.give(array)
        moved.append(view)
    x, grad, residual = moved
    results = kernels.batch_norm_act(
        *(x, cuda_place.give(weight), cuda_place.give(bias), residual, True, EPS)
    )
    weight, mean, inv_std = map(cuda_place.give, (weight, *expected[1:3]))
    grads = kernels.batch_norm_act_grad(
        *(grad, x, results[0], results[3], weight, mean, inv_std), relu=True, wants_residual=True
    )
    for got, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        np.testing.assert_array_equal(cuda_place.take(got), wanted)


@pytest.mark.parametrize("name", ["few_rows", "many_rows"])
def test_every_schedule_gives_the_same_bits(name, emulated_cuda, rng):
    x, grad, residual, weight, bias = make(SHAPES[name], rng, BFLOAT16, FLOAT32)
    found = []
    for order in ORDERS:
        with emulated_cuda.scheduled(Schedule(order)):
            results = kernels.batch_norm_act(x, weight, bias, residual, True, EPS)
            out, mean, inv_std, passed = results
            grads = kernels.batch_norm_act_grad(
                *(grad, x, out, passed, weight, mean, inv_std), relu=True, wants_residual=True
            )
            found.append((*results, *grads))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_any_number_of_blocks(multiprocessors, emulated_cuda, rng):
    limits = emulated_cuda.device_limits
    emulated_cuda.device_limits = limits._replace(multiprocessors=multiprocessors)
    x, grad, residual, weight, bias = make((2, 20, 37, 29), rng, FLOAT32, FLOAT32)
    results = kernels.batch_norm_act(x, weight, bias, residual, True, EPS)
    expected, mean, variance = exact(x, weight, bias, residual)
    assert_rounded(results[0], np.maximum(expected, 0), FLOAT32)
    inv_std = 1 / np.sqrt(variance + EPS)
    out, found_mean, found_inv_std, passed = results
    grads = kernels.batch_norm_act_grad(
        *(grad, x, out, passed, weight, found_mean, found_inv_std), relu=True, wants_residual=False
    )
    expected_grads = exact_grad(np.where(results[0] == 0, 0, grad), x, weight, mean, inv_std)
    for got, wanted in zip(grads[:3], expected_grads, strict=True):
        assert_rounded(got, wanted, FLOAT32)


def test_vectors_of_other_dtypes_are_refused(emulated_cuda):
    x, ones = np.zeros((2, 3, 2, 2), np.float16), np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"batch_norm_act: .*; got x.dtype=float16, weight.dtype"):
        kernels.batch_norm_act(x, ones, ones.astype(np.float16), None, False, EPS)
    with pytest.raises(TypeError, match=r"scale_shift: .*; got x.dtype=float16, scale.dtype"):
        kernels.scale_shift(x, ones.astype(np.float64), ones)
    with pytest.raises(ValueError, match=r"batch_norm_act_grad: passed must .* got passed=None"):
        kernels.batch_norm_act_grad(x, x, x, None, ones, ones, ones, True, False)


def test_running_statistics_that_lie_apart_in_memory_move(cuda_place, rng):
    x, _, _, weight, bias = make(SHAPES["one_image"], rng, FLOAT32, FLOAT32)
    memory = cuda_place.give(np.full((2, 48), 0.5, np.float32))
    running = memory[0, ::2], memory[1, 1::2]
    cuda_place("batch_norm_act", x, weight, bias, None, True, EPS, None, *running, 0.25)
    mean, variance = reference.batch_norm(x.astype(np.float64), None, None, EPS)[1:]
    memory = cuda_place.take(memory)
    assert_rounded(memory[0, ::2], 0.375 + 0.25 * mean, FLOAT32)
    assert_rounded(memory[1, 1::2], 0.375 + 0.25 * variance * 15 / 14, FLOAT32)
    np.testing.assert_array_equal(memory[0, 1::2], 0.5)
