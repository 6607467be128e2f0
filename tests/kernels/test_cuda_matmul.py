"""Matrix products on the emulated device: any memory, any shape, against products in float64."""

from types import SimpleNamespace

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels import settings
from gradengine.kernels.cuda import launch, matmul
from gradengine.kernels.cuda.tiles import SMALL_TILE, SQUARE_TILE, TALL_TILE, covering
from tests.emulator.fixtures import assert_schedule_free
from tests.kernels.conftest import Place

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, ("float16", "float32", "float64"))
FORMS = ["NN", "NT", "TN", "TT"]

# Of the result's rounding, and of sums in float32, relative to the sum of absolute products.
TOLERANCES = {FLOAT16: 1e-3, BFLOAT16: 8e-3, FLOAT32: 2e-6, FLOAT64: 1e-14}
TF32 = 2.0**-10


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "highest")


@pytest.fixture
def reduced(monkeypatch):
    """Let float32 be rounded to tf32."""
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "high")


def drawn(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def stored(array, transposed):
    """Give equal values, whose memory runs along the columns if transposed."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2) if transposed else array


def pair(rng, dtype, form, rows, depth, columns):
    x = stored(drawn(rng, dtype, rows, depth), form[0] == "T")
    return x, stored(drawn(rng, dtype, depth, columns), form[1] == "T")


def loaded():
    """Give (source, name) of the kernels that the test has launched."""
    return {key[1:] for key in launch._kernels}


def check(x, y, tolerance=None, place=None):
    """Compare with a product in float64, each sum by the sum of its absolute products."""
    exact = np.matmul(x.astype(np.float64), y.astype(np.float64))
    scale = np.matmul(abs(x).astype(np.float64), abs(y).astype(np.float64))
    place = place or Place("emulated")
    found = place.take(kernels.matmul(place.give(x), place.give(y)))
    assert found is not None
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    error = abs(found.astype(np.float64) - exact)
    assert (error <= (tolerance or TOLERANCES[x.dtype]) * scale).all()
    return found


def kinds():
    return {name.split("_")[0] for source, name in loaded() if source == matmul.SOURCE}


def forms():
    """Give the layouts of the kernels used: N is what runs along the rows in memory."""
    found = set()
    for name in (name for source, name in loaded() if source == matmul.SOURCE):
        left, right = ("CROSS" in part for part in name.split(",")[1:3])
        found.add("NT"[left] + "TN"[right])
    return found


# ---- without tensor cores --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(64, 16, 64), (72, 20, 68), (65, 13, 7), (1, 9, 70)])
def test_float32(sizes, form, emulated_cuda, rng):
    check(*pair(rng, FLOAT32, form, *sizes))
    assert kinds() == {"plain"}
    assert sizes[0] == 1 or forms() == {form}


@pytest.mark.parametrize("form", FORMS)
def test_float64(form, emulated_cuda, rng):
    check(*pair(rng, FLOAT64, form, 66, 18, 70))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bits_that_tensor_cores_cannot_load(dtype, emulated_cuda, rng):
    check(*pair(rng, dtype, "NN", 66, 21, 35))
    assert kinds() == {"plain"}


@pytest.mark.parametrize("tile", [SQUARE_TILE, TALL_TILE, SMALL_TILE])
def test_tiles(tile, emulated_cuda, rng, monkeypatch):
    monkeypatch.setattr(matmul, "choose_plain_tile", lambda *_: tile)
    check(*pair(rng, FLOAT32, "NN", 132, 12, 136))
    check(*pair(rng, FLOAT32, "TT", 131, 9, 133))


VIEWS = [
    lambda x: x[..., ::2, ::3],
    lambda x: x[..., ::-1, ::3],
    lambda x: x[..., ::2, ::-1],
    lambda x: x[..., ::-2, ::-3][::-1],
    lambda x: np.broadcast_to(x[:, :1, :12], (2, 9, 12)),
    lambda x: np.broadcast_to(x[:, :9, :1], (2, 9, 12)),
    lambda x: np.lib.stride_tricks.sliding_window_view(x[0, 0], (12,))[None, :9],
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_views_of_any_strides(view, dtype, emulated_cuda, rng):
    x, y = view(drawn(rng, dtype, 2, 18, 36)), view(drawn(rng, dtype, 2, 18, 36))
    check(x, y.swapaxes(-1, -2))
    check(x.swapaxes(-1, -2), y)


def test_a_field_of_packed_records(emulated_cuda, rng):
    x, y = (
        np.zeros(shape, [("sign", "i1"), ("value", "f4")])["value"] for shape in ((5, 6), (6, 7))
    )
    x[...], y[...] = drawn(rng, FLOAT32, 5, 6), drawn(rng, FLOAT32, 6, 7)
    assert x.strides[1] == 5
    check(x, y)


def test_memory_that_is_not_aligned(emulated_cuda, reduced, rng):
    x = np.empty(16 * 16 + 1, FLOAT32)[1:].reshape(16, 16)
    x[...] = drawn(rng, FLOAT32, 16, 16)
    check(x, drawn(rng, FLOAT32, 16, 16))
    assert {name for _, name in loaded()} == {
        "plain_matmul<float, Layout::DEPTHWISE, Layout::CROSSWISE, 1, 64, 64, 4, 4>"
    }


# ---- deep products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("form", ["NN", "TT"])
def test_few_tiles_share_the_depth(form, dtype, emulated_cuda, reduced, rng):
    x, y = pair(rng, dtype, form, 24, 1040, 32)
    tolerance = 2 * TF32 if dtype == FLOAT32 else None
    check(x, y, tolerance)
    assert "slices.cu" in {source for source, _ in loaded()}
    check(np.stack([x, x[::-1]]), y, tolerance)  # a batch


def test_shallow_products_are_not_shared(emulated_cuda, rng):
    check(*pair(rng, FLOAT32, "NN", 24, 40, 32))
    assert {source for source, _ in loaded()} == {"matmul.cu"}


# ---- tensor cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_tensor_cores(dtype, form, emulated_cuda, reduced, rng):
    tolerance = 2 * TF32 if dtype == FLOAT32 else None
    check(*pair(rng, dtype, form, 64, 96, 64), tolerance)
    check(*pair(rng, dtype, form, 72, 200, 40), tolerance)
    assert kinds() == {"tensor"}
    assert forms() == {form}
    assert emulated_cuda.statistics()["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_result_that_no_chunk_divides(dtype, emulated_cuda, reduced, rng):
    check(*pair(rng, dtype, "NT", 3, 16, 69), 2 * TF32)
    check(*pair(rng, dtype, "NT", 65, 16, 1), 2 * TF32)
    assert kinds() == {"tensor"}


@pytest.mark.parametrize("stages", [0, 1])
def test_large_tiles_on_tensor_cores(stages, emulated_cuda, reduced, rng, monkeypatch):
    tile = matmul.LARGE_TENSOR_TILES[stages]
    monkeypatch.setattr(matmul, "_choose_tensor_tile", lambda *_: tile)
    check(*pair(rng, FLOAT16, "NN", 136, 200, 144))
    check(*pair(rng, FLOAT32, "TN", 136, 100, 144), 2 * TF32)


def test_tiles_fit_the_product_and_the_device(emulated_cuda):
    choose = matmul._choose_tensor_tile
    limits = launch.device_limits()
    large, less_memory = matmul.LARGE_TENSOR_TILES
    assert choose(128 * limits.multiprocessors, 128, 1) == large
    assert choose(128 * limits.multiprocessors - 128, 128, 1) == matmul.SMALL_TENSOR_TILE
    assert choose(128, 128, limits.multiprocessors) == large
    assert covering(large, 129, 128) == 2
    emulated_cuda.device_limits = limits._replace(shared_bytes=99 << 10)
    assert choose(128 * limits.multiprocessors, 128, 1) == less_memory


def test_precision_is_a_choice(emulated_cuda, rng, monkeypatch):
    x, y = pair(rng, FLOAT32, "NN", 8, 16, 8)
    exact = check(x, y)
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "medium")
    rounded = check(x, y, 2 * TF32)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-2)
    assert (rounded != exact).any()
    assert kinds() == {"plain", "tensor"}


def test_devices_without_tensor_cores_for_it(emulated_cuda, reduced, rng):
    emulated_cuda.device_limits = launch.device_limits()._replace(architecture=75)
    launch.forget_kernels()
    check(*pair(rng, FLOAT16, "NN", 8, 16, 8))
    check(*pair(rng, FLOAT32, "NN", 8, 16, 8))
    assert kinds() == {"plain"}


# ---- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_batch", "y_batch"),
    [((), (3,)), ((3,), ()), ((2, 1), (3,)), ((2, 3), (2, 3)), ((1,), (3,)), ((4,), (2, 1))],
)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_leading_axes_broadcast(x_batch, y_batch, dtype, emulated_cuda, rng):
    x, y = drawn(rng, dtype, *x_batch, 9, 24), drawn(rng, dtype, *y_batch, 24, 16)
    check(x, y)
    check(drawn(rng, dtype, *x_batch, 18, 24)[..., ::2, :], stored(y, True))


def test_many_axes_that_cannot_be_joined(emulated_cuda, rng):
    shape = (2, 1, 2, 1, 2, 1, 5, 8)
    check(drawn(rng, FLOAT32, *shape), drawn(rng, FLOAT32, 3, 1, 2, 1, 2, 8, 4))


def test_heads_of_attention(emulated_cuda, reduced, rng):
    """(batch, position, head, channel) seen as (batch, head, position, channel): nothing is copied."""
    query, key = (drawn(rng, FLOAT32, 2, 10, 3, 16).swapaxes(1, 2) for _ in range(2))
    check(query, key.swapaxes(-1, -2), 2 * TF32)
    assert forms() == {"NT"}


def test_all_rows_of_a_batch_are_one_product(emulated_cuda, rng, monkeypatch):
    calls = []
    multiply = matmul.multiply
    monkeypatch.setattr(matmul, "multiply", lambda *given: calls.append(given) or multiply(*given))
    check(drawn(rng, FLOAT32, 2, 3, 5, 8), drawn(rng, FLOAT32, 8, 4))
    assert [x.shape for x, *_ in calls] == [(30, 8)]


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [
        ((0, 3), (3, 4)), ((3, 0), (0, 4)), ((3, 4), (4, 0)), ((0, 3, 4), (4, 5)),
        ((2, 0, 4), (2, 4, 5)), ((1, 0, 3, 4), (5, 1, 4, 2)), ((2, 3, 0), (2, 0, 4)),
    ],
)  # fmt: skip
def test_empty(x_shape, y_shape, emulated_cuda):
    check(np.ones(x_shape, FLOAT32), np.ones(y_shape, FLOAT32))
    assert not loaded()


@pytest.mark.parametrize("dtype", ["int64", "int8", "bool", "complex64", ">f4"])
def test_other_dtypes_are_left_to_the_array_module(dtype, emulated_cuda, rng):
    x, y = (rng.integers(0, 3, shape).astype(dtype) for shape in ((7, 8), (8, 9)))
    np.testing.assert_array_equal(kernels.matmul(x, y), np.matmul(x, y))
    assert not loaded()


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_not_a_number_spoils_its_own_row_and_column_only(
    precision, emulated_cuda, rng, monkeypatch
):
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", precision)
    x, y = drawn(rng, FLOAT32, 70, 36), drawn(rng, FLOAT32, 36, 68)
    expected = kernels.matmul(x, y)
    x[3, 35], y[2, 67] = np.nan, np.nan
    expected[3] = expected[:, 67] = np.nan
    np.testing.assert_array_equal(kernels.matmul(x, y), expected)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_every_schedule_gives_equal_bits(dtype, emulated_cuda, rng):
    x, y = pair(rng, dtype, "TN", 72, 200, 72)
    assert_schedule_free(emulated_cuda, lambda: kernels.matmul(x, y))


def test_cupy_which_refuses_them_gets_no_batches_of_bfloat16(emulated_cuda, monkeypatch):
    limits = emulated_cuda.device_limits._replace(architecture=75)  # without their tensor cores
    emulated_cuda.device_limits = limits
    monkeypatch.setattr(matmul, "multiply", lambda x, y, tensor_cores: ("own", tensor_cores))
    x = SimpleNamespace(dtype=BFLOAT16, ndim=3)  # NumPy's arrays go to our kernels anyway
    assert matmul._choose(x, x) == ("own", False)


# ---- on a GPU --------------------------------------------------------------------------------------


def moved(x, y):
    """Give both on the GPU, transposed as they are here."""
    cupy = Place("cupy")
    return tuple(
        cupy.give(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)
        if array.strides[-1] > array.strides[-2]
        else cupy.give(array)
        for array in (x, y)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [(64, 96, 64), (300, 512, 264), (129, 77, 65), (1000, 256, 512)])
def test_products_on_a_gpu(sizes, dtype, form, precision, own, rng, monkeypatch):
    monkeypatch.setattr(settings.cuda, "own_matmul", own)
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", precision)
    x, y = pair(rng, dtype, form, *sizes)
    exact = np.matmul(x.astype(np.float64), y.astype(np.float64))
    scale = np.matmul(abs(x).astype(np.float64), abs(y).astype(np.float64))
    found = Place("cupy").take(kernels.matmul(*moved(x, y)))
    assert found.dtype == dtype
    tolerance = 2 * TF32 if dtype == FLOAT32 and precision == "high" else TOLERANCES[dtype]
    assert (abs(found.astype(np.float64) - exact) <= tolerance * scale).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_batches_on_a_gpu(dtype, precision, rng, monkeypatch):
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", precision)
    tolerance = 2 * TF32 if dtype == FLOAT32 and precision == "high" else None
    x, y = drawn(rng, dtype, 6, 4, 130, 64), drawn(rng, dtype, 4, 64, 72)
    check(x, y, tolerance, Place("cupy"))
    check(x, y[0], tolerance, Place("cupy"))


@pytest.mark.gpu
def test_cupy_keeps_its_own_precision(rng, monkeypatch):
    from cupy._core import _routines_linalg as cublas  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "high")
    before = cublas.get_compute_type(np.float32)
    check(*pair(rng, FLOAT32, "NN", 300, 200, 100), 2 * TF32, Place("cupy"))
    assert cublas.get_compute_type(np.float32) == before
