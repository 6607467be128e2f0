"""GPUs under PyTorch's names: what there is, its memory and time; and steps captured as CUDA graphs."""

from __future__ import annotations

import functools
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradengine import devices
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import cuda_is_available as is_available
from gradengine.devices import device_count
from gradengine.grad_mode import is_grad_enabled
from gradengine.kernels import settings
from gradengine.kernels.cuda import capture
from gradengine.tape import Variable, tick
from gradengine.tensor import Tensor

__all__ = [
    "CapturedStep",
    "Event",
    "device_count",
    "empty_cache",
    "get_device_name",
    "graph",
    "is_available",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "synchronize",
]

_GPU = "cuda"


def synchronize(device: Any = _GPU) -> None:
    """Wait until all work queued on a GPU is done."""
    devices.synchronize(device)


def get_device_name(device: Any = _GPU) -> str:
    """Return what the GPU is called."""
    with _cupy_on(device) as cupy:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        return properties["name"].decode()


def mem_get_info(device: Any = _GPU) -> tuple[int, int]:
    """Return how many bytes of a GPU's memory are free, whoever uses the rest, and how many it has."""
    with _cupy_on(device) as cupy:
        return cupy.cuda.runtime.memGetInfo()


def memory_allocated(device: Any = _GPU) -> int:
    """Return the bytes that arrays of this process take on a GPU, without those of captured steps."""
    with _cupy_on(device) as cupy:
        return cupy.get_default_memory_pool().used_bytes()


def memory_reserved(device: Any = _GPU) -> int:
    """Return the bytes held for arrays, used or not, on a GPU, without those for captured steps."""
    with _cupy_on(device) as cupy:
        return cupy.get_default_memory_pool().total_bytes()


def empty_cache() -> None:
    """Give the memory back that is held for arrays and that none uses, on all GPUs."""
    for index in range(device_count()):
        with _cupy_on(index) as cupy:
            cupy.get_default_memory_pool().free_all_blocks()


@contextmanager
def _cupy_on(device: Any) -> Iterator[Any]:
    """Give the module cupy, with a GPU as its current one. Raises RuntimeError where it is none."""
    found = devices.resolve(device)
    if found.index is None:
        raise ValueError(f"cuda: the device must be a GPU; got device={found}")
    cupy = devices.import_cupy()
    with cupy.cuda.Device(found.index):
        yield cupy


class Event:
    """A point in the work of the current GPU; with `enable_timing`, time passes between two."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        devices.resolve(_GPU)
        self._cuda = devices.import_cupy().cuda
        self._event = self._cuda.Event(block=blocking, disable_timing=not enable_timing)

    def record(self) -> None:
        """Set the event behind what the current stream was given so far."""
        self._event.record()

    def query(self) -> bool:
        """Return whether the GPU has passed the event."""
        return self._event.done

    def synchronize(self) -> None:
        """Wait until the GPU has passed the event."""
        self._event.synchronize()

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds between this event and a later one; the GPU has passed both."""
        return self._cuda.get_elapsed_time(self._event, end._event)


# ---- captured steps ----------------------------------------------------------------------------------


def graph(step: Callable[..., Any], warmup: int = 3) -> CapturedStep:
    """Return `step` as a function that the GPU runs as one CUDA graph: without Python, launch by launch.

    The first `warmup` calls run the step as it is, which compiles its kernels; the next one captures
    what it launches; from then on, calls replay that on their inputs and return the same tensors
    with new values. Inputs are tensors or NumPy arrays, nested as you like, which are copied to
    where the step first found them; their shapes must not change. A step of training works as
    without a graph, with its learning rates, random numbers, running statistics and gradients. Other
    than that, what Python does in the step, also with numbers, is done when it is captured only.

    Raises ValueError for inputs unlike those of the first call, and RuntimeError where the step
    waits for the GPU or copies to or from the CPU, as `item()`, `print` and `tensor(...)` do.
    """
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(
            f"graph: a step must run before it is captured (warmup >= 1); got {warmup=}"
        )
    return CapturedStep(step, warmup)


class CapturedStep:
    """What `graph` returns: call it as the step."""

    def __init__(self, step: Callable[..., Any], warmup: int) -> None:
        functools.update_wrapper(self, step)
        self._step = step
        self._warmup = warmup  # calls still to come that run the step as it is
        self._inputs: _Inputs | None = None
        self._graphs: Any = None
        self._recording: _Recording | None = None

    def __call__(self, *inputs: Any) -> Any:
        if capture.current() is not None:
            raise RuntimeError("graph: a captured step cannot be part of another captured step")
        if self._inputs is None:
            first = _Inputs(inputs)
            self._graphs = capture.make_graphs(first.gpu)
            self._inputs = first
        self._inputs.take(inputs)
        if self._warmup:
            outputs = self._run_as_it_is()
            self._warmup -= 1
            return outputs
        if self._recording is None or not self._recording.is_valid():
            self._recording = None  # its memory can serve the next one
            try:
                self._recording = self._record()
            except capture.NotYetError:
                return self._run_as_it_is()
        return self._recording.replay()

    def _run_as_it_is(self) -> Any:
        with capture.running_step(None):
            return self._graphs.run(self._run)

    def _run(self) -> Any:
        assert self._inputs is not None
        return _mapped(self._step(*self._inputs.tensors), _detached)

    def _record(self) -> _Recording:
        notes = capture.Capture(self._graphs.reserve)
        modes = _modes()
        notes.conditions.append(lambda: _modes() == modes)
        try:
            with capture.running_step(notes):
                outputs, captured = self._graphs.capture(self._run)
        except BaseException as error:
            for gradient in notes.gradients.values():
                tensor = gradient.tensor()
                if tensor is not None:
                    tensor._grad = gradient.before
            if isinstance(error, RuntimeError) and "captur" in str(error):
                raise RuntimeError(_refusal(error)) from error
            raise
        return _Recording(functools.partial(self._graphs.launch, captured), outputs, notes)


