"""What the host does for a step that is not captured: its functions, and the calls it is made of.

An eager step of few images takes as long as Python needs to launch its kernels, whatever the device.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.gpu_device import Device, Run
from benchmarks.gpu_steps import Workload
from benchmarks.report import quantity
from gradengine.devices import array_module
from gradengine.kernels.cuda import slices
from gradengine.kernels.cuda.launch import by_value, device_limits, kernel

STEPS = 20
CALLS, REPEATS = 200, 20  # of each primitive
ORDERS = ("tottime", "cumtime")

_RECORD = np.dtype([(name, np.int64) for name in ("a", "b", "c", "d", "e")])  # struct Part


def host_report(device: Device, batch: int, pixels: int, longest: int) -> Iterator[str]:
    """Yield what CuPy's calls take, and for each precision what the functions of a step take."""
    yield from primitive_lines(device)
    work = Workload(device, "training", batch, pixels)
    for precision in ("bf16", "tf32"):
        chosen = work.ours(precision)
        run = chosen.make()
        seconds = host_seconds(device, run)
        yield f"\n{chosen.name}, batch {batch}: the host queues a step in {quantity(seconds, 's')}"
        yield profile_text(device, run, longest)


def host_seconds(device: Device, run: Run) -> float:
    """Return the host's seconds for a step: it waits for the device only before and after all."""
    for _ in range(min(STEPS, 3)):
        run()
    device.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    seconds = (time.perf_counter() - start) / STEPS
    device.synchronize()
    return seconds


def profile_text(device: Device, run: Run, longest: int) -> str:
    """Return the functions of some steps in both of ORDERS; the profile itself costs as much again."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(STEPS):
        run()
    profile.disable()
    device.synchronize()
    text = io.StringIO()
    found = pstats.Stats(profile, stream=text).strip_dirs()
    for order in ORDERS:
        found.sort_stats(order).print_stats(longest)
    return f"{STEPS} steps\n{text.getvalue()}"


def primitive_lines(device: Device) -> Iterator[str]:
    """Yield a line for each call that steps are made of, with the least time that it took."""
    yield f"{'seconds':>9}  call"
    for name, call in primitives(device.xp).items():
        call()
        device.synchronize()
        best = min(_seconds_of_calls(device, call) for _ in range(REPEATS))
        yield f"{quantity(best / CALLS, 's'):>9}  {name}"


def _seconds_of_calls(device: Device, call: Callable[[], Any]) -> float:
    seconds = timeit.timeit(call, number=CALLS)
    device.synchronize()
    return seconds


def primitives(xp: Any) -> dict[str, Callable[[], Any]]:
    """Return calls by their names, on arrays of a module: of NumPy's only what it has too."""
    array = xp.empty((32, 56, 56, 64), np.float32)
    vector = xp.zeros(1000, np.float32)
    number = xp.zeros((), np.int64)
    shape, dtype = array.shape, array.dtype
    calls: dict[str, Callable[[], Any]] = {
        "an empty lambda": lambda: None,
        "empty(shape, dtype)": lambda: xp.empty(shape, dtype),
        "empty_like(array)": lambda: xp.empty_like(array),
        "zeros(1000)": lambda: xp.zeros(1000, dtype),
        "array.transpose(0, 3, 1, 2)": lambda: array.transpose(0, 3, 1, 2),
        "array.reshape(-1, 64)": lambda: array.reshape(-1, 64),
        "array[0]": lambda: array[0],
        "array.flags.c_contiguous": lambda: array.flags.c_contiguous,
        "array.strides": lambda: array.strides,
        "array.device": lambda: array.device,
        "array_module(array)": lambda: array_module(array),
        "np.dtype.name": lambda: dtype.name,
        "0-d int64 += 1": lambda: number.__iadd__(1),
        "vector + vector": lambda: vector + vector,
        "vector.astype(float16)": lambda: vector.astype(np.float16),
        "vector.copy()": vector.copy,
    }
    return calls | (_cupy_calls(xp, array) if hasattr(xp, "cuda") else {})


def _cupy_calls(xp: Any, array: Any) -> dict[str, Callable[[], Any]]:
    """Return calls of what only CuPy has: devices, and launches of two of this package's kernels."""
    cuda = xp.cuda
    place = array.device
    parts, moments = xp.zeros((1, 64, 3), np.float32), xp.zeros((2, 64), np.float32)
    merge = kernel("normalization.cu", "batch_norm_merge_moments<float>")
    merged = (parts, array, moments[0], moments[1], 1, 64)
    add = kernel(slices.SOURCE, "add_slices<float, float, 1>")
    sums, out = xp.zeros((1, 1, 1, 256), np.float32), xp.zeros((1, 1, 256), np.float32)
    record = np.array((1, 256, 0, 1, 256), _RECORD)
    struct = by_value(record)

    def enter() -> None:
        with place:
            pass

    def add_slices(part: np.ndarray) -> None:
        add((1,), (256,), (sums, out, part, 1, 1), 1024)

    return {
        "getDevice()": cuda.runtime.getDevice,
        "setDevice()": lambda: cuda.runtime.setDevice(place.id),
        "with Device": enter,
        "get_current_stream()": cuda.get_current_stream,
        "alloc(1 MB)": lambda: cuda.alloc(1 << 20),
        "device_limits()": device_limits,
        "kernel(source, name)": lambda: kernel("normalization.cu", merge.name),
        "launch of 6 arguments": lambda: merge((2,), (32, 8), merged),
        "launch with a struct": lambda: add_slices(struct),
        "launch with a record of 5 fields": lambda: add_slices(record),
        "CuPy's own launch of 6 arguments": lambda: merge.run((2,), (32, 8), merged),
    }
