"""Random numbers: streams that count, whose numbers are the same on every device.

A stream is a seed and the number of the next block of it that nobody has drawn. What stands in a block
depends on these two alone, so that a device draws where it needs the numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine import devices, kernels
from gradengine.devices import Device, device_of
from gradengine.kernels.cuda import capture
from gradengine.operation import array_of

# What PyTorch starts its generators from.
DEFAULT_SEED = 67280421310721
_WORD = 1 << 64
_STATE = np.dtype([("seed", "<u8"), ("next", "<u8")])
_INT64, _BOOL = np.dtype(np.int64), np.dtype(np.bool_)


class Stream:
    """A seed, and how far its numbers have been drawn. No two threads are given the same numbers."""

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        self._lock = threading.Lock()
        self._seed = seed
        self._next = 0

    def take(self, blocks: int) -> tuple[int, int]:
        """Reserve blocks of the stream; return its seed and the number of the first of them."""
        with self._lock:
            first = self._next
            self._next = (first + blocks) % _WORD
            return self._seed, first

    def start(self, seed: int) -> None:
        """Begin a seed's numbers; -1 is 2^64 - 1. Raises ValueError unless 64 bits hold it."""
        if not -_WORD // 2 <= seed < _WORD:
            raise ValueError(
                f"manual_seed: seed must be an integer of 64 bits (-2^63 <= seed < 2^64); got {seed=}"
            )
        with self._lock:
            self._seed, self._next = int(seed) % _WORD, 0

    @property
    def seed(self) -> int:
        """The seed of the numbers."""
        return self._seed

    def state(self) -> np.ndarray:
        """Return seed and position as an array of 16 bytes."""
        with self._lock:
            return np.array([(self._seed, self._next)], _STATE).view(np.uint8)

    def restore(self, state: Any) -> None:
        """Continue from what `state` returned. Raises ValueError for anything else."""
        array = np.asarray(array_of(state))
        if array.dtype != np.uint8 or array.shape != (_STATE.itemsize,):
            raise ValueError(
                "set_rng_state: state must be what get_rng_state returned (uint8 of 16 elements); "
                f"got dtype={array.dtype}, shape={array.shape}"
            )
        found = np.ascontiguousarray(array).view(_STATE)[0]
        with self._lock:
            self._seed, self._next = int(found["seed"]), int(found["next"])


# The process's own, of which everything draws that is given no other.
default = Stream()


def uniform(shape: tuple[int, ...], dtype: np.dtype, device: Device, generator: Any = None) -> Any:
    """Return an array of numbers drawn evenly from [0, 1), as many bits as dtype has below 1."""
    return _filled(kernels.random_uniform, shape, dtype, device, generator)


def normal(shape: tuple[int, ...], dtype: np.dtype, device: Device, generator: Any = None) -> Any:
    """Return an array of numbers drawn from the normal distribution of mean 0 and variance 1."""
    return _filled(kernels.random_normal, shape, dtype, device, generator)


def integers(
    low: int,
    high: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    device: Device,
    generator: Any = None,
) -> Any:
    """Return an array of integers drawn evenly from low to high - 1."""
    drawn = _filled(kernels.random_integers, shape, _INT64, device, generator, low, high)
    with devices.on_device_of(drawn):
        return drawn.astype(dtype, copy=False)


def permutation(count: int, device: Device, generator: Any = None) -> Any:
    """Return the integers 0 to count - 1 as int64 in random order: that of random keys of 64 bits."""

    def order(device: Device) -> Any:
        keys = _filled(kernels.random_integers, (count,), _INT64, device, generator, 0, _WORD)
        with devices.on_device_of(keys):
            return keys.argsort(kind="stable").astype(_INT64, copy=False)

    recording = capture.current()
    if recording is None or device.index is None:
        return order(device)
    # No graph holds a sort
    return recording.feed(lambda: order(devices.CPU), (count,), _INT64)


def bernoulli_mask(
    shape: tuple[int, ...], probability: float, like: Any, generator: Any = None
) -> Any:
    """Return a bool array on the device of the array `like`, True with `probability`."""
    device = device_of(like)
    return _filled(kernels.random_bernoulli, shape, _BOOL, device, generator, probability)


def _stream_of(generator: Any) -> Stream:
    stream = getattr(generator, "stream", None)
    if not isinstance(stream, Stream):
        raise TypeError(
            "random: generator must be a gradengine.Generator; "
            f"got an object of type {type(generator).__name__}"
        )
    return stream


def _filled(
    fill: Callable[..., None],
    shape: tuple[int, ...],
    dtype: np.dtype,
    device: Device,
    generator: Any,
    *numbers: Any,
) -> Any:
    """Return a new array that a kernel fills with the generator's next numbers."""
    take = default.take if generator is None else _stream_of(generator).take
    if device.index is None:
        out = np.empty(shape, dtype)
        fill(out, *numbers, take)
        return out
    cupy = devices.import_cupy()
    with cupy.cuda.Device(device.index):
        out = cupy.empty(shape, dtype)
        fill(out, *numbers, take)
    return out
