"""Kernels by source and name, ready to launch on the current device and stream.

What runs them is the module's `runtime`: CuPy's driver, or in tests an emulator on NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradengine.kernels.cuda import compiler
from gradengine.kernels.layout import Array

HELD_CYCLES = 1_000_000  # about half a millisecond, in which the host launches what is timed
_C_NAMES = {"float32": "float", "float64": "double"}

# struct Divisor of indices.cuh
DIVISOR = np.dtype([("divisor", np.int32), ("multiplier", np.uint32), ("shift", np.int32)])


class Limits(NamedTuple):
    """What a launch has to know of a device."""

    architecture: int  # compute capability: 90 is 9.0
    multiprocessors: int
    shared_bytes: int  # shared memory that one block can have


class Runtime(Protocol):
    """Loads kernels for the current device; a loaded one takes (grid, block, arguments, bytes)."""

    def device(self) -> int:
        """Return the index of the current device."""
        ...

    def limits(self, device: int) -> Limits: ...

    def load(self, source: str, name: str) -> Callable[..., None]: ...

    def seconds(self, run: Callable[[], None]) -> float:
        """Return how long the device takes for what `run` launches; waits for it."""
        ...


class CupyRuntime:
    """The devices that CuPy drives."""

    @cached_property
    def _cupy(self) -> Any:
        """CuPy's module of the CUDA runtime: imported once, every launch asks for the device."""
        from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]

        return runtime

    def device(self) -> int:
        return self._cupy.getDevice()

    @cache  # noqa: B019 - there is one runtime
    def limits(self, device: int) -> Limits:
        properties = self._cupy.getDeviceProperties(device)
        return Limits(
            10 * properties["major"] + properties["minor"],
            properties["multiProcessorCount"],
            properties["sharedMemPerBlockOptin"],
        )

    def load(self, source: str, name: str) -> Callable[..., None]:
        """Compile a kernel if need be, and allow it all shared memory that a block can have."""
        from cupy.cuda.function import Module  # pyright: ignore[reportMissingImports]
        from cupy_backends.cuda.api import driver  # pyright: ignore[reportMissingImports]

        limits = self.limits(self.device())
        architecture = compiler.architecture_name(limits.architecture)
        symbol, cubin = compiler.machine_code(source, name, architecture)
        module = Module()
        module.load(cubin)
        function = module.get_function(symbol)
        static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function.ptr)
        driver.funcSetAttribute(
            function.ptr,
            driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            limits.shared_bytes - static,
        )
        return function

    def seconds(self, run: Callable[[], None]) -> float:
        from cupy.cuda import Event, get_elapsed_time  # pyright: ignore[reportMissingImports]

        start, end = Event(), Event()
        # Events, and what is between them, are queued behind it: the host's time does not count
        kernel("tuning.cu", "hold")((1,), (32,), (HELD_CYCLES,))
        start.record()
        run()
        end.record()
        end.synchronize()
        return get_elapsed_time(start, end) / 1e3


runtime: Runtime = CupyRuntime()


class Kernel:
    """One kernel on one device.

    Arguments are arrays with an axis or more, handed over as pointers, None for the null pointer,
    int for long long, float for double, NumPy scalars for their type, and what `by_value` gives
    for structs. The launch returns at once; it is ordered after what the current stream
    was given before.
    """

    __slots__ = ("name", "run", "source")

    def __init__(self, source: str, name: str, run: Callable[..., None]) -> None:
        self.source = source
        self.name = name
        self.run = run

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        self.run(grid, block, arguments, shared_bytes)


_kernels: dict[tuple[int, str, str], Kernel] = {}


def kernel(source: str, name: str) -> Kernel:
    """Return the kernel that `name` instantiates in a source of this folder: "sgd<float>", say."""
    key = (runtime.device(), source, name)
    found = _kernels.get(key)
    if found is None:
        found = _kernels[key] = Kernel(source, name, runtime.load(source, name))
    return found


def forget_kernels() -> None:
    """Let every kernel be loaded anew: after `runtime` was replaced."""
    _kernels.clear()


def device_limits() -> Limits:
    """Return the limits of the current device."""
    return runtime.limits(runtime.device())


def by_value(record: np.ndarray) -> np.ndarray:
    """Return a 0-d array of a record as the bytes of a struct, for a kernel that takes it by value.

    At each launch CuPy asks NumPy for the array's description, which costs more than the launch
    where it tells of dozens of fields.
    """
    return record.view(f"V{record.itemsize}")


def divisor(number: int) -> tuple[int, int, int]:
    """Return (number, multiplier, shift): n // number == n * multiplier >> shift, n < 2 ** 31."""
    shift = 31 + (number - 1).bit_length()
    return number, -(-(1 << shift) // number), shift


@cache  # NumPy makes up a dtype's name anew whenever it is asked
def c_name(dtype: Any) -> str:
    """Return the element type's name in the kernels' sources: float32 is "float"."""
    name = np.dtype(dtype).name
    return _C_NAMES.get(name, name)


def address(array: Array) -> int:
    """Return where an array's first element lies in its device's memory."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def addresses(arrays: Sequence[Array]) -> list[int]:
    """Return where arrays of one device lie in its memory."""
    if arrays and not isinstance(arrays[0], np.ndarray):
        return [array.data.ptr for array in arrays]
    return [array.ctypes.data for array in arrays]
