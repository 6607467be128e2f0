"""Devices: where an array lives, which one is the default, and why CUDA is not usable.

This module imports nothing of gradengine, and CuPy only when an answer needs it.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import ModuleType
    from typing import Final

ENVIRONMENT_VARIABLE = "GRADENGINE_DEVICE"
_ANYWHERE = nullcontext()
_INSTALL = "pip install 'gradengine[cuda12]'"


class Device:
    """Name a place for arrays: ``cpu``, or one CUDA GPU by its index. Made by `device`.

    ``type`` is "cpu" or "cuda"; ``index`` is None for the CPU. Devices compare by value and can be
    dictionary keys.
    """

    __slots__ = ("index", "type")

    def __init__(self, type: str, index: int | None = None) -> None:
        self.type: Final = type
        self.index: Final = index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Device):
            return NotImplemented
        return self.type == other.type and self.index == other.index

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __repr__(self) -> str:
        if self.index is None:
            return f"device(type={self.type!r})"
        return f"device(type={self.type!r}, index={self.index})"

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")


@cache
def _cuda(index: int) -> Device:
    return Device("cuda", index)


def device(type: str | int | Device, index: int | None = None) -> Device:
    """Return the Device that ``type`` names, without asking whether it is usable.

    ``type`` is "cpu", "cuda" (the GPU of index 0), "cuda:<index>", a GPU index or a Device;
    ``index`` may stand beside "cuda". Raises ValueError for anything else.
    """
    found = _parse(type, index)
    if found is None:
        got = f"type={type!r}" if index is None else f"type={type!r}, index={index!r}"
        raise ValueError(
            'device: a device is named by "cpu", "cuda", "cuda:<index>", an index >= 0 or a Device;'
            f" got {got}"
        )
    return found


def _parse(spec: Any, index: Any) -> Device | None:
    """Return the Device, or None where the names make none."""
    if index is not None:
        return _cuda(index) if spec == "cuda" and _is_index(index) else None
    if isinstance(spec, Device):
        return spec
    if _is_index(spec):
        return _cuda(spec)
    if spec == "cpu":
        return CPU
    if spec == "cuda":
        return _cuda(0)
    if isinstance(spec, str) and spec.startswith("cuda:") and spec[5:].isdecimal():
        return _cuda(int(spec[5:]))
    return None


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def import_cupy() -> Any:
    """Return the cupy module; its compiled parts have no types, hence Any."""
    import cupy  # pyright: ignore[reportMissingImports]

    return cupy


def cupy_problem() -> str | None:
    """Say in one sentence why CuPy cannot be imported, with the remedy, or return None where it can."""
    try:
        import_cupy()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed ({_INSTALL})"
        return f"CuPy could not be imported: {_first_line(error)} (reinstall it: {_INSTALL})"
    return None


@cache
def cuda_unavailable_reason() -> str | None:
    """Say in one sentence why CUDA is not usable, with the remedy, or return None where it is.

    The first call imports CuPy, allocates on GPU 0, computes there and copies the result back;
    the answer is kept for the life of the process. Never raises.
    """
    reason = cupy_problem()
    if reason is not None:
        return reason
    cupy = import_cupy()
    try:
        return _driver_problem(cupy) or _computation_problem(cupy)
    except Exception as error:
        return f"the CUDA runtime failed: {_first_line(error)} (check the driver with nvidia-smi)"


def _driver_problem(cupy: Any) -> str | None:
    runtime = cupy.cuda.runtime
    driver = runtime.driverGetVersion()  # 0 where no driver is loaded
    if driver == 0:
        return "no NVIDIA driver is loaded (install one; nvidia-smi must list the GPU)"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if runtime.runtimeGetVersion() // 1000 > driver // 1000:
            return (
                f"the NVIDIA driver knows CUDA {cuda_version(driver)} but CuPy needs CUDA "
                f"{cuda_version(runtime.runtimeGetVersion())} (update the driver)"
            )
        if "NoDevice" not in str(error):
            raise
        count = 0
    if count == 0:
        return "the NVIDIA driver sees no GPU (check nvidia-smi and CUDA_VISIBLE_DEVICES)"
    return None


def _computation_problem(cupy: Any) -> str | None:
    """Allocate, add (the first kernel shows whether NVRTC is there) and copy back."""
    values = np.arange(4, dtype=np.float32)
    try:
        with cupy.cuda.Device(0):
            array = cupy.asarray(values)
            result = cupy.asnumpy(array + array)
    except cupy.cuda.memory.OutOfMemoryError as error:
        return f"GPU 0 has no memory left: {_first_line(error)} (nvidia-smi shows who holds it)"
    except Exception as error:
        return (
            f"a first computation on GPU 0 failed: {_first_line(error)} "
            f"({_INSTALL} brings the CUDA libraries)"
        )
    if not np.array_equal(result, values + values):
        return "a first computation on GPU 0 gave wrong numbers (check the GPU with nvidia-smi)"
    return None


def cuda_version(number: int) -> str:
    """Spell CUDA's version number: 12090 is "12.9"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cuda_is_available() -> bool:
    """Return whether arrays can live and be computed on a CUDA GPU."""
    return cuda_unavailable_reason() is None


@cache
def device_count() -> int:
    """Return the number of usable CUDA GPUs, 0 where CUDA is not usable."""
    return import_cupy().cuda.runtime.getDeviceCount() if cuda_is_available() else 0


_chosen_default: Device | None = None


def default_device() -> Device:
    """Return the device of new arrays.

    It is what `set_default_device` chose; else what the environment variable GRADENGINE_DEVICE
    names; else the first CUDA GPU if usable; else the CPU. Resolved on first use.
    """
    return _chosen_default or _initial_default()


