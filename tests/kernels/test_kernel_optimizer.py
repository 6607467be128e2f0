"""Optimizers over many arrays against their formulas, one array at a time."""

from typing import Any

import numpy as np
import pytest

from gradengine import kernels
from gradengine.devices import import_cupy, to_device
from gradengine.kernels.cpu.optimizer import PIECE
from gradengine.kernels.cuda import optimizer as on_cuda
from tests.kernels.memory import MEMORIES, laid_out

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
SGD |= {"nesterov": False, "maximize": False}
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.01}
ADAM |= {"decoupled": False, "maximize": False}
CHUNK = on_cuda.CHUNK
SHAPES = [(), (1,), (0, 3), (7,), (5, 3), (3, 2, 4, 5), (CHUNK + 5,), (2 * CHUNK,)]


def changed(options: dict[str, Any]) -> Any:
    return SGD | options


class Place:
    """Runs an optimizer somewhere on NumPy arrays, which it writes."""

    def __init__(self, name):
        self.name = name

    def sgd(self, values, grads, velocities, fresh, **options):
        with _Rows(self, values, grads, velocities) as rows:
            kernels.sgd(rows[0], rows[1], rows[2], fresh, options)

    def adam(self, values, grads, averages, squares, steps, **options):
        decoupled = options.pop("decoupled")
        states = [{"step": step} for step in steps]
        with _Rows(self, values, grads, averages, squares) as rows:
            values, grads, averages, squares = rows
            kernels.adam(values, grads, averages, squares, states, options, decoupled=decoupled)

    def assert_equal(self, found, wanted):
        """To the last bit on the CPU; a GPU multiplies and adds with one rounding."""
        for one, other in zip(found, wanted, strict=True):
            if self.name == "cpu":
                np.testing.assert_array_equal(one, other)
            else:
                accuracy = 8 * np.finfo(one.dtype).eps
                np.testing.assert_allclose(one, other, rtol=accuracy, atol=accuracy)