def _modes() -> tuple[Any, ...]:
    """Return what operations look at around the step."""
    chosen = dict(vars(settings.cuda)), dict(vars(settings.general))
    return is_grad_enabled(), autocast_mode.dtype, *chosen


class _Inputs:
    """Tensors on a GPU, at addresses that stay, into which each call's inputs are copied."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        self._form = _mapped(given, _kind)
        found: list[Any] = []
        _mapped(given, lambda value: found.append(_array(value)))
        places = [devices.device_of(array) for array in found]
        gpus = [place.index for place in places if place.index is not None]
        self.gpu = gpus[0] if gpus else 0
        device = devices.resolve(self.gpu)
        self._leaves = [
            Tensor(
                _empty_like(array) if place.index is not None else devices.to_device(array, device)
            )
            for array, place in zip(found, places, strict=True)
        ]
        leaves = iter(self._leaves)
        self.tensors = _mapped(given, lambda _: next(leaves))

    def take(self, given: tuple[Any, ...]) -> None:
        """Copy inputs to where the step finds them. Raises ValueError if they are unlike the first."""
        form = _mapped(given, _kind)
        if form != self._form:
            raise ValueError(
                "graph: inputs must be like those of the first call, tensors in dtype and shape and "
                f"all else in value; expected {self._form}, got {form}; "
                "make another graph for them, and pass numbers that change in tensors"
            )
        leaves = iter(self._leaves)
        _mapped(given, lambda value: _overwrite(next(leaves), _array(value)))


class _Kind(NamedTuple):
    """What has to stay as it is of an input."""

    dtype: np.dtype
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def _kind(value: Any) -> _Kind:
    if isinstance(value, Variable) and value.requires_grad:
        raise ValueError(
            "graph: inputs are copied, so that no gradient reaches them; got a tensor that requires "
            f"grad, shape={tuple(value.array.shape)} (pass input.detach())"
        )
    array = _array(value)
    return _Kind(array.dtype, tuple(array.shape))


def _array(value: Any) -> Any:
    array = value.array if isinstance(value, Variable) else value
    return np.asarray(array) if isinstance(array, np.generic) else array


def _empty_like(array: Any) -> Any:
    with devices.on_device_of(array):
        return devices.array_module(array).empty_like(array)


def _overwrite(tensor: Tensor, array: Any) -> None:
    if array is tensor.array:
        return
    with devices.on_device_of(tensor.array):
        if devices.device_of(array).index is None:
            capture.copy_from_host(tensor.array, array)
        else:
            devices.check_same_device("graph", array, tensor.array)
            tensor.array[...] = array
    tensor.written()


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested tuples, lists and dicts with function's results in place of tensors and arrays."""
    if isinstance(value, Variable) or (hasattr(value, "dtype") and hasattr(value, "shape")):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Variable) else value


class _Recording:
    """A captured run: what it launches, the tensors it writes, what is to be done for each replay."""

    def __init__(self, launch: Callable[[], None], outputs: Any, notes: capture.Capture) -> None:
        self._launch = launch
        self._outputs = outputs
        self._notes = notes
        self._gradients = [
            _Gradient(
                tensor, tensor._grad, None if known.replaced else known.before, known.replaced
            )
            for known in notes.gradients.values()
            if (tensor := known.tensor()) is not None
        ]
        notes.gradients.clear()
        written = [gradient.after for gradient in self._gradients if gradient.after is not None]
        _mapped(outputs, written.append)
        self._versions = [value.version() for value in written if isinstance(value, Variable)]

    def is_valid(self) -> bool:
        """Return whether a replay would do what running the step would."""
        return self._notes.is_valid() and all(
            gradient.replaced or gradient.tensor._grad is gradient.before
            for gradient in self._gradients
        )

    def replay(self) -> Any:
        for action in self._notes.actions:
            action()
        self._launch()
        stamp = tick()
        for version in self._versions:
            version.written(stamp, "a captured step")
        for reference in self._notes.written.values():
            version = reference()
            if version is not None:
                version.written(stamp, "a captured step")
        for gradient in self._gradients:
            gradient.tensor._grad = gradient.after
        return self._outputs


class _Gradient(NamedTuple):
    """A tensor, its `grad` after the step, and the one the step adds to unless it replaces it."""

    tensor: Variable
    after: Any
    before: Any
    replaced: bool


def _refusal(error: BaseException) -> str:
    """Say what in the step a graph cannot hold: the last line of code that is the user's own."""
    culprit = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _ENGINES:
            path = frame.f_code.co_filename
            line = linecache.getline(path, number).strip() or frame.f_code.co_name
            culprit = f"{line} ({Path(path).name}, line {number}): "
    return (
        "graph: a captured step must not wait for the GPU, nor copy to or from the CPU; got "
        f"{culprit}{error}"
    )


_ENGINES = ("contextlib", "cupy", "cupyx", "cupy_backends", "functools", "gradengine", "numpy")