def set_default_device(spec: str | int | Device | None) -> None:
    """Choose the device of new arrays for the whole process; None takes the choice back.

    Raises ValueError for a bad name and RuntimeError where the device is not usable.
    """
    global _chosen_default
    _chosen_default = None if spec is None else resolve(spec)


@cache
def _initial_default() -> Device:
    spec = os.environ.get(ENVIRONMENT_VARIABLE)
    if not spec:
        return _cuda(0) if cuda_is_available() else CPU
    try:
        return resolve(spec)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{ENVIRONMENT_VARIABLE}={spec}: {error}") from None


def resolve(spec: str | int | Device | None) -> Device:
    """Return the usable Device that ``spec`` names; None names the default device.

    Raises ValueError for a bad name and RuntimeError where the device is not usable.
    """
    if spec is None:
        return default_device()
    found = device(spec)
    if found.index is None:
        return found
    reason = cuda_unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"device: CUDA is not usable: {reason}")
    if found.index >= device_count():
        raise RuntimeError(
            "device: the index must name one of the CUDA GPUs (index < device_count()); "
            f"got index={found.index}, device_count()={device_count()}"
        )
    return found


def array_module(array: Any) -> ModuleType:
    """Return the module that ``array`` belongs to: numpy or cupy.

    Raises TypeError for anything that is not an array or a NumPy scalar.
    """
    if type(array) is np.ndarray:
        return np
    # A CuPy array exists only where cupy has been imported, so it is never imported here.
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    raise TypeError(
        "array_module: an array must be a NumPy or CuPy array "
        f"(numpy.ndarray or cupy.ndarray); got array of type {type(array).__name__}"
    )


def in_memory_order(function: Callable[..., Any], *arrays: Any, **attributes: Any) -> Any:
    """Call an elementwise function of CuPy arrays; its result lies in memory as the inputs do.

    CuPy's own functions give C order whatever they are given; channels-last memory would be lost.
    """
    ndim = max(getattr(array, "ndim", 0) for array in arrays)
    order = list(range(ndim))
    for array in arrays:
        if getattr(array, "ndim", 0) == ndim > 1 and not array.flags.c_contiguous:
            order.sort(key=lambda axis: -abs(array.strides[axis]))
            break
    if order == sorted(order):
        return function(*arrays, **attributes)
    moved = [_in_order(array, order) for array in arrays]
    return function(*moved, **attributes).transpose(sorted(order, key=order.__getitem__))


def _in_order(array: Any, order: list[int]) -> Any:
    if getattr(array, "ndim", 0) == 0:
        return array
    added = (1,) * (len(order) - array.ndim)  # axes along which it broadcasts
    return array.reshape(added + array.shape).transpose(order)


def device_of(array: Any) -> Device:
    """Return the Device that holds a NumPy or CuPy array."""
    if array_module(array) is np:
        return CPU
    return _cuda(array.device.id)


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which CuPy works on the device of ``array``; for NumPy's it does nothing."""
    return _ANYWHERE if array_module(array) is np else array.device


def to_device(array: Any, device: str | int | Device | None) -> Any:
    """Return ``array`` on ``device``: itself if it is there, else a copy in the same axis order.

    Copies to the CPU wait for the GPU. Raises as `resolve` does.
    """
    target = resolve(device)
    source = device_of(array)
    if target == source:
        return array
    return _in_order_of_memory(lambda array: _copy_across(array, source, target), array)


def _in_order_of_memory(copied: Callable[[Any], Any], array: Any) -> Any:
    """Return a copy in the same axis order: transfers make C-contiguous ones.

    Moving the axes into memory order around the copy keeps channels-last arrays channels-last.
    """
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    copy = copied(array.transpose(order))
    return copy.transpose(sorted(range(array.ndim), key=order.__getitem__))


def _copy_across(array: Any, source: Device, target: Device) -> Any:
    cupy = import_cupy()
    if target.index is None:
        with cupy.cuda.Device(source.index):
            return cupy.asnumpy(array)  # waits for the GPU
    with cupy.cuda.Device(target.index):
        return cupy.asarray(array)


def to_pinned(array: Any) -> np.ndarray:
    """Return a copy of an array on a GPU in page-locked memory of the CPU. Waits for the GPU.

    Such memory is copied from and to a GPU faster, and is not available to anything else.
    """
    cupy = import_cupy()

    def copied(array: Any) -> Any:
        memory = cupy.cuda.alloc_pinned_memory(max(array.nbytes, 1))
        copy = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        return array.get(out=copy)

    with array.device:
        return _in_order_of_memory(copied, array)


def synchronize(device: str | int | Device | None = None) -> None:
    """Wait until all work queued on ``device`` (None: the default device) is done."""
    target = resolve(device)
    if target.index is not None:
        import_cupy().cuda.Device(target.index).synchronize()


def check_same_device(name: str, *arrays: Any) -> None:
    """Raise TypeError, in the name of operation ``name``, unless all arrays share one device."""
    if len({_index_of(array) for array in arrays}) > 1:
        devices = dict.fromkeys(device_of(array) for array in arrays)
        raise TypeError(
            f"{name}: all tensors must be on one device; got {' and '.join(map(str, devices))} "
            "(move them with .to(device))"
        )


def _index_of(array: Any) -> int | None:
    """Return the index of the GPU that holds an array, None for NumPy's, whose device is "cpu"."""
    return None if type(array) is np.ndarray else getattr(array.device, "id", None)
