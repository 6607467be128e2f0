"""CUDA kernels on NumPy arrays, for the length of a test."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cuda import launch
from tests.emulator.emulator import SCHEDULES, Emulator, unavailable_reason
from tests.emulator.guarded import POISON


@pytest.fixture
def emulated_cuda(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Emulator]:
    """Send NumPy arrays to the CUDA kernels, which an emulated device runs.

    Gives the emulator; a test may change its `device_limits` and its `schedule`. Arrays of
    numpy.empty hold NaN: a kernel that leaves an element out shows.
    """
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    emulator = Emulator()
    emulator.schedule = getattr(request, "param", emulator.schedule)
    monkeypatch.setattr(launch, "runtime", emulator)
    monkeypatch.setattr(kernels, "place", lambda array: "cuda")
    for function in (np.empty, np.empty_like):
        monkeypatch.setattr(np, function.__name__, _poisoned(function))
    launch.forget_kernels()
    emulator.statistics()  # which all emulators share: what earlier tests did is not counted
    yield emulator
    launch.forget_kernels()


# Runs a test that asks for `emulated_cuda` once by each schedule.
every_schedule = pytest.mark.parametrize("emulated_cuda", SCHEDULES, indirect=True, ids=str)


def assert_schedule_free(emulator: Emulator, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return what compute() returns, which must be the same bits by every schedule."""
    results = []
    for schedule in SCHEDULES:
        with emulator.scheduled(schedule):
            results.append(compute())
    for schedule, result in zip(SCHEDULES, results, strict=True):
        same = result.tobytes() == results[0].tobytes()
        assert same, f"{SCHEDULES[0]} and {schedule} give different bits: threads race"
    return results[0]


def _poisoned(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def make(*arguments: Any, **keywords: Any) -> np.ndarray:
        array = function(*arguments, **keywords)
        if not array.dtype.hasobject:
            ctypes.memset(array.ctypes.data, POISON, array.nbytes)
        return array

    return make
