"""Pools against plain loops, PyTorch, and their adjoints."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.geometry import pool2d_geometry
from tests.kernels import references as reference
from tests.kernels.memory import MEMORIES, assert_close, laid_out

# x shape, kernel_size, stride, padding, dilation, ceil_mode
MAX_CASES = {
    "resnet": ((2, 3, 9, 8), 3, 2, 1, 1, False),
    "no_overlap": ((1, 2, 6, 7), 2, None, 0, 1, False),
    "pairs": ((2, 3, 7, 9), (3, 2), (1, 3), (1, 0), 1, False),
    "gaps": ((1, 2, 9, 9), 2, 4, 0, 1, False),
    "dilation": ((2, 2, 9, 8), 2, 1, 1, (2, 3), False),
    "ceil_mode": ((2, 2, 6, 8), 3, 2, 0, 1, True),
    "ceil_mode_padding": ((1, 2, 5, 6), 3, 3, 1, 1, True),
    "global": ((2, 3, 4, 5), (4, 5), None, 0, 1, False),
    "one_pixel": ((1, 1, 1, 1), 1, None, 0, 1, False),
    "empty_batch": ((0, 3, 6, 6), 2, 2, 0, 1, False),
}
AVERAGE_CASES = {name: case for name, case in MAX_CASES.items() if case[4] == 1}
DIVISORS = [(True, None), (False, None), (True, 5)]


def windows_of(case):
    """Give the reference's windows of both axes."""
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


def average_geometry(case, divisor):
    return pool2d_geometry("avg_pool2d", *(case + divisor))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MAX_CASES)
def test_max_pool_matches_plain_loops(name, dtype, place, rng):
    case = MAX_CASES[name]
    geometry = pool2d_geometry("max_pool2d", *case)
    x = rng.integers(-3, 4, case[0]).astype(dtype)  # few values: many ties
    expected_out, expected_indices = reference.max_pool2d(x, *windows_of(case))
    out, indices = place("max_pool2d", x, geometry)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_array_equal(indices, expected_indices)
    grad = rng.standard_normal(out.shape).astype(dtype)
    scattered = place("max_pool2d_scatter", grad, indices, geometry)
    expected = reference.max_pool2d_scatter(grad, indices, x.shape)
    assert_close(scattered, expected, dtype)
    y = rng.standard_normal(x.shape).astype(dtype)
    gathered = place("max_pool2d_gather", y, indices, geometry)
    np.testing.assert_array_equal(gathered, reference.max_pool2d_gather(y, indices))


def test_max_pool_of_special_values(place):
    nan, inf = np.nan, np.inf
    x = np.array([[[[nan, 1.0, -inf, -inf], [2.0, nan, -inf, -inf], [0.0, -0.0, inf, nan]]]])
    geometry = pool2d_geometry("max_pool2d", x.shape, (2, 2), (1, 2))
    out, indices = place("max_pool2d", x, geometry)
    np.testing.assert_array_equal(out, [[[[nan, -inf], [nan, nan]]]])
    np.testing.assert_array_equal(indices, [[[[5, 2], [5, 11]]]])


def test_padding_never_wins_against_minus_infinity(place):
    x = np.full((1, 1, 2, 2), -np.inf)
    out, indices = place("max_pool2d", x, pool2d_geometry("max_pool2d", x.shape, 2, 1, 1))
    assert np.isneginf(out).all()
    np.testing.assert_array_equal(indices, [[[[0, 0, 1], [0, 0, 1], [2, 2, 3]]]])


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_average_matches_plain_loops(name, dtype, divisor, place, rng):
    case = AVERAGE_CASES[name]
    geometry = average_geometry(case, divisor)
    x = rng.standard_normal(case[0]).astype(dtype)
    padding = case[3] if isinstance(case[3], tuple) else (case[3], case[3])
    rows, columns = windows_of(case)
    expected = reference.avg_pool2d(x, rows, columns, padding, *divisor)
    assert_close(place("avg_pool2d", x, geometry), expected, dtype)


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_average_and_its_gradient_are_adjoint(name, divisor, place, rng):
    geometry = average_geometry(AVERAGE_CASES[name], divisor)
    x = rng.standard_normal(geometry.input_shape)
    grad = rng.standard_normal(geometry.output_shape)
    forward = np.vdot(place("avg_pool2d", x, geometry), grad)
    backward = np.vdot(x, place("avg_pool2d_grad", grad, geometry))
    np.testing.assert_allclose(backward, forward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAX_CASES)
