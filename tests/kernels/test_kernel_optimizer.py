"""Optimizers over many arrays against their formulas, one array at a time."""

import importlib
from typing import Any

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu.optimizer import PIECE
from tests.kernels.memory import MEMORIES, laid_out

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
SGD |= {"nesterov": False, "maximize": False}
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.01}
ADAM |= {"decoupled": False, "maximize": False}
SHAPES = [(), (1,), (0, 3), (7,), (5, 3), (3, 2, 4, 5), (PIECE + 5,), (2 * PIECE,)]


def changed(options: dict[str, Any]) -> Any:
    return SGD | options


@pytest.fixture(params=["cpu", "cuda_on_numpy"])
def optimizer(request):
    cuda = "gradengine.kernels.cuda.optimizer"
    return kernels if request.param == "cpu" else importlib.import_module(cuda)


def arrays(rng, shapes=SHAPES, dtype: Any = np.float32, rows=2):
    return [
        [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes] for _ in range(rows)
    ]


def copies(row):
    return [array.copy(order="K") for array in row]


def sgd_by_formula(value, grad, velocity, fresh, options):
    value, grad = value.copy(), -grad if options["maximize"] else grad
    if options["weight_decay"]:
        grad = grad + options["weight_decay"] * value
    if options["momentum"]:
        moved = velocity * options["momentum"] + (1 - options["dampening"]) * grad
        velocity = grad if fresh else moved
        grad = grad + options["momentum"] * velocity if options["nesterov"] else velocity
    return value - options["lr"] * grad, velocity


def adam_by_formula(value, grad, average, square, step, options):
    grad = -grad if options["maximize"] else grad
    if options["decoupled"]:
        value = value * (1 - options["lr"] * options["weight_decay"])
    elif options["weight_decay"]:
        grad = grad + options["weight_decay"] * value
    first, second = options["betas"]
    average = average * first + (1 - first) * grad
    square = square * second + (1 - second) * (grad * grad)
    root = np.sqrt(square) / (1 - second**step) ** 0.5 + options["eps"]
    return value - (options["lr"] / (1 - first**step)) * (average / root), average, square


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"momentum": 0, "dampening": 0},
        {"weight_decay": 0},
        {"maximize": True},
        {"nesterov": True, "dampening": 0},
    ],
)
def test_sgd_is_its_formula_to_the_last_bit(change, dtype, optimizer, rng):
    options = SGD | change
    values, grads, velocities = arrays(rng, dtype=dtype, rows=3)
    fresh = [place % 2 == 0 for place in range(len(values))]
    given = zip(values, grads, velocities, fresh, strict=True)
    wanted = [sgd_by_formula(*each, options) for each in given]
    kept = copies(grads)
    if options["momentum"]:
        optimizer.sgd(values, grads, velocities, fresh, **options)
        assert_equal(velocities, [velocity for _, velocity in wanted])
    else:
        optimizer.sgd(values, grads, [], [], **options)
    assert_equal(values, [value for value, _ in wanted])
    assert_equal(grads, kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "change", [{}, {"decoupled": True}, {"weight_decay": 0}, {"maximize": True}]
)
def test_adam_is_its_formula_to_the_last_bit(change, dtype, optimizer, rng):
    options = ADAM | change
    values, grads, averages, squares = arrays(rng, dtype=dtype, rows=4)
    squares = [np.asarray(square * square) for square in squares]
    steps = [1 + place for place in range(len(values))]
    given = zip(values, grads, averages, squares, steps, strict=True)
    wanted = zip(*[adam_by_formula(*each, options) for each in given], strict=True)
    optimizer.adam(values, grads, averages, squares, steps, **options)
    for found, row in zip((values, averages, squares), wanted, strict=True):
        assert_equal(found, row)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("memory", [m for m in MEMORIES if m != "read_only"])
def test_any_strides(memory, row, rng):
    shapes = [(3, 2, 4, 5), (2, 1, 3, 1)]
    given = arrays(rng, shapes, rows=3)
    moved = [copies(each) for each in given]
    moved[row] = [laid_out(array, memory) for array in moved[row]]
    for values, grads, velocities in (given, moved):
        kernels.sgd(values, grads, velocities, [False, True], **SGD)
    for one, other in zip(given, moved, strict=True):
        assert_equal(one, other)


def test_gradients_may_be_read_only_repeated_or_of_another_dtype(rng):
    (values,) = arrays(rng, [(4, 3)] * 3, rows=1)
    expected = [value - 0.5 * 0.25 for value in values]
    grads = [np.broadcast_to(np.float32(0.25), (4, 3)), np.full((4, 3), 0.25), expected[0] * 0]
    grads[2] += 0.25
    grads[2].flags.writeable = False
    kernels.sgd(values, grads, [], [], **changed({"lr": 0.5, "momentum": 0, "weight_decay": 0}))
    assert_equal(values, expected)


def test_gradients_may_be_scalars():
    value = np.array(2.0)
    kernels.sgd([value], [np.float64(0.5)], [], [], **changed({"momentum": 0, "weight_decay": 0}))
    assert value == 2.0 - 0.1 * 0.5


def test_float16_is_computed_in_float32(rng):
    values, grads, velocities = arrays(rng, [(3, 4)], np.float16, rows=3)
    value, grad, velocity = (row[0].astype(np.float32) for row in (values, grads, velocities))
    wanted, velocity = sgd_by_formula(value, grad, velocity, False, SGD)
    kernels.sgd(values, grads, velocities, [False], **SGD)
    np.testing.assert_array_equal(values[0], wanted.astype(np.float16))
    np.testing.assert_array_equal(velocities[0], velocity.astype(np.float16))


def test_arrays_that_do_not_fit_are_refused(rng):
    values, grads = arrays(rng, [(3, 4)])
    short = [np.zeros((3, 3), np.float32)]
    with pytest.raises(ValueError, match=r"sgd: grads must have .* got grads\.shape=\(3, 3\)"):
        kernels.sgd(values, short, grads, [True], **SGD)
    with pytest.raises(ValueError, match="sgd: velocities must have"):
        kernels.sgd(values, grads, short, [True], **SGD)
    with pytest.raises(ValueError, match="adam: squares must have"):
        kernels.adam(values, grads, grads, short, [1], **ADAM)


def test_a_read_only_value_is_not_written(rng):
    values, grads = arrays(rng, [(3, 4)])
    values[0].flags.writeable = False
    before = values[0].copy()
    with pytest.raises(ValueError, match="read-only"):
        kernels.sgd(values, grads, [], [], **changed({"momentum": 0}))
    np.testing.assert_array_equal(values[0], before)
