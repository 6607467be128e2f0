"""Adding and writing at positions that repeat: in any order by default, in one if asked for."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.devices import import_cupy, to_device
from gradengine.kernels import settings
from gradengine.kernels.cuda import indexing
from tests.emulator.fixtures import assert_schedule_free

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(settings.general, "deterministic", True)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
    return import_cupy() if request.param == "cupy" else np


def repeated(rng, count, size):
    """Give positions of which some repeat often, and some are not there."""
    return np.where(rng.random(count) < 0.3, 3, rng.integers(1, size, count))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("source", [np.float16, np.float32])
def test_sums_are_those_of_one_after_the_other(dtype, source, deterministic, xp, rng):
    out = rng.standard_normal(40).astype(dtype)
    positions = repeated(rng, 900, 40)
    values = (rng.standard_normal(900) * 10).astype(source)
    if dtype == np.int64:
        values = values.astype(np.int64)
    expected = out.copy()
    for position, value in zip(positions, values.astype(dtype), strict=True):
        expected[position] += value
    found = xp.asarray(out)
    kernels.add_at("add", found, xp.asarray(positions), xp.asarray(values))
    assert to_device(found, "cpu").tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float16, BFLOAT16, np.float32, np.float64])
def test_what_is_written_last_stays(dtype, deterministic, xp, rng):
    out = rng.standard_normal(40).astype(dtype)
    positions = repeated(rng, 900, 40)
    values = (rng.standard_normal(900) * 10).astype(dtype)
    expected = out.copy()
    for position, value in zip(positions, values, strict=True):
        expected[position] = value
    found = xp.asarray(out)
    kernels.put_at("put", found, xp.asarray(positions), xp.asarray(values))
    assert to_device(found, "cpu").tobytes() == expected.tobytes()


def test_no_elements(deterministic, xp):
    out, none = xp.ones(3), xp.zeros(0, np.int64)
    kernels.add_at("add", out, none, xp.zeros(0))
    kernels.put_at("put", out, none, xp.zeros(0))
    assert out.tolist() == [1, 1, 1]


def test_threads_do_not_race(deterministic, emulated_cuda, rng):
    positions, values = repeated(rng, 600, 20), rng.standard_normal(600).astype(np.float32)

    def compute():
        out = np.zeros(20, np.float32)
        kernels.add_at("add", out, positions, values)
        kernels.put_at("put", out[:10], positions[positions < 10], values[positions < 10])
        return out

    assert_schedule_free(emulated_cuda, compute)


def test_a_captured_step_has_no_order(deterministic, emulated_cuda, monkeypatch):
    monkeypatch.setattr(indexing, "in_step", lambda: True)
    for kernel in (kernels.add_at, kernels.put_at):
        with pytest.raises(
            RuntimeError, match=r"scatter: elements that are named twice need a fixed"
        ):
            kernel("scatter", np.zeros(3), np.zeros(2, np.int64), np.ones(2))
    monkeypatch.setattr(settings.general, "deterministic", False)
    out = np.zeros(3)
    kernels.add_at("scatter_add", out, np.zeros(2, np.int64), np.ones(2))
    assert out.tolist() == [2, 0, 0]
