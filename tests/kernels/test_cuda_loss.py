"""Softmax cross entropy on CUDA: every element type, every integer of targets, rows of any length."""

import numpy as np
import pytest

from gradengine import kernels
from tests.emulator.emulator import ORDERS, Schedule

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
ROUNDING = dict(zip(DTYPES, (2**-11, 2**-8, 1e-6, 1e-14), strict=True))
# Below them float16 has no normal number.
LEAST = dict(zip(DTYPES, (2**-24, 1e-38, 1e-38, 0), strict=True))


def by_definition(x, target):
    x = x.astype(np.float64)
    shifted = x - x.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    rows = np.arange(len(x))
    share = powers / powers.sum(axis=1, keepdims=True)
    losses = np.log(powers.sum(axis=1)) - shifted[rows, target]
    share[rows, target] -= 1
    return losses, share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (4, 32), (3, 256), (2, 257), (2, 1000)])
def test_matches_its_definition(shape, dtype, cuda_place, rng):
    x = (rng.standard_normal(shape) * 3 - 20).astype(dtype)
    target = rng.integers(0, shape[1], shape[0])
    losses, share = by_definition(x, target)
    found, shifts = cuda_place("softmax_cross_entropy", x, target)
    rounding, least = 3 * ROUNDING[dtype], LEAST[dtype]
    np.testing.assert_allclose(found.astype(np.float64), losses, rtol=rounding, atol=rounding)
    assert shifts.dtype == (np.float64 if dtype == np.float64 else np.float32)
    grad = rng.standard_normal(shape[0]).astype(dtype)
    by_x = cuda_place("softmax_cross_entropy_grad", grad, x, target, shifts)
    expected = share * grad.astype(np.float64)[:, None]
    np.testing.assert_allclose(by_x.astype(np.float64), expected, rtol=10 * rounding, atol=least)


@pytest.mark.parametrize("dtype", [*"bhilBHIL"])
def test_targets_of_any_integer_type(dtype, cuda_place, rng):
    x = rng.standard_normal((6, 100))
    target = rng.integers(0, 100, 6).astype(dtype)
    losses, share = by_definition(x, target.astype(int))
    found, shifts = cuda_place("softmax_cross_entropy", x, target)
    np.testing.assert_allclose(found, losses, rtol=1e-13)
    by_x = cuda_place("softmax_cross_entropy_grad", np.ones(6), x, target, shifts)
    np.testing.assert_allclose(by_x, share, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("classes", [5, 300])
def test_special_scores(classes, cuda_place):
    x = np.zeros((6, classes), np.float32)
    x[0, 1:] = -np.inf  # one class is certain
    x[1, 2] = 3e38
    x[2, classes - 1] = np.nan
    x[3, 0] = np.nan
    x[4] = -np.inf
    target = np.zeros(6, np.int64)
    losses, shifts = cuda_place("softmax_cross_entropy", x, target)
    expected = [0, 3e38, np.nan, np.nan, np.nan, np.log(classes)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    by_x = cuda_place("softmax_cross_entropy_grad", np.ones(6, np.float32), x, target, shifts)
    np.testing.assert_array_equal(by_x[0], 0)
    np.testing.assert_array_equal(by_x[1], np.eye(classes)[2] - np.eye(classes)[0])
    assert np.isnan(by_x[2:5]).all()
    np.testing.assert_allclose(by_x[5, 1:], 1 / classes, rtol=1e-6)


def test_rows_in_any_memory(cuda_place, rng):
    x = rng.standard_normal((7, 40))
    target = rng.integers(0, 40, 7)
    grad = rng.standard_normal(7)
    losses, shifts = cuda_place("softmax_cross_entropy", x, target)
    by_x = cuda_place("softmax_cross_entropy_grad", grad, x, target, shifts)
    apart = [np.asfortranarray(x), np.repeat(target, 3)[::3], np.repeat(grad, 2)[::2]]
    for array in apart:
        array.flags.writeable = False
    found, _ = cuda_place("softmax_cross_entropy", *apart[:2])
    np.testing.assert_array_equal(found, losses)
    found = cuda_place("softmax_cross_entropy_grad", apart[2], *apart[:2], shifts)
    np.testing.assert_array_equal(found, by_x)


@pytest.mark.parametrize("classes", [1, 10, 500])
def test_no_rows(classes, cuda_place):
    x, target = np.zeros((0, classes)), np.zeros(0, np.int64)
    losses, shifts = cuda_place("softmax_cross_entropy", x, target)
    assert losses.shape == (0,)
    by_x = cuda_place("softmax_cross_entropy_grad", np.zeros(0), x, target, shifts)
    assert by_x.shape == x.shape


def test_the_order_of_threads_changes_no_bit(emulated_cuda, rng):
    x = rng.standard_normal((3, 700)).astype(np.float32)
    target = rng.integers(0, 700, 3)
    found = []
    for order in ORDERS:
        with emulated_cuda.scheduled(Schedule(order)):
            found.append(np.column_stack(kernels.softmax_cross_entropy(x, target)))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