def test_scatter_and_gather_are_adjoint(name, place, rng):
    geometry = pool2d_geometry("max_pool2d", *MAX_CASES[name])
    x = rng.standard_normal(geometry.input_shape)
    grad = rng.standard_normal(geometry.output_shape)
    out, indices = place("max_pool2d", x, geometry)
    np.testing.assert_array_equal(place("max_pool2d_gather", x, indices, geometry), out)
    scattered = place("max_pool2d_scatter", grad, indices, geometry)
    np.testing.assert_allclose(np.vdot(x, scattered), np.vdot(out, grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", MEMORIES)
def test_any_strides(memory, place, rng):
    geometry = pool2d_geometry("max_pool2d", *MAX_CASES["resnet"])
    x = rng.standard_normal(geometry.input_shape)
    grad = rng.standard_normal(geometry.output_shape)
    out, indices = place("max_pool2d", x, geometry)
    calls = [
        ("max_pool2d_scatter", grad, indices),
        ("max_pool2d_gather", x, indices),
        ("avg_pool2d", x),
        ("avg_pool2d_grad", grad),
    ]
    awkward, awkward_indices = place("max_pool2d", laid_out(x, memory), geometry)
    np.testing.assert_array_equal(awkward, out)
    np.testing.assert_array_equal(awkward_indices, indices)
    for kernel, *arrays in calls:
        moved = [laid_out(array, memory) if array is not indices else array for array in arrays]
        expected = place(kernel, *arrays, geometry)
        np.testing.assert_array_equal(place(kernel, *moved, geometry), expected)


def test_a_global_average_of_many_pixels_keeps_its_digits():
    x = np.full((1, 2, 300, 300), 0.1, np.float32)
    geometry = pool2d_geometry("avg_pool2d", x.shape, 300)
    np.testing.assert_array_equal(
        kernels.avg_pool2d(x, geometry), np.full((1, 2, 1, 1), x[0, 0, 0, 0])
    )


@pytest.mark.parametrize(
    ("kernel", "wrong", "shapes"),
    [
        ("max_pool2d", "x", [(1, 2, 4, 5)]),
        ("avg_pool2d", "x", [(1, 2, 4, 5)]),
        ("avg_pool2d_grad", "grad", [(1, 2, 4, 4)]),
        ("max_pool2d_scatter", "grad", [(1, 2, 4, 4), (1, 2, 2, 2)]),
        ("max_pool2d_scatter", "indices", [(1, 2, 2, 2), (1, 2, 4, 4)]),
        ("max_pool2d_gather", "x", [(1, 2, 2, 2), (1, 2, 2, 2)]),
        ("max_pool2d_gather", "indices", [(1, 2, 4, 4), (1, 2, 4, 4)]),
    ],
)
def test_arrays_that_do_not_fit_the_geometry_are_refused(kernel, wrong, shapes):
    geometry = pool2d_geometry("pool", (1, 2, 4, 4), 2)
    match = rf"{kernel}: {wrong} must have the shape that fits .*; got {wrong}\.shape="
    with pytest.raises(ValueError, match=match):
        getattr(kernels, kernel)(*map(np.zeros, shapes), geometry)


@pytest.mark.parametrize("name", MAX_CASES)
def test_max_pool_matches_pytorch(name, place, rng):
    torch = pytest.importorskip("torch")
    x_shape, *attributes = MAX_CASES[name]
    geometry = pool2d_geometry("max_pool2d", x_shape, *attributes)
    x = rng.integers(-3, 4, x_shape).astype(np.float64)
    x[rng.random(x_shape) < 0.1] = np.nan
    torch_x = torch.tensor(x, requires_grad=True)
    expected, positions = torch.nn.functional.max_pool2d(torch_x, *attributes, return_indices=True)
    out, indices = place("max_pool2d", x, geometry)
    np.testing.assert_array_equal(out, expected.detach().numpy())
    np.testing.assert_array_equal(indices, positions.numpy())
    grad = rng.standard_normal(out.shape)
    expected.backward(torch.tensor(grad))
    scattered = place("max_pool2d_scatter", grad, indices, geometry)
    assert_close(scattered, torch_x.grad.numpy(), np.float64)


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("name", AVERAGE_CASES)
def test_average_matches_pytorch(name, divisor, place, rng):
    torch = pytest.importorskip("torch")
    x_shape, kernel_size, stride, padding, _, ceil_mode = AVERAGE_CASES[name]
    geometry = average_geometry(AVERAGE_CASES[name], divisor)
    x = rng.standard_normal(x_shape)
    torch_x = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.avg_pool2d(
        torch_x, kernel_size, stride, padding, ceil_mode, *divisor
    )
    assert_close(place("avg_pool2d", x, geometry), expected.detach().numpy(), np.float64)
    grad = rng.standard_normal(geometry.output_shape)
    expected.backward(torch.tensor(grad))
    assert_close(place("avg_pool2d_grad", grad, geometry), torch_x.grad.numpy(), np.float64)
