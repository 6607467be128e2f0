"""Pools on CUDA: every element type, whole vectors of channels and single ones, large windows."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cuda import launch
from gradengine.kernels.geometry import pool2d_geometry
from tests.emulator.emulator import ORDERS, Schedule
from tests.kernels import references as reference
from tests.kernels.memory import laid_out

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
ROUNDING = dict(zip(DTYPES, (2**-11, 2**-8, 1e-6, 1e-15), strict=True))
DIVISORS = [(True, None), (False, None), (True, -3)]

# x shape, kernel_size, stride, padding, dilation, ceil_mode. 24 channels are whole vectors of any dtype, 4
# those of float32 and float64 alone.
CASES = {
    "resnet": ((2, 24, 9, 8), 3, 2, 1, 1, False),
    "half_vectors": ((2, 4, 5, 6), 2, 1, 0, 1, False),
    "wide_window": ((1, 8, 4, 9), (1, 5), (1, 2), (0, 2), 1, False),
    "several_blocks": ((2, 9, 3, 40), 2, (1, 3), (1, 0), 1, False),
    "dilation": ((1, 8, 9, 11), (3, 4), (2, 3), (1, 2), (2, 3), False),
    "ceil_mode": ((2, 8, 6, 7), 3, 2, 1, 1, True),
}
AVERAGE_CASES = {name: case for name, case in CASES.items() if case[4] == 1} | {
    "global": ((3, 512, 7, 7), 7, None, 0, 1, False),
    "global_few_channels": ((2, 3, 7, 9), (7, 9), None, 0, 1, False),
    "large": ((2, 40, 9, 11), 7, 2, 3, 1, True),
    "largest": ((1, 8, 25, 24), 24, 9, 12, 1, False),
}


def windows_of(case):
    x_shape, kernel_size, stride, padding, dilation, ceil_mode = case
    kernel, step, margin, spread = (
        value if isinstance(value, tuple) else (value, value)
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    return [
        reference.windows(
            x_shape[2 + axis], kernel[axis], step[axis], margin[axis], spread[axis], ceil_mode
        )
        for axis in (0, 1)
    ]


def assert_rounded(got, expected, dtype):
    """Compare with what was computed in float64, but for its rounding to dtype."""
    scale = np.abs(expected).max(initial=1.0)
    tolerance = 2 * ROUNDING[dtype]
    np.testing.assert_allclose(
        got.astype(np.float64), expected, rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_max_pool_matches_plain_loops(name, dtype, cuda_place, rng):
    case = CASES[name]
    geometry = pool2d_geometry("max_pool2d", *case)
    x = rng.integers(-3, 4, case[0]).astype(dtype)  # few values: many ties
    x[rng.random(x.shape) < 0.1] = np.nan
    x[rng.random(x.shape) < 0.3] = -np.inf
    expected, expected_indices = reference.max_pool2d(x, *windows_of(case))
    out, indices = cuda_place("max_pool2d", x, geometry)
    np.testing.assert_array_equal(out.astype(np.float64), expected)
    np.testing.assert_array_equal(indices, expected_indices)
    y = rng.standard_normal(case[0]).astype(dtype)
    gathered = cuda_place("max_pool2d_gather", y, indices, geometry)
    np.testing.assert_array_equal(gathered, reference.max_pool2d_gather(y, indices).astype(dtype))
    grad = rng.standard_normal(out.shape).astype(dtype)
    scattered = cuda_place("max_pool2d_scatter", grad, indices, geometry)
    expected = reference.max_pool2d_scatter(grad.astype(np.float64), indices, x.shape)
    assert_rounded(scattered, expected, dtype)


@pytest.mark.parametrize("channels", [1, 8])
def test_positions_outside_their_windows_count_for_nothing(channels, cuda_place):
    geometry = pool2d_geometry("max_pool2d", (1, channels, 4, 5), 2, 2, 0, (2, 3))
    shape = geometry.output_shape
    grad = np.ones(shape, np.float32)
    # window (0, 0) reads (0, 0), (0, 3), (2, 0), (2, 3) alone
    for position, count in ((-1, 0), (0, 1), (1, 0), (5, 0), (13, 1), (20, 0), (2**31 - 1, 0)):
        indices = np.full(shape, position, np.int32)
        scattered = cuda_place("max_pool2d_scatter", grad, indices, geometry)
        assert scattered.sum() == count * channels
        pixels = np.ones(geometry.input_shape, np.float32)
        gathered = cuda_place("max_pool2d_gather", pixels, indices, geometry)
        assert (gathered == (0 <= position < 20)).all()


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_average_matches_plain_loops(name, dtype, divisor, cuda_place, rng):
    case = AVERAGE_CASES[name]
    geometry = pool2d_geometry("avg_pool2d", *case, *divisor)
    x = rng.standard_normal(case[0]).astype(dtype)
    padding = case[3] if isinstance(case[3], tuple) else (case[3], case[3])
    rows, columns = windows_of(case)
    wide = x[:, :8].astype(np.float64)  # plain loops take their time: a few channels of many
    expected = reference.avg_pool2d(wide, rows, columns, padding, *divisor)
    out = cuda_place("avg_pool2d", x, geometry)
    assert_rounded(out[:, :8], expected, dtype)
    mean = cuda_place("avg_pool2d", x.astype(np.float64), geometry)
    assert_rounded(out, mean, dtype)


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_the_gradient_of_an_average_is_its_adjoint(name, dtype, divisor, cuda_place, rng):
    geometry = pool2d_geometry("avg_pool2d", *AVERAGE_CASES[name], *divisor)
    x = rng.standard_normal(geometry.input_shape)
    grad = rng.standard_normal(geometry.output_shape).astype(dtype)
    forward = np.vdot(cuda_place("avg_pool2d", x, geometry), grad.astype(np.float64))
    found = cuda_place("avg_pool2d_grad", grad, geometry)
    exact = cuda_place("avg_pool2d_grad", grad.astype(np.float64), geometry)
    np.testing.assert_allclose(np.vdot(x, exact), forward, rtol=1e-11, atol=1e-11)
    assert_rounded(found, exact, dtype)


@pytest.mark.parametrize("memory", ["nchw", "strided", "read_only", "not_aligned"])
def test_any_memory(memory, cuda_place, rng):
    geometry = pool2d_geometry("max_pool2d", *CASES["resnet"])

    def moved(array):
        if memory != "not_aligned":
            return laid_out(array, memory if array.dtype != np.int32 else "nchw")
        n, c, h, w = array.shape
        room = np.zeros(array.size + 1, array.dtype)
        room[1:] = array.transpose(0, 2, 3, 1).ravel()
        return room[1:].reshape(n, h, w, c).transpose(0, 3, 1, 2)

    x = rng.standard_normal(geometry.input_shape).astype(np.float16)
    grad = rng.standard_normal(geometry.output_shape).astype(np.float16)
    out, indices = cuda_place("max_pool2d", x, geometry)
    found = cuda_place("max_pool2d", moved(x), geometry)
    np.testing.assert_array_equal(found[0], out)
    np.testing.assert_array_equal(found[1], indices)
    for kernel, *arrays in (
        ("max_pool2d_scatter", grad, indices),
        ("max_pool2d_gather", x, indices),
        ("avg_pool2d", x),
        ("avg_pool2d_grad", grad),
    ):
        expected = cuda_place(kernel, *arrays, geometry)
        np.testing.assert_array_equal(cuda_place(kernel, *map(moved, arrays), geometry), expected)


def test_the_average_of_many_pixels_in_float16(cuda_place):
    # 4900 pixels of 0.1 add up to 490, where float16 is spaced by 0.25: the sum is in float32.
    x = np.full((1, 1, 70, 70), 0.1, np.float16)
    geometry = pool2d_geometry("avg_pool2d", x.shape, 70)
    np.testing.assert_array_equal(cuda_place("avg_pool2d", x, geometry), x[:, :, :1, :1])


def test_gradients_of_many_windows_add_up_in_float16(cuda_place):
    x = np.zeros((1, 1, 65, 65), np.float16)
    average = pool2d_geometry("avg_pool2d", x.shape, 64, 1, divisor_override=10)
    by_x = cuda_place("avg_pool2d_grad", np.ones(average.output_shape, np.float16), average)
    np.testing.assert_array_equal(by_x[0, 0, 32, 32], np.float16(0.4))  # of 4 windows
    x = np.zeros((1, 1, 91, 91), np.float16)
    x[0, 0, 45, 45] = 1
    largest = pool2d_geometry("max_pool2d", x.shape, 46, 1)
    out, indices = cuda_place("max_pool2d", x, largest)
    assert out.all()
    # 2116 windows share the pixel; adding ones in float16 would end at 2048.
    by_x = cuda_place("max_pool2d_scatter", out, indices, largest)
    np.testing.assert_array_equal(by_x, 2116 * x)


@pytest.mark.parametrize("kernel_size", [2, 6])
def test_an_empty_batch(kernel_size, cuda_place):
    geometry = pool2d_geometry("pool", (0, 8, 6, 6), kernel_size)
    x, grad = np.ones(geometry.input_shape), np.ones(geometry.output_shape)
    assert cuda_place("max_pool2d", x, geometry)[0].shape == geometry.output_shape
    assert cuda_place("avg_pool2d", x, geometry).shape == geometry.output_shape
    assert cuda_place("avg_pool2d_grad", grad, geometry).shape == x.shape
    indices = np.zeros(grad.shape, np.int32)
    assert cuda_place("max_pool2d_scatter", grad, indices, geometry).shape == x.shape
    assert cuda_place("max_pool2d_gather", x, indices, geometry).shape == grad.shape


def test_the_order_of_threads_changes_no_bit(emulated_cuda, rng):
    geometry = pool2d_geometry("avg_pool2d", *AVERAGE_CASES["large"])
    x = rng.standard_normal(geometry.input_shape).astype(np.float32)
    found = []
    for order in ORDERS:
        with emulated_cuda.scheduled(Schedule(order)):
            found.append(kernels.avg_pool2d(x, geometry))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_whole_vectors_of_channels_are_used(emulated_cuda):
    geometry = pool2d_geometry("max_pool2d", *CASES["resnet"])
    kernels.max_pool2d(np.zeros(geometry.input_shape, np.float16), geometry)
    kernels.avg_pool2d(np.zeros(geometry.input_shape, BFLOAT16), geometry)
    assert {name for _, _, name in launch._kernels} >= {
        "max_pool2d<float16, 8>",
        "avg_pool2d<bfloat16, 8>",
    }
