"""Matrix products on the CPU: any memory, any shape, and what is left to NumPy."""

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.kernels.cpu import matmul as cpu_matmul
from gradengine.kernels.cpu import microkernel, threads
from gradengine.kernels.cpu.matmul import (
    BLOCK,
    DEPTH,
    MEDIUM_MATRIX,
    RUNS,
    SMALL_MATRIX,
    SMALL_PRODUCT,
)
from tests.kernels.memory import at_the_end

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
FORMS = ["NN", "NT", "TN", "TT"]
WIDTH = microkernel.width(DTYPES[0])


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[0, 1 << 30], ids=["blocks", "rows_of_y"])
def blocked(monkeypatch, request):
    """Make products of every size go through one of the kernels; give the list of its calls."""
    calls = []

    def note(multiply):
        def noted(x, y, out):
            calls.append((x, y, out))
            multiply(x, y, out)

        return noted

    for name in ("_multiply", "_multiply_few"):
        monkeypatch.setattr(cpu_matmul, name, note(getattr(cpu_matmul, name)))
    monkeypatch.setattr(cpu_matmul, "FEW_ROWS", request.param)
    monkeypatch.setattr(cpu_matmul, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(cpu_matmul, "SMALL_MATRIX", 0)
    return calls


def drawn(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def stored(array, transposed):
    """Give equal values, whose memory runs along the columns if transposed."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2) if transposed else array


def check(x, y, dtype):
    """Compare with a product in float64, by the largest sum of absolute products."""
    exact = np.matmul(x.astype(np.float64), y.astype(np.float64))
    scale = np.matmul(abs(x).astype(np.float64), abs(y).astype(np.float64)).max(initial=0)
    found = kernels.matmul(x, y)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert abs(found - exact).max(initial=0) <= 20 * np.finfo(dtype).eps * scale
    return found


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [(130, 600, 70), (65, 515, 33), (17, 1030, 64), (300, 20, 301), (1, 700, 90), (200, 90, 1)],
)
def test_transposed_or_not(sizes, form, dtype, rng, blocked):
    rows, depth, columns = sizes
    x = stored(drawn(rng, dtype, 2, rows, depth), form[0] == "T")
    y = stored(drawn(rng, dtype, 2, depth, columns), form[1] == "T")
    check(x, y, dtype)  # two matrices
    check(x[0], y, dtype)
    check(x, y[1], dtype)
    if rows > 1 < columns:
        check(x[0], y[0], dtype)
        assert len(blocked) == 4


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., ::2, ::3],
        lambda x: x[..., ::-2, ::3],
        lambda x: x[..., ::2, ::-3],
        lambda x: x[..., ::-2, ::-3],
        lambda x: x[..., ::2, ::-3][::-1],
        lambda x: np.broadcast_to(x[..., ::2, :1], (3, 60, 90)),
        lambda x: np.broadcast_to(x[..., :1, ::3], (3, 60, 90)),
        lambda x: np.lib.stride_tricks.sliding_window_view(x[0, 0], (90,))[None, :60],
    ],
)
def test_views_of_any_strides(view, dtype, rng, blocked):
    x, y = view(drawn(rng, dtype, 3, 120, 270)), view(drawn(rng, dtype, 3, 120, 270))
    check(x, y.swapaxes(-1, -2), dtype)
    check(x.swapaxes(-1, -2), y, dtype)
    assert len(blocked) == 2


def test_read_only_arrays_are_left_alone(dtype, rng, blocked):
    x, y = drawn(rng, dtype, 40, 50), drawn(rng, dtype, 50, 60)
    copies = x.copy(), y.copy()
    x.flags.writeable = y.flags.writeable = False
    found = check(x, y, dtype)
    assert found.flags.writeable
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(y, copies[1])


@pytest.mark.parametrize(
    "records", [[("value", "f4"), ("sign", "i1")], [("flag", "?"), ("value", "f4")]]
)
def test_a_field_of_packed_records(records, rng, blocked):
    x, y = (np.zeros(shape, np.dtype(records))["value"] for shape in ((40, 50), (50, 60)))
    x[...], y[...] = drawn(rng, DTYPES[0], 40, 50), drawn(rng, DTYPES[0], 50, 60)
    assert x.strides[1] == 5
    check(x, y, DTYPES[0])
    assert len(blocked) == 1


@pytest.mark.parametrize(
    ("x_batch", "y_batch"),
    [((), (3,)), ((3,), ()), ((2, 1), (3,)), ((2, 3), (2, 3)), ((1,), (3,)), ((1, 1), (1,)), ((4,), (2, 1))],
)  # fmt: skip
def test_leading_axes_broadcast(x_batch, y_batch, dtype, rng, blocked):
    check(drawn(rng, dtype, *x_batch, 33, 20), drawn(rng, dtype, *y_batch, 20, 41), dtype)
    wide = drawn(rng, dtype, *x_batch, 66, 20)[..., ::2, :]
    check(wide, stored(drawn(rng, dtype, *y_batch, 20, 41), True), dtype)
    assert len(blocked) == 2


def test_a_matrix_for_the_whole_batch_is_not_repeated(rng, blocked):
    kernels.matmul(drawn(rng, DTYPES[0], 5, 8, 9), drawn(rng, DTYPES[0], 9, 7))
    x, y, _ = blocked[0]
    assert (x.shape, y.shape) == ((5, 8, 9), (1, 9, 7))


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH + 3])
@pytest.mark.parametrize("rows", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_around_the_blocks(rows, depth, rng, blocked):
    for columns in (2, WIDTH - 1, WIDTH, WIDTH + 1, 3 * WIDTH + 7):
        check(drawn(rng, DTYPES[0], rows, depth), drawn(rng, DTYPES[0], depth, columns), DTYPES[0])
    assert len(blocked) == 5


@pytest.mark.parametrize("depth", [RUNS - 1, RUNS, 2 * RUNS + 1])
@pytest.mark.parametrize("columns", [1, WIDTH - 1, WIDTH, 2 * WIDTH + 3])
def test_nothing_is_read_beyond_a_matrix(columns, depth, rng, blocked):
    x, y = drawn(rng, DTYPES[0], 5, depth), drawn(rng, DTYPES[0], depth, columns)
    for left, right in ((x, y), (stored(x, True), y), (x, stored(y, True))):
        found = kernels.matmul(*(at_the_end(each) for each in (left, right)))
        np.testing.assert_array_equal(found, kernels.matmul(left, right))


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [
        ((0, 3), (3, 4)), ((3, 0), (0, 4)), ((3, 4), (4, 0)), ((0, 3, 4), (4, 5)),
        ((2, 0, 4), (2, 4, 5)), ((1, 0, 3, 4), (5, 1, 4, 2)), ((200, 0), (0, 300)),
    ],
)  # fmt: skip
def test_empty(x_shape, y_shape, dtype):
    check(np.ones(x_shape, dtype), np.ones(y_shape, dtype), dtype)


def test_one_step_is_an_outer_product(dtype, rng):
    check(drawn(rng, dtype, 300, 1), drawn(rng, dtype, 1, 400), dtype)
    check(drawn(rng, dtype, 3, 90, 1), drawn(rng, dtype, 1, 400), dtype)


@pytest.mark.parametrize("size", [SMALL_MATRIX // 64, SMALL_MATRIX // 64 + 1, 5000])
def test_with_a_vector(size, dtype, rng):
    matrix, row, column = (drawn(rng, dtype, *shape) for shape in ((size, 64), (1, size), (64, 1)))
    check(matrix, column, dtype)
    check(row, matrix, dtype)
    check(column.T, matrix.T, dtype)
    check(row[:, ::-1], matrix[:, ::-2], dtype)


def test_with_a_vector_and_a_large_matrix(rng):
    matrix = drawn(rng, DTYPES[0], MEDIUM_MATRIX // 1024 + 1, 1024)
    check(matrix, drawn(rng, DTYPES[0], 1024, 1), DTYPES[0])


@pytest.mark.parametrize("more", [0, 1])
def test_small_products_are_numpys(more, dtype, rng, monkeypatch):
    calls = []
    multiply = cpu_matmul._multiply
    monkeypatch.setattr(
        cpu_matmul, "_multiply", lambda *arrays: (calls.append(arrays), multiply(*arrays))
    )
    rows = SMALL_PRODUCT // 4096 + more
    check(drawn(rng, dtype, rows, 64), drawn(rng, dtype, 64, 64), dtype)
    assert len(calls) == more


@pytest.mark.parametrize("dtype", ["float16", "int64", "int8", "complex64", ">f4", "bool"])
def test_other_dtypes_are_numpys(dtype, rng, blocked):
    x, y = (rng.integers(0, 3, shape).astype(dtype) for shape in ((150, 40), (40, 200)))
    np.testing.assert_array_equal(kernels.matmul(x, y), np.matmul(x, y))
    assert not blocked


# ---- numbers -------------------------------------------------------------------------------------


def test_not_a_number_spoils_its_own_row_and_column_only(dtype, rng, blocked):
    x, y = drawn(rng, dtype, 70, DEPTH + 9), drawn(rng, dtype, DEPTH + 9, 75)
    expected = kernels.matmul(x, y)
    x[3, DEPTH + 1], y[2, 74] = np.nan, np.nan
    expected[3] = expected[:, 74] = np.nan
    np.testing.assert_array_equal(kernels.matmul(x, y), expected)


def test_shared_among_threads_in_any_way_gives_equal_bits(dtype, rng, monkeypatch):
    products = [
        (drawn(rng, dtype, 3, 150, 600), drawn(rng, dtype, 600, 100)),
        (drawn(rng, dtype, 20, 900), drawn(rng, dtype, 333, 900).T),
        (drawn(rng, dtype, 1300, 40), drawn(rng, dtype, 40, 33)),
    ]
    bits = set()
    for count in (1, 2, 3, 5, 16):
        monkeypatch.setattr(cpu_matmul, "get_num_threads", lambda count=count: count)
        bits.add(b"".join(kernels.matmul(*product).tobytes() for product in products))
    assert len(bits) == 1


def test_any_number_of_threads_gives_equal_bits(rng):
    most = ge.get_num_threads()
    x, y = drawn(rng, DTYPES[0], 300, 600), drawn(rng, DTYPES[0], 600, 100)
    bits = set()
    try:
        for count in (1, min(2, most), most):
            ge.set_num_threads(count)
            bits.add(kernels.matmul(x, y).tobytes())
    finally:
        ge.set_num_threads(most)
        threads._chosen = None
    assert len(bits) == 1


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_large_products(form, rng):
    x = ge.tensor(drawn(rng, DTYPES[0], 200, 120), requires_grad=True)
    y = ge.tensor(drawn(rng, DTYPES[0], 120, 140), requires_grad=True)
    left = ge.tensor(x.detach().array.T.copy(), requires_grad=True) if form[0] == "T" else x
    right = ge.tensor(y.detach().array.T.copy(), requires_grad=True) if form[1] == "T" else y
    grad = drawn(rng, DTYPES[0], 200, 140)
    out = (left.T if form[0] == "T" else left) @ (right.T if form[1] == "T" else right)
    out.backward(ge.tensor(grad))
    by_x = grad.astype(float) @ y.detach().array.T
    by_y = x.detach().array.T.astype(float) @ grad
    for tensor, expected, letter in ((left, by_x, form[0]), (right, by_y, form[1])):
        found = tensor.grad.array.T if letter == "T" else tensor.grad.array
        assert abs(found - expected).max() < 3e-6 * abs(expected).max()
