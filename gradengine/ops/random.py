"""Random numbers: one counter-based stream for the process, the same on every device.

Numbers are drawn on the CPU by NumPy's Philox generator and then moved, so that one seed gives the same
numbers on NumPy and on CuPy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine.devices import Device, device_of, to_device
from gradengine.dtypes import is_bfloat16
from gradengine.kernels.cuda import capture
from gradengine.operation import array_of

_lock = threading.Lock()  # NumPy's generators are not safe for several threads at once
_generator: Any = None


def _stream() -> Any:
    global _generator
    if _generator is None:
        _generator = np.random.Generator(np.random.Philox())
    return _generator


def manual_seed(seed: int) -> None:
    """Start the process's random stream anew from `seed`, a non-negative integer."""
    global _generator
    with _lock:
        _generator = np.random.Generator(np.random.Philox(seed))


def rng_state() -> Any:
    """Return the stream's state as an array of bytes, for `set_rng_state`."""
    with _lock:
        state = _stream().bit_generator.state
    position = [state["buffer_pos"], state["has_uint32"], state["uinteger"]]
    words = [*state["state"]["counter"], *state["state"]["key"], *state["buffer"], *position]
    return np.asarray(words, dtype=np.uint64).view(np.uint8)


def set_rng_state(state: Any) -> None:
    """Continue the stream from a state that `rng_state` returned. Raises ValueError for anything else."""
    array = np.asarray(array_of(state))
    if array.dtype != np.uint8 or array.shape != (13 * 8,):
        raise ValueError(
            "set_rng_state: state must be what get_rng_state returned (uint8 of 104 elements); "
            f"got dtype={array.dtype}, shape={array.shape}"
        )
    words = np.ascontiguousarray(array).view(np.uint64)
    with _lock:
        _stream().bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": words[0:4], "key": words[4:6]},
            "buffer": words[6:10],
            "buffer_pos": int(words[10]),
            "has_uint32": int(words[11]),
            "uinteger": int(words[12]),
        }


def uniform(shape: tuple[int, ...], dtype: Any, device: Device) -> Any:
    """Return an array of numbers drawn evenly from [0, 1)."""

    def draw() -> np.ndarray:
        drawn = _stream().random(shape, dtype=np.float64 if dtype == np.float64 else np.float32)
        if dtype.itemsize == 2:  # rounding to the nearest could give 1
            steps = 256 if is_bfloat16(dtype) else 2048
            drawn = np.floor(drawn * np.float32(steps)) / np.float32(steps)
        return drawn

    return _on_device(draw, shape, dtype, device)


def normal(shape: tuple[int, ...], dtype: Any, device: Device) -> Any:
    """Return an array of numbers drawn from the normal distribution of mean 0 and variance 1."""
    drawn_as = np.float64 if dtype == np.float64 else np.float32
    draw = lambda: _stream().standard_normal(shape, dtype=drawn_as)  # noqa: E731
    return _on_device(draw, shape, dtype, device)


def integers(low: int, high: int, shape: tuple[int, ...], dtype: Any, device: Device) -> Any:
    """Return an array of integers drawn evenly from low to high - 1."""
    draw = lambda: _stream().integers(low, high, shape, dtype=np.int64)  # noqa: E731
    return _on_device(draw, shape, dtype, device)


def permutation(count: int, device: Device) -> Any:
    """Return the integers 0 to count - 1 in random order, as int64."""
    return _on_device(lambda: _stream().permutation(count), (count,), np.dtype(np.int64), device)


def bernoulli_mask(shape: tuple[int, ...], probability: float, like: Any) -> Any:
    """Return a bool array on the device of the array `like`, True with `probability`."""
    draw = lambda: _stream().random(shape, dtype=np.float32) < probability  # noqa: E731
    return _on_device(draw, shape, np.dtype(np.bool_), device_of(like))


def _on_device(
    draw: Callable[[], Any], shape: tuple[int, ...], dtype: np.dtype, device: Device
) -> Any:
    """Return what `draw` draws as an array on the device; in a captured step anew for each replay."""

    def drawn() -> np.ndarray:
        with _lock:
            return np.asarray(draw()).astype(dtype, copy=False)

    recording = capture.current()
    if recording is None or device.index is None:
        return to_device(drawn(), device)
    return recording.feed(drawn, shape, dtype)
