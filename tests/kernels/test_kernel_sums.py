"""Sums over axes of large arrays against sums in float64, wherever the axes lie in memory."""

import itertools

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import sums
from tests.kernels.memory import laid_out

IMAGES = (3, 40, 30, 33)
ALL_AXES = [axes for count in range(1, 5) for axes in itertools.combinations(range(4), count)]


def computed(x, axes) -> np.ndarray:
    """Sum what the CPU must have a kernel for."""
    total = kernels.sum_over(x, axes)
    assert total is not None
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
@pytest.mark.parametrize("axes", ALL_AXES, ids=str)
def test_any_axes(axes, memory, dtype, rng, monkeypatch):
    monkeypatch.setattr(sums, "LARGE", 1)
    x = laid_out(rng.standard_normal(IMAGES).astype(dtype), memory)
    found = kernels.sum_over(x, axes)
    order = (0, 1, 2, 3) if memory == "nchw" else (0, 2, 3, 1)
    goes = [axis in axes for axis in order]
    if not goes[-1] and (not goes[0] or any(goes[goes.index(False) :])):
        assert found is None  # no rows: NumPy's
        return
    assert found is not None
    assert found.dtype == dtype
    expected = x.sum(axis=axes, dtype=np.float64)
    terms = np.abs(x).sum(axis=axes, dtype=np.float64).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * np.finfo(dtype).eps * terms)


@pytest.mark.parametrize("shape", [(1, 70_001), (70_001, 1), (5, 3 * sums.PIECE + 1), (2, 1 << 16)])
def test_pieces_and_what_is_left_of_them(shape, rng):
    x = rng.standard_normal(shape)
    for axes in ((1,), (0, 1)):
        found = computed(x, axes)
        np.testing.assert_allclose(found, x.sum(axis=axes), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "rows", [1, sums.BLOCK_ROWS + 1, 3 * sums.PIECE_ROWS, 3 * sums.PIECE_ROWS + 1]
)
@pytest.mark.parametrize("columns", [16, 250, sums.PIECE_COLUMNS, 2 * sums.PIECE_COLUMNS + 3])
def test_columns(rows, columns, rng, monkeypatch):
    monkeypatch.setattr(kernels, "PARALLEL_SIZE", 1)
    monkeypatch.setattr(sums, "LARGE", 1)
    x = rng.standard_normal((rows, columns))
    found = computed(x, (0,))
    np.testing.assert_allclose(found, x.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_many_terms_of_float32_keep_their_digits():
    x = np.full((300_001, 20), 0.1, np.float32)
    for axes, terms in (((0,), 300_001), ((0, 1), 20 * 300_001)):
        found = computed(x, axes)
        np.testing.assert_allclose(found, terms * float(x[0, 0]), rtol=1e-6)


def test_special_values(rng, monkeypatch):
    monkeypatch.setattr(sums, "LARGE", 1)
    x = rng.standard_normal((400, 300)).astype(np.float32)
    x[1, 5], x[2, 6], x[3, 7], x[4, 7] = np.nan, np.inf, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        for axes in ((0,), (1,)):
            found, expected = computed(x, axes), x.sum(axis=axes)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
            np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))


def test_what_numpy_sums_as_well_has_no_kernel(rng):
    x = rng.standard_normal((300, 400))
    computed(x, (1,))
    read_only = x.copy()
    read_only.flags.writeable = False
    for given, axes in (
        (x[:100], (1,)),  # small
        (x.astype(np.float16), (1,)),
        (np.ones(x.shape, np.int64), (1,)),
        (x[:, ::-1], (1,)),
        (x[:, :300], (1,)),  # with gaps
        (np.broadcast_to(x[:1], x.shape), (1,)),
        (read_only, (1,)),
        (x, (0,)),  # few long rows
        (x, ()),
        (rng.standard_normal((50_000, 3)), (0,)),  # short rows
    ):
        assert kernels.sum_over(given, axes) is None
