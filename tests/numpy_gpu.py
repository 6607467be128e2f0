"""A stand-in for CuPy and its graphs: arrays of NumPy whose work can be recorded and replayed.

Functions and methods of its arrays are NumPy's, kernels are launched on the emulator. There are two
GPUs, and work on the arrays of one that is not the current one is refused. While a run is
captured, each of them is noted with its arguments, and at the end of the capture all memory is as it
was before, memory that is new holding NaN: as on a GPU, nothing has been computed yet. Whatever
would copy to or from the CPU then, or call cuBLAS, raises what CuPy raises.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradengine import devices
from gradengine.kernels.cuda import launch
from tests.emulator.emulator import Emulator
from tests.emulator.guarded import POISON

__name__ = "cupy.stand_in"  # where an error comes from, CuPy shows as itself

# Of numpy.ndarray; those that are ufuncs in disguise come through __array_ufunc__ too, but then twice
METHODS = (
    *("all", "any", "argmax", "argmin", "argsort", "astype", "clip", "copy", "cumsum", "fill"),
    *("flatten", "max", "mean", "min", "nonzero", "prod", "put", "ravel", "repeat", "reshape"),
    *("round", "searchsorted", "sort", "squeeze", "std", "sum", "swapaxes", "take", "transpose"),
    *("var", "view", "__getitem__", "__setitem__"),
)
VIEWS = (
    *("__getitem__", "broadcast_to", "expand_dims", "ravel", "reshape", "squeeze", "swapaxes"),
    *("transpose", "view"),
)
CUBLAS = ("dot", "einsum", "inner", "matmul", "tensordot", "vdot")
READS = ("item", "tolist", "tobytes", "__array__", "__bool__", "__float__", "__index__", "__int__")


class Recorder:
    """Runs what the stand-in is asked for, and notes it while something is captured."""

    def __init__(self) -> None:
        self.noted: list[Callable[[], None]] | None = None
        self.memory: dict[int, weakref.ref[np.ndarray]] = {}

    def refuse(self, what: str) -> None:
        if self.noted is not None:
            raise RuntimeError(f"the current stream is capturing, so {what} are disallowed")

    def run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        name = getattr(function, "__name__", "")
        if name == "matmul" and any(x.dtype.kind == "V" and x.ndim > 2 for x in arguments):
            raise TypeError("data type 'E' not understood")  # CuPy's word for bfloat16
        if name in CUBLAS and self.noted is not None:
            raise NotImplementedError(
                "calling cuBLAS API during stream capture is currently unsupported"
            )
        if any(_is_foreign(value) for value in _flat((arguments, list(keywords.values())))):
            raise TypeError(f"{function}: arrays of CuPy and of NumPy do not mix")
        given = (arguments, list(keywords.values()))
        arguments, keywords = _plain(arguments), _plain(keywords)
        results = function(*arguments, **keywords)
        if name in VIEWS and np.shares_memory(results, arguments[0]):
            with given[0][0].device:
                return self._wrapped(results)
        self.check_devices(given)
        wrapped = self._wrapped(results)
        if self.noted is not None:
            self.noted.append(lambda: _overwrite(wrapped, function(*arguments, **keywords)))
        return wrapped

    def allocate(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        array = self._wrapped(function(*map(_plain, arguments), **keywords))
        if (
            self.noted is not None
        ):  # what was there before is lost: others used the memory meanwhile
            self.noted.append(lambda: _poison(array))
        return array

    def launch(self, kernel: Callable[..., None], *arguments: Any) -> None:
        self.check_devices(arguments)
        arguments = _plain(arguments)
        if self.noted is None:
            kernel(*arguments)
        else:
            self.noted.append(lambda: kernel(*arguments))

    def check_devices(self, values: Any) -> None:
        for value in _flat(values):
            if isinstance(value, GpuArray) and value.device is not CURRENT[-1]:
                raise RuntimeError(f"an array of {value.device} is used on {CURRENT[-1]}")

    def capture(self, work: Callable[[], Any]) -> tuple[Any, list[Callable[[], None]]]:
        before = {key: array.copy() for key, array in self._buffers()}
        self.noted = noted = []
        try:
            return work(), noted
        finally:
            self.noted = None
            for key, array in self._buffers():
                if key in before:
                    array[...] = before[key]
                else:
                    _poison(array)

    def _wrapped(self, results: Any) -> Any:
        if isinstance(results, (tuple, list)):
            return type(results)(map(self._wrapped, results))
        if not isinstance(results, (np.ndarray, np.generic)):
            return results
        array = np.asarray(results).view(GpuArray)
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.memory.setdefault(id(owner), weakref.ref(owner))
        if self.memory[id(owner)]() is not owner:  # an address may be used again
            self.memory[id(owner)] = weakref.ref(owner)
        return array

    def _buffers(self) -> list[tuple[int, np.ndarray]]:
        """Return all memory that is in use, flat."""
        found = [(key, reference()) for key, reference in self.memory.items()]
        return [
            (key, np.asarray(array).reshape(-1, order="A"))
            for key, array in found
            if array is not None and array.flags.writeable
        ]


recorder = Recorder()


class GpuArray(np.ndarray):
    """What the stand-in calls cupy.ndarray."""

    def __array_finalize__(self, source: Any) -> None:
        self._device = source.device if isinstance(source, GpuArray) else CURRENT[-1]

    @property
    def device(self) -> Any:
        return self._device

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        call = ufunc if method == "__call__" else getattr(ufunc, method)
        result = recorder.run(call, *inputs, **keywords)
        out = keywords.get("out", (None,))[0]
        return result if out is None else out

    def __array_function__(self, function: Any, types: Any, inputs: Any, keywords: Any) -> Any:
        return recorder.run(function, *inputs, **keywords)

    def __pow__(self, exponent: Any, modulus: None = None) -> Any:
        power = super().__pow__(exponent)
        if type(exponent) is float and exponent in (0.5, 2.0, -1.0) and self.dtype.kind == "V":
            # CuPy asks NumPy for the common dtype of bfloat16 and a number
            return power.astype(np.result_type(self.dtype, exponent))
        return power

    def set(self, values: np.ndarray) -> None:
        recorder.refuse("H2D transfers")
        _plain(self)[...] = values

    def get(self) -> np.ndarray:
        recorder.refuse("D2H transfers")
        return _plain(self).copy()


def _method(name: str) -> Callable[..., Any]:
    function = getattr(np.ndarray, name)
    return lambda self, *arguments, **keywords: recorder.run(function, self, *arguments, **keywords)


def _read(name: str) -> Callable[..., Any]:
    def method(self: GpuArray, *arguments: Any, **keywords: Any) -> Any:
        recorder.refuse("D2H transfers")
        if name == "__array__":
            raise TypeError("Implicit conversion to a NumPy array is not allowed")
        return getattr(_plain(self), name)(*arguments, **keywords)

    return method


for _name in METHODS:
    setattr(GpuArray, _name, _method(_name))
for _name in READS:
    setattr(GpuArray, _name, _read(_name))


class _Device:
    """A GPU, as CuPy describes one."""

    def __init__(self, index: int) -> None:
        self.id = index

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> _Device:
        CURRENT.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        CURRENT.pop()

    def synchronize(self) -> None:
        if recorder.noted is not None:
            raise RuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )


DEVICES = (_Device(0), _Device(1))
CURRENT = [DEVICES[0]]


class FakeCupy(ModuleType):
    """NumPy's functions on the stand-in's arrays."""

    ndarray = GpuArray

    def __init__(self) -> None:
        super().__init__("cupy")
        runtime = SimpleNamespace(getDeviceCount=lambda: len(DEVICES))
        self.cuda: Any = SimpleNamespace(runtime=runtime, Device=DEVICES.__getitem__)

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, (type, np.dtype)) or not callable(found):
            return found
        run = recorder.allocate if name in ("empty", "empty_like") else recorder.run
        function = partial(run, found)
        if isinstance(found, np.ufunc):
            function.at = partial(run, found.at)
        return function

    def asarray(self, values: Any, *arguments: Any, **keywords: Any) -> GpuArray:
        if not isinstance(values, GpuArray):
            recorder.refuse("H2D transfers")
            values = np.array(values).view(GpuArray)
        elif values.device is not CURRENT[-1]:
            values = _plain(values).copy().view(GpuArray)
        return recorder.run(np.asarray, values, *arguments, **keywords)

    def array(self, values: Any, *arguments: Any, **keywords: Any) -> GpuArray:
        if not isinstance(values, GpuArray):
            return self.asarray(values, *arguments, **keywords)
        return recorder.run(np.array, values, *arguments, **keywords)

    def asnumpy(self, array: GpuArray) -> np.ndarray:
        return array.get()


class RecordingEmulator(Emulator):
    """The emulator, whose launches can be recorded."""

    def load(self, source: str, name: str) -> Callable[..., None]:
        return partial(recorder.launch, super().load(source, name))

    def device(self) -> int:
        return CURRENT[-1].id


class FakeGraphs:
    """What the stand-in captures; `captured` and `launched` count."""

    def __init__(self, device: int) -> None:
        self.device = DEVICES[device]
        self.captured = self.launched = 0

    def run(self, work: Callable[[], Any]) -> Any:
        with self.device:
            return work()

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        self.captured += 1
        with self.device:
            return recorder.capture(work)

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype).view(GpuArray)

    def launch(self, graph: Sequence[Callable[[], None]]) -> None:
        self.launched += 1
        for replay in graph:
            replay()


CUPY = FakeCupy()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the GPUs of a test that has the fixture `emulated_cuda`."""
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(devices, "device_count", lambda: len(DEVICES))
    monkeypatch.setattr(launch, "runtime", RecordingEmulator())


def _poison(array: np.ndarray) -> None:
    np.ndarray.view(array, np.ndarray).reshape(-1, order="A").view(np.uint8)[...] = POISON


def _plain(value: Any) -> Any:
    """Return nested arguments with NumPy's own view of each array."""
    if isinstance(value, GpuArray):
        return np.ndarray.view(value, np.ndarray)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    return value


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _is_foreign(value: Any) -> bool:
    return type(value) is np.ndarray and value.ndim > 0


def _overwrite(found: Any, again: Any) -> None:
    """Put the results of a replay where those of the capture are."""
    if isinstance(found, (tuple, list)):
        for one, other in zip(found, again, strict=True):
            _overwrite(one, other)
    elif isinstance(found, GpuArray):
        target = _plain(found)
        if not np.shares_memory(target, again):
            target[...] = again
