"""Elementwise formulas against their definitions in float64, for every dtype, memory and broadcast."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from gradengine import kernels
from gradengine.kernels.cpu.elementwise import ARITHMETIC_SIZE
from tests.kernels.memory import MEMORIES, laid_out

SIZE = kernels.PARALLEL_SIZE + 37  # more than one piece, and a rest
LARGE = ARITHMETIC_SIZE + 37


def _gelu_inner(x):
    return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def _gelu_tanh_grad(grad, x):
    curve = np.tanh(_gelu_inner(x))
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x)
    return grad * (0.5 * (1 + curve) + 0.5 * x * (1 - curve * curve) * slope)


def _silu_grad(grad, x):
    share = scipy.special.expit(x)
    return grad * share * (1 + x * (1 - share))


def _gelu_grad(grad, x):
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return grad * (scipy.special.ndtr(x) + x * density)


OF_ONE = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": scipy.special.expit,
    "silu": lambda x: x * scipy.special.expit(x),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(_gelu_inner(x))),
}
OF_TWO = {
    "relu_grad": lambda grad, out: np.where(out == 0, 0, grad),
    "sigmoid_grad": lambda grad, out: grad * (out - out * out),
    "tanh_grad": lambda grad, out: grad * (1 - out * out),
    "silu_grad": _silu_grad,
    "gelu_grad": _gelu_grad,
    "gelu_tanh_grad": _gelu_tanh_grad,
}
ON_CPU = {
    **{"exp": np.exp, "tanh": np.tanh, "square": np.square},
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide},
    "rsub": lambda x, y: y - x,
    "square_grad": lambda grad, x: grad * 2 * x,
}
FORMULAS = OF_ONE | OF_TWO | ON_CPU
ALONE = (*OF_ONE, "exp", "tanh", "square")  # formulas of one number


def computed(name, *operands) -> np.ndarray:
    """Compute a formula for which the CPU must have a kernel."""
    out = kernels.elementwise(name, *operands)
    assert out is not None
    return out


def draw(name, rng, shape, dtype):
    """Give operands for a formula."""
    return [(rng.standard_normal(shape) * 2).astype(dtype) for _ in range(1 + (name not in ALONE))]


def assert_exact(found, name, given):
    """Compare with float64, to some roundings of the result or of what is added up to it."""
    rounding = 8 * np.finfo(found.dtype).eps
    expected = FORMULAS[name](*(x.astype(np.float64) for x in given))
    scale = max(1, *(float(np.abs(x).max()) for x in given))
    if name == "gelu_tanh_grad":  # 1 - tanh^2, which has few digits, times about x^3 / 10
        scale **= 3
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OF_ONE | OF_TWO)
def test_every_formula(name, dtype, place, rng):
    given = draw(name, rng, SIZE if place.name == "cpu" else 2051, dtype)
    found = place.formula(name, *given)
    assert found.dtype == dtype
    assert_exact(found, name, given)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ON_CPU)
def test_formulas_of_the_cpu(name, dtype, rng):
    given = draw(name, rng, LARGE, dtype)
    assert_exact(computed(name, *given), name, given)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("formula", OF_ONE | OF_TWO)
def test_short_floats(formula, name, cuda_place, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    given = draw(formula, rng, 1003, dtype)
    found = cuda_place.formula(formula, *given)
    assert found.dtype == dtype
    expected = FORMULAS[formula](*(x.astype(np.float64) for x in given))
    rounding = 2**-8 if name == "bfloat16" else 2**-11
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["silu", "silu_grad"])
def test_memory_on_cuda(name, memory, cuda_place, rng):
    given = [laid_out(x, memory) for x in draw(name, rng, (2, 3, 8, 9), np.float32)]
    assert_exact(cuda_place.formula(name, *given), name, given)
    given[-1] = laid_out(given[-1], "nhwc" if memory == "nchw" else "nchw")
    assert_exact(cuda_place.formula(name, *given), name, given)
    given[0] = np.broadcast_to(given[0][:1, :1, :1, :1], given[0].shape)
    assert_exact(cuda_place.formula(name, *given), name, given)


IMAGES = (4, 17, 64, 65)
BROADCAST = [  # shapes of operands, both ways round
    *(((523, 512), shape) for shape in [(512,), (1, 512), (523, 1), (1, 1), (), (523, 512)]),
    *((IMAGES, shape) for shape in [(17, 1, 1), (64, 65), (65,), (4, 1, 1, 1), (1, 17, 64, 65)]),
    ((1, 17, 128, 128), (17, 1, 1)),
]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_broadcasting(shapes, swapped, rng):
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    given = (y, x) if swapped else (x, y)
    np.testing.assert_array_equal(computed("div", *given), np.divide(*given))


@pytest.mark.parametrize("other", ["nhwc", "channels", "number", "expanded"])
def test_results_lie_as_the_largest_operand(other, rng):
    x = laid_out(rng.standard_normal(IMAGES), "nhwc")
    y = {
        "nhwc": laid_out(rng.standard_normal(IMAGES), "nhwc"),
        "channels": rng.standard_normal((17, 1, 1)),
        "number": 2.5,
        "expanded": np.broadcast_to(np.array(0.5), IMAGES),
    }[other]
    out = computed("sub", x, y)
    assert out.strides == x.strides
    np.testing.assert_array_equal(out, x - y)
    np.testing.assert_array_equal(computed("sub", y, x), y - x)


def test_what_numpy_computes_as_well_has_no_kernel(rng):
    x = rng.standard_normal(IMAGES)
    computed("add", x, x)
    read_only = x.copy()
    read_only.flags.writeable = False
    for given in (
        (x[:1], x[:1]),  # small
        (x.astype(np.float16), x.astype(np.float16)),
        (x, x.astype(np.float32)),
        (x, laid_out(x, "nhwc")),
        (x[..., :-1], x[..., :-1]),  # with gaps
        (x, x[::-1]),
        (x, read_only),
        (x[:, :, :, :1], x[:1]),  # each is smaller than the result
        (np.broadcast_to(x[0, 0, 0, ::-1], x.shape), 2.0),  # nothing is as large
        (x, x[:3]),  # shapes that do not fit
        (x, np.ones((1,) * 5)),  # the result has more axes than the largest
        (rng.standard_normal((100_000, 3)), np.ones(3)),  # short rows
    ):
        assert kernels.elementwise("add", *given) is None
    assert kernels.elementwise("floor", x) is None


def test_special_values(rng):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1000, -1000, -745.0, 709.7, 1e-310])
    for dtype in (np.float32, np.float64):
        given = np.tile(x.astype(dtype), SIZE)
        with np.errstate(all="ignore"):
            for name in ("exp", "tanh", "sigmoid"):
                found = computed(name, given)[: len(x)]
                expected = FORMULAS[name](x.astype(dtype))
                np.testing.assert_allclose(
                    found, expected, rtol=4 * float(np.finfo(dtype).eps), atol=5e-324
                )
                np.testing.assert_array_equal(np.signbit(found[:4]), np.signbit(expected[:4]))


def test_exponential_is_exact_where_it_is_subnormal():
    for dtype, low in ((np.float32, -104), (np.float64, -746)):
        x = np.linspace(low, low + 30, SIZE).astype(dtype)
        smallest = float(np.finfo(dtype).smallest_subnormal)
        found = computed("exp", x)
        np.testing.assert_allclose(
            found, np.exp(x), rtol=4 * float(np.finfo(dtype).eps), atol=smallest
        )
        assert 0 < (found == 0).sum() < SIZE / 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_smooth_functions_are_exact_where_they_are_small(dtype):
    x = np.concatenate([-np.logspace(-30, 0.7, SIZE // 2), np.logspace(-30, 0.7, SIZE // 2 + 1)])
    x = x.astype(dtype)
    for name, roundings in (("tanh", 4), ("gelu", 70), ("silu", 8)):
        expected = FORMULAS[name](x.astype(np.float64))
        rounding = roundings * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(computed(name, x), expected, rtol=rounding)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_is_exact_wherever_it_is_small(dtype, place):
    x = np.concatenate([np.linspace(-80, 20, 1001), [-np.inf, np.inf, np.nan, 0, -1e4, 1e4]])
    room = np.zeros(SIZE, dtype)
    room[: len(x)] = x
    found = place.formula("sigmoid", room if place.name == "cpu" else room[: len(x)])[: len(x)]
    rounding = 4 * float(np.finfo(dtype).eps)
    expected = scipy.special.expit(x[:1001].astype(dtype).astype(np.float64))
    np.testing.assert_allclose(found[:1001], expected, rtol=rounding)
    np.testing.assert_array_equal(found[1001:], [0, 1, np.nan, 0.5, 0, 1])
