"""Conversions of memory layout and element type on CUDA."""

import numpy as np
import pytest

from gradengine.devices import import_cupy
from gradengine.kernels.cuda import launch, layout
from tests.emulator.emulator import ORDERS, Schedule
from tests.kernels.memory import MEMORIES, laid_out

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, (np.float16, np.float32, np.float64))
PAIRS = [
    *((FLOAT32, dtype) for dtype in (FLOAT32, FLOAT16, BFLOAT16)),
    (FLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (FLOAT64, FLOAT16),  # by way of float32: tests draw numbers of float32
]


@pytest.fixture
def convert(cuda_place):
    """Call a function of the module on a place's arrays, and give NumPy's."""

    def call(name, x, *arguments):
        given = [cuda_place.give(one) for one in x] if isinstance(x, list) else cuda_place.give(x)
        found = getattr(layout, name)(given, *arguments)
        if isinstance(found, list):
            return [cuda_place.take(one) for one in found]
        return cuda_place.take(found)

    return call


# Shapes with whole tiles and parts of them; few channels, which one thread makes, and many.
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((2, 3, 7, 9), 4),
        ((2, 3, 7, 9), None),
        ((3, 1, 4, 4), 8),
        ((2, 40, 5, 7), None),
        ((1, 33, 6, 6), 40),
        ((1, 64, 4, 8), None),
        ((0, 3, 2, 2), 4),
    ],
)
def test_channels_last(shape, channels, memory, pair, convert, rng):
    x = rng.standard_normal(shape, np.float32).astype(pair[0])
    found = convert("channels_last", laid_out(x, memory), channels, pair[1])
    assert found.dtype == pair[1]
    batch, given, height, width = shape
    expected = np.zeros((batch, height, width, channels or given), pair[1])
    expected[..., :given] = x.transpose(0, 2, 3, 1).astype(pair[1])
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 40, 5, 8), (2, 32, 8, 8), (0, 3, 2, 2)])
def test_channels_first(shape, memory, pair, convert, rng):
    x = rng.standard_normal(shape, np.float32).astype(pair[0])
    found = convert("channels_first", laid_out(x, memory), pair[1])
    assert found.dtype == pair[1]
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, x.astype(pair[1]))


def test_what_is_right_already_is_not_copied(emulated_cuda, rng):
    x = laid_out(rng.standard_normal((2, 3, 4, 5)), "nhwc")
    assert np.shares_memory(layout.channels_last(x, 3, x.dtype), x)
    x = laid_out(x, "nchw")
    assert layout.channels_first(x) is x
    assert not launch._kernels


def test_special_values_and_rounding(convert):
    # half of a last place, to even; a rounding up to infinity; the least and the largest numbers
    x = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-9, 1 + 3 * 2**-9, 3.4e38, 65519.0, 65520.0]
    x = np.array([*x, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 1e-7, 1e-40, -1e-45], np.float32)
    for dtype in (FLOAT16, BFLOAT16):
        (found,) = convert("cast_all", [x], dtype)
        with np.errstate(over="ignore"):
            expected = x.astype(dtype)
        np.testing.assert_array_equal(found.astype(FLOAT32), expected.astype(FLOAT32))
        np.testing.assert_array_equal(np.signbit(found[:2]), [False, True])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_many_arrays_are_converted_at_once(pair, convert, rng):
    sizes = [(1,), (3, 5), (0, 4), (4097,), (9000,), (7, 1, 2), *((i,) for i in range(1, 100))]
    x = [rng.standard_normal(size, np.float32).astype(pair[0]) for size in sizes]
    found = convert("cast_all", x, pair[1])
    assert len(found) == len(x)
    for one, given in zip(found, x, strict=True):
        assert one.dtype == pair[1]
        np.testing.assert_array_equal(one, given.astype(pair[1]))


def test_weights_keep_their_order_of_memory(emulated_cuda, rng):
    weight = rng.standard_normal((4, 3, 2, 2)).astype(np.float32)
    x = [laid_out(weight, memory) for memory in MEMORIES] + [np.empty(9, np.float32)[1:]]
    x[-1][...] = np.arange(8)
    targets = [np.empty_like(one, dtype=FLOAT16) for one in x]
    assert targets[1].strides == (24, 2, 12, 6)
    assert layout.cast_all(x, FLOAT16, targets) is targets
    for target, one in zip(targets, x, strict=True):
        np.testing.assert_array_equal(target, one.astype(FLOAT16))
    assert layout.cast_all([], FLOAT16) == []


def test_the_order_of_threads_changes_no_bit(emulated_cuda, rng):
    x = rng.standard_normal((3, 33, 5, 7)).astype(np.float32)
    for order in ORDERS:
        with emulated_cuda.scheduled(Schedule(order)):
            np.testing.assert_array_equal(layout.channels_last(x), x.transpose(0, 2, 3, 1))


@pytest.mark.gpu
def test_conversions_can_be_captured_into_a_graph(rng):
    cupy = import_cupy()
    x = cupy.asarray(rng.standard_normal((4, 3, 8, 8)).astype(np.float32))
    weights = [cupy.asarray(rng.standard_normal(n).astype(np.float32)) for n in (5, 600)]
    targets = [cupy.empty(weight.shape, np.float16) for weight in weights]

    def work():
        layout.cast_all(weights, FLOAT16, targets)
        return layout.channels_last(x, 4, FLOAT16)

    work()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out = work()
        graph = stream.end_capture()
    for array in (x, *weights):
        array *= 2
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    cupy.testing.assert_array_equal(out[..., :3], x.transpose(0, 2, 3, 1).astype(np.float16))
    for weight, target in zip(weights, targets, strict=True):
        cupy.testing.assert_array_equal(target, weight.astype(np.float16))
