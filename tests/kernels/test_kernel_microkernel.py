"""The microkernel and the vector code under all CPU kernels: every height, every edge, every width."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradengine.kernels.geometry import conv2d_geometry
from tests.kernels.tap_sums import convolution_passes

njit = pytest.importorskip("numba").njit
from gradengine.kernels.cpu import (  # noqa: E402
    columns,
    conv2d,
    direct,
    matmul,
    microkernel,
    simd,
    winograd,
)
from gradengine.kernels.cpu.simd import pointer  # noqa: E402

ROOT = Path(__file__).parents[2]
DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
HEIGHTS = range(1, 2 * microkernel.ROWS + 2)
UNTOUCHED = -7.0


@njit
def multiply(
    count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth, segments, adds
):  # fmt: skip
    microkernel.multiply(
        count, pointer(a, 0), a_row, a_step, a_segment, pointer(b, 0), b_step, b_segment,
        pointer(c, 0), c_row, columns, depth, segments, adds,
    )  # fmt: skip


def product(a, b):
    """Sum a (rows, segments, depth) by b (segments, depth, columns) in float64."""
    return np.einsum("ist,stj->ij", a.astype(np.float64), b.astype(np.float64))


def close(got, expected, dtype):
    np.testing.assert_allclose(got, expected, rtol=0, atol=20 * np.finfo(dtype).eps * 4)


def operands(rng, dtype, count, segments, depth, columns):
    """Make a and b with gaps between rows and segments, and NaN in b beyond its columns."""
    a = rng.uniform(-1, 1, (count, segments, depth)).astype(dtype)
    room_a = np.full((count, segments + 1, depth + 3), np.nan, dtype)
    room_a[:, :segments, :depth] = a
    b = rng.uniform(-1, 1, (segments, depth, columns)).astype(dtype)
    room_b = np.full((segments, depth + 2, microkernel.width(dtype) + 1), np.nan, dtype)
    room_b[:, :depth, :columns] = b
    return a, b, room_a, room_b


def run(rng, dtype, count, columns, depth=5, segments=1, adds=False):
    """Check one product, and that nothing beside its places was written."""
    a, b, room_a, room_b = operands(rng, dtype, count, segments, depth, columns)
    c_row = microkernel.width(dtype) + 3
    c = np.full((count + 1, c_row), UNTOUCHED, dtype)
    before = rng.uniform(-1, 1, (count, columns)).astype(dtype)
    c[:count, :columns] = before if adds else np.nan  # what is only written is never read
    distances = [
        *(stride // dtype.itemsize for stride in (room_a.strides[0], room_a.strides[2])),
        room_a.strides[1] // dtype.itemsize,
    ]
    multiply(
        count, room_a.reshape(-1), *distances, room_b.reshape(-1), room_b.shape[2],
        room_b.shape[1] * room_b.shape[2], c.reshape(-1), c_row, columns, depth, segments, adds,
    )  # fmt: skip
    close(c[:count, :columns], product(a, b) + (before if adds else 0), dtype)
    c[:count, :columns] = UNTOUCHED
    assert (c == UNTOUCHED).all()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def test_the_tiles_come_down_to_one_row():
    assert list(microkernel.TILES) == sorted(set(microkernel.TILES), reverse=True)
    assert microkernel.TILES[-1] == 1
    assert microkernel.VECTORS * (microkernel.ROWS + 1) + 1 <= simd.REGISTERS


@pytest.mark.parametrize("count", HEIGHTS)
def test_every_height(count, dtype, rng):
    for adds in (False, True):
        run(rng, dtype, count, microkernel.width(dtype), adds=adds)


def test_no_rows(dtype):
    c = np.full(100, UNTOUCHED, dtype)
    multiply(0, c, 1, 1, 0, c, 1, 0, c, 1, 1, 1, 1, True)
    assert (c == UNTOUCHED).all()


@pytest.mark.parametrize("adds", [False, True])
def test_every_number_of_columns(adds, dtype, rng):
    for count in range(1, microkernel.width(dtype) + 1):
        run(rng, dtype, microkernel.ROWS + 3, count, adds=adds)


@pytest.mark.parametrize(("depth", "segments"), [(1, 1), (1, 4), (2, 3), (17, 1), (7, 5)])
def test_segments(depth, segments, dtype, rng):
    for count in (3, microkernel.width(dtype)):
        run(rng, dtype, microkernel.ROWS + 2, count, depth, segments, adds=True)


def test_a_may_be_transposed_and_rows_may_overlap(dtype, rng):
    width, count, depth = microkernel.width(dtype), microkernel.ROWS + 5, 6
    a = rng.uniform(-1, 1, (depth, count)).astype(dtype)
    b = rng.uniform(-1, 1, (1, depth, width)).astype(dtype)
    c = np.empty((count, width), dtype)
    rest = (b.reshape(-1), width, 0, c.reshape(-1), width, width, depth, 1, False)
    multiply(count, a.reshape(-1), 1, count, 0, *rest)
    close(c, product(a.T[:, None], b), dtype)
    multiply(count, a.reshape(-1), 2, 1, 0, *rest)  # as windows of a signal do
    windows = np.lib.stride_tricks.sliding_window_view(a.reshape(-1), depth)[: 2 * count : 2]
    close(c, product(windows[:, None], b), dtype)


def test_not_a_number_spoils_its_own_row_and_column_only(rng):
    width, count, depth = microkernel.width(DTYPES[0]), microkernel.ROWS, 3
    a, b = np.ones((count, depth), np.float32), np.ones((depth, width), np.float32)
    a[2, 1], b[0, 5] = np.nan, np.inf
    c = np.empty((count, width), np.float32)
    multiply(
        count, a.reshape(-1), depth, 1, 0, b.reshape(-1), width, 0, c.reshape(-1), width, width,
        depth, 1, False,
    )  # fmt: skip
    expected = np.full((count, width), 3.0)
    expected[:, 5] = np.inf
    expected[2] = np.nan
    np.testing.assert_array_equal(c, expected)


# ---- vectors -------------------------------------------------------------------------------------


@njit
def transpose(source, row, target, target_row):
    simd.transpose(pointer(source, 0), row, pointer(target, 0), target_row)


def test_transpose(dtype, rng):
    count = simd.VECTOR_BYTES // dtype.itemsize
    source = rng.standard_normal((count, count + 3)).astype(dtype)
    target = np.full((count + 1, count + 1), UNTOUCHED, dtype)
    transpose(source.reshape(-1), count + 3, target.reshape(-1), count + 1)
    np.testing.assert_array_equal(target[:count, :count], source[:, :count].T)
    assert (target[count] == UNTOUCHED).all()
    assert (target[:, count] == UNTOUCHED).all()


_running = simd.square_transform(
    lambda v: [v[0], v[0] + v[1], v[0] + v[1] - 2 * v[2] * 0.5, v[2]], 3
)


@njit
def running(source, row, column, target, target_row, target_column, vectors):
    _running(
        pointer(source, 0), row, column, pointer(target, 0), target_row, target_column, vectors
    )


@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_square_transform(vectors, rng):
    matrix = np.array([[1, 0, 0], [1, 1, 0], [1, 1, -1], [0, 0, 1]])
    count = vectors * (simd.VECTOR_BYTES // 4)
    source = rng.standard_normal((3, 3, count + 5)).astype(np.float32)
    target = np.full((4, 4, count + 2), UNTOUCHED, np.float32)
    distances = [stride // 4 for stride in (*source.strides[:2], *target.strides[:2])]
    running(source.reshape(-1), *distances[:2], target.reshape(-1), *distances[2:], vectors)
    expected = np.einsum("ia,jb,abv->ijv", matrix, matrix, source[..., :count].astype(float))
    close(target[..., :count], expected, np.float32)
    assert (target[..., count:] == UNTOUCHED).all()


# ---- processors with narrower vectors, in processes of their own ---------------------------------


def beside_a_wall(size):
    """Give float32 memory after which the process may not read or write."""
    import ctypes

    room = -(-4 * size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    no_access = 0
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    assert mprotect(ctypes.c_void_p(place), mmap.PAGESIZE, no_access) == 0
    return np.frombuffer(memory, np.float32, size, room - 4 * size)


def check_walls():
    """Multiply with a, b and c each at the very end of the memory that there is."""
    width = microkernel.width(DTYPES[0])
    for count in HEIGHTS:
        for edge in (1, width // 2, width // 2 + 1, width - 1, width):
            depth, c_row = 3, edge + 2
            places = [beside_a_wall(count * depth), beside_a_wall(depth * width)]
            c = beside_a_wall((count - 1) * c_row + edge)
            for array in (*places, c):
                array[:] = 1
            multiply(
                count,
                places[0],
                depth,
                1,
                0,
                places[1],
                width,
                0,
                c,
                c_row,
                edge,
                depth,
                1,
                True,
            )
            assert c[-edge:].tolist() == [4] * edge


def check_convolution(algorithm, channels, outputs, *attributes):
    rng = np.random.default_rng(3)
    geometry = conv2d_geometry((3, channels, 11, 18), (outputs, channels, 3, 3), *attributes)
    x, weight, grad = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    )
    conv2d._algorithm = lambda geometry, dtype: algorithm
    found = (
        conv2d.conv2d(x, weight, None, geometry),
        conv2d.conv2d_grad_input(grad, weight, geometry),
        conv2d.conv2d_grad_weight(grad, x, geometry),
    )
    for got, expected in zip(found, convolution_passes(x, weight, grad, geometry), strict=True):
        assert abs(got - expected).max() < 3e-5 * abs(expected).max(), algorithm.__name__


def check_all(vector_bytes, fma):
    assert (int(vector_bytes), fma == "True") == (simd.VECTOR_BYTES, simd.HAS_FMA)
    check_walls()
    check_convolution(winograd, 16, 48, 1, 1)
    check_convolution(direct, 5, 21, 2, 1)
    check_convolution(columns, 5, 21, 2, 1)
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((131, 600), (37, 600)))
    expected = x.astype(np.float64) @ y.T
    assert x.shape[0] * x.shape[1] * y.shape[0] > matmul.SMALL_PRODUCT
    assert abs(matmul.matmul(x, y.T) - expected).max() < 3e-6 * abs(expected).max()
    assert abs(matmul.matmul(y, x.T) - expected.T).max() < 3e-6 * abs(expected).max()


def host_has(*features):
    from llvmlite import binding

    present = binding.get_host_cpu_features()
    return all(present.get(feature) for feature in features)


PROCESSORS = {
    "host": ({}, simd.VECTOR_BYTES, simd.HAS_FMA),
    "avx2": ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}, 32, True),
    "generic": ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, 16, False),
}


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_on_other_processors(processor):
    if processor == "avx2" and not host_has("avx2", "fma"):
        pytest.skip("this processor has no AVX2")
    settings, vector_bytes, fma = PROCESSORS[processor]
    code = f"from {__name__} import check_all; check_all('{vector_bytes}', '{fma}')"
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False,
        timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
