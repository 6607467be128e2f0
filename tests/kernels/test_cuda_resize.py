"""Weighted sums along an axis on CUDA: 16-bit pixels, whole vectors, pixels that are copied."""

import numpy as np
import pytest

from gradengine.devices import import_cupy
from gradengine.kernels.cuda import resize

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
ROUNDING = dict(zip(DTYPES, (2**-11, 2**-8, 1e-6, 1e-15), strict=True))
POSITIONS = np.array([[0, 1, -1], [3, -1, 3], [-1, -1, -1], [2, 0, 1], [-1, 2, -1]])


def by_definition(x, positions, weights, axis):
    moved = np.moveaxis(x.astype(np.float64), axis, 0)
    out = np.zeros((len(positions), *moved.shape[1:]))
    for place, tap in np.ndindex(*positions.shape):
        if positions[place, tap] >= 0:
            out[place] += weights[place, tap] * moved[positions[place, tap]]
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 16), 0), ((4, 3, 37), 0), ((2, 4, 16), 1), ((6, 4, 3), 1), ((6, 4), 1)],
)
def test_matches_its_definition(shape, axis, dtype, cuda_place, rng):
    weights = rng.standard_normal(POSITIONS.shape)
    x = rng.standard_normal(shape).astype(dtype)
    expected = by_definition(x, POSITIONS, weights, axis)
    room = np.zeros(x.size + 1, dtype)
    room[1:] = x.ravel()
    for given in (x, np.asfortranarray(x), room[1:].reshape(shape)):
        found = cuda_place("weigh", given, POSITIONS, weights, axis)
        np.testing.assert_allclose(
            found.astype(np.float64), expected, rtol=2 * ROUNDING[dtype], atol=4 * ROUNDING[dtype]
        )


@pytest.mark.parametrize("dtype", [*"bhil?BHIL", np.complex128])
@pytest.mark.parametrize(("shape", "axis"), [((4, 16), 0), ((2, 4, 3), 1), ((5, 4), 1)])
def test_other_dtypes_are_copied(shape, axis, dtype, emulated_cuda, rng):
    x = rng.integers(0, 2, shape).astype(dtype)
    positions = np.array([[3], [0], [-1], [0], [2], [1]])
    found = resize.weigh(x, positions, np.ones(positions.shape), axis)
    assert found.dtype == x.dtype
    expected = np.take(x, positions[:, 0], axis=axis)
    np.moveaxis(expected, axis, 0)[2] = 0
    np.testing.assert_array_equal(found, expected)


def test_nothing_to_add_up(emulated_cuda):
    x = np.ones((4, 0, 3), np.float32)
    assert resize.weigh(x, POSITIONS, np.ones(POSITIONS.shape), 0).shape == (5, 0, 3)
    assert resize.weigh(np.ones((4, 3)), POSITIONS[:0], np.ones((0, 3)), 0).shape == (0, 3)
    none = resize.weigh(np.ones((4, 3)), POSITIONS[:, :0], np.ones((5, 0)), 0)
    np.testing.assert_array_equal(none, np.zeros((5, 3)))


def test_tables_are_copied_to_the_device_once(emulated_cuda, rng):
    resize._kept_table.cache_clear()
    x = rng.standard_normal((4, 6))
    weights = np.ones(POSITIONS.shape)
    for _ in range(3):
        resize.weigh(x, POSITIONS.copy(), weights.copy(), 0)
    counts = resize._kept_table.cache_info()
    assert (counts.misses, counts.hits) == (2, 4)
    changed = resize.weigh(x, POSITIONS, 2 * weights, 0)
    np.testing.assert_array_equal(changed, 2 * resize.weigh(x, POSITIONS, weights, 0))


@pytest.mark.gpu
def test_a_repeated_call_can_be_captured_into_a_graph(rng):
    cupy = import_cupy()
    x = cupy.asarray(rng.standard_normal((4, 6)))
    weights = rng.standard_normal(POSITIONS.shape)
    resize.weigh(x, POSITIONS, weights, 0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out = resize.weigh(x, POSITIONS, weights, 0)
        graph = stream.end_capture()
    x *= 2
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    expected = by_definition(cupy.asnumpy(x), POSITIONS, weights, 0)
    np.testing.assert_allclose(cupy.asnumpy(out), expected, rtol=1e-14, atol=1e-14)