class _Rows:
    """The arrays where they are computed with; written ones are copied back."""

    def __init__(self, place, *rows):
        self.given = rows
        self.rows = rows
        if place.name == "cupy":
            self.rows = [[to_device(np.asarray(array), "cuda") for array in row] for row in rows]

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        if self.rows is not self.given:
            for row, given in zip(self.rows, self.given, strict=True):
                for array, target in zip(row, given, strict=True):
                    if isinstance(target, np.ndarray) and target.flags.writeable:
                        target[...] = import_cupy().asnumpy(array)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def place(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
    return Place(request.param)


def arrays(rng, shapes=SHAPES, dtype: Any = np.float32, rows=2):
    return [
        [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
        for _ in range(rows)
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


CHANGES = [
    {},
    {"momentum": 0, "dampening": 0},
    {"weight_decay": 0},
    {"maximize": True},
    {"nesterov": True, "dampening": 0},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_sgd_is_its_formula(change, dtype, place, rng):
    options = SGD | change
    values, grads, velocities = arrays(rng, dtype=dtype, rows=3)
    fresh = [place % 2 == 0 for place in range(len(values))]
    for velocity, starts in zip(velocities, fresh, strict=True):
        if starts:
            velocity[...] = np.nan  # what memory that was never written may hold
    given = zip(values, grads, velocities, fresh, strict=True)
    wanted = [sgd_by_formula(*each, options) for each in given]
    kept = copies(grads)
    if options["momentum"]:
        place.sgd(values, grads, velocities, fresh, **options)
        place.assert_equal(velocities, [velocity for _, velocity in wanted])
    else:
        place.sgd(values, grads, [], [], **options)
    place.assert_equal(values, [value for value, _ in wanted])
    np.testing.assert_equal(grads, kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "change", [{}, {"decoupled": True}, {"weight_decay": 0}, {"maximize": True}]
)
def test_adam_is_its_formula(change, dtype, place, rng):
    options = ADAM | change
    values, grads, averages, squares = arrays(rng, dtype=dtype, rows=4)
    squares = [np.asarray(square * square) for square in squares]
    steps = [1 + place for place in range(len(values))]
    given = zip(values, grads, averages, squares, steps, strict=True)
    wanted = zip(*[adam_by_formula(*each, options) for each in given], strict=True)
    place.adam(values, grads, averages, squares, steps, **options)
    for found, row in zip((values, averages, squares), wanted, strict=True):
        place.assert_equal(found, row)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("memory", [m for m in MEMORIES if m != "read_only"])
def test_any_strides(memory, row, place, rng):
    shapes = [(3, 2, 4, 5), (2, 1, 3, 1)]
    given = arrays(rng, shapes, rows=3)
    moved = [copies(each) for each in given]
    moved[row] = [laid_out(array, memory) for array in moved[row]]
    for rows in (given, moved):
        place.sgd(*rows, [False, True], **SGD)
    np.testing.assert_equal(given, moved)


def test_gradients_may_be_read_only_repeated_or_of_another_dtype(place, rng):
    (values,) = arrays(rng, [(4, 3)] * 3, rows=1)
    expected = [value - 0.5 * 0.25 for value in values]
    grads = [np.broadcast_to(np.float32(0.25), (4, 3)), np.full((4, 3), 0.25), expected[0] * 0]
    grads[2] += 0.25
    grads[2].flags.writeable = False
    place.sgd(values, grads, [], [], **changed({"lr": 0.5, "momentum": 0, "weight_decay": 0}))
    np.testing.assert_equal(values, expected)


def test_gradients_may_be_scalars(place):
    value = np.array(2.0)
    place.sgd([value], [np.float64(0.5)], [], [], **changed({"momentum": 0, "weight_decay": 0}))
    assert value == 2.0 - 0.1 * 0.5


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits_are_computed_in_float32(name, place, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.float16
    values, grads, velocities = arrays(rng, [(3, 4), (CHUNK + 9,)], dtype, rows=3)
    wanted = [
        sgd_by_formula(
            value.astype(np.float32), grad.astype(np.float32), kept.astype(np.float32), False, SGD
        )
        for value, grad, kept in zip(values, grads, velocities, strict=True)
    ]
    place.sgd(values, grads, velocities, [False] * 2, **SGD)
    for found, row in zip((values, velocities), zip(*wanted, strict=True), strict=True):
        for one, other in zip(found, row, strict=True):
            assert one.dtype == dtype
            if place.name == "cpu":
                np.testing.assert_array_equal(one, other.astype(dtype))
            else:  # near a tie, float32's last bit decides
                accuracy = 2.0**-8 if name == "bfloat16" else 2.0**-11
                np.testing.assert_allclose(one.astype(np.float32), other, accuracy, accuracy)


def test_more_arrays_than_one_launch_takes(place, rng):
    shapes = [(place % 5,) for place in range(2 * on_cuda.TENSORS + 3)]
    values, grads, averages, squares = arrays(rng, shapes, rows=4)
    squares = [square * square for square in squares]
    steps = [1 + place for place in range(len(shapes))]
    given = zip(values, grads, averages, squares, steps, strict=True)
    wanted = zip(*[adam_by_formula(*each, ADAM) for each in given], strict=True)
    place.adam(values, grads, averages, squares, steps, **ADAM)
    for found, row in zip((values, averages, squares), wanted, strict=True):
        place.assert_equal(found, row)
    velocities = copies(values)
    fresh = [place % 3 == 0 for place in range(len(shapes))]
    given = zip(values, grads, velocities, fresh, strict=True)
    wanted = [sgd_by_formula(*each, SGD)[0] for each in given]
    place.sgd(values, grads, velocities, fresh, **SGD)
    place.assert_equal(values, wanted)


def test_arrays_may_start_anywhere_and_nothing_beside_them_is_written(place, rng):
    whole = rng.standard_normal(50).astype(np.float32)
    before = whole.copy()
    values = [whole[1:12], whole[20:40]]
    grads = [np.ones(11, np.float32), np.ones(23, np.float32)[3:]]
    place.sgd(values, grads, [], [], **changed({"momentum": 0, "weight_decay": 0}))
    wanted = before.copy()
    wanted[1:12] -= np.float32(0.1)
    wanted[20:40] -= np.float32(0.1)
    np.testing.assert_array_equal(whole, wanted)


def test_no_elements_at_all(place):
    place.sgd([np.zeros(0)], [np.zeros(0)], [], [], **changed({"momentum": 0}))


def test_arrays_that_do_not_fit_are_refused(rng):
    values, grads = arrays(rng, [(3, 4)])
    short = [np.zeros((3, 3), np.float32)]
    with pytest.raises(ValueError, match=r"sgd: grads must have .* got grads\.shape=\(3, 3\)"):
        kernels.sgd(values, short, grads, [True], SGD)
    with pytest.raises(ValueError, match="sgd: velocities must have"):
        kernels.sgd(values, grads, short, [True], SGD)
    with pytest.raises(ValueError, match="adam: squares must have"):
        kernels.adam(values, grads, grads, short, [{"step": 1}], ADAM, decoupled=False)


def test_a_read_only_value_is_not_written(rng):
    values, grads = arrays(rng, [(3, 4)])
    values[0].flags.writeable = False
    before = values[0].copy()
    with pytest.raises(ValueError, match="read-only"):
        kernels.sgd(values, grads, [], [], changed({"momentum": 0}))
    np.testing.assert_array_equal(values[0], before)


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, 2 * PIECE + 3])
def test_pieces_of_work_on_the_cpu(length, rng):
    values, grads, velocities = arrays(rng, [(length,), (3,)], rows=3)
    given = zip(values, grads, velocities, strict=True)
    wanted = [sgd_by_formula(*each, False, SGD)[0] for each in given]
    kernels.sgd(values, grads, velocities, [False] * 2, SGD)
    for one, other in zip(values, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
