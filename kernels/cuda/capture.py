"""Capturing a step as one CUDA graph: what Python does beside launching kernels is noted here.

A CUDA graph launches the kernels of a step again, with the addresses and numbers they had. What the
step did in Python is not done again by itself. Code that may run inside a captured step asks here:
it reads numbers that may change from the device's memory (`by_value_or_live`, `Capture.feed`),
counts in an action that is repeated (`repeated`), and says on what the capture relies (`valid_while`)
or that this run has to be an ordinary one (`postpone`). Where no step is captured, all of that costs
one look at a variable of the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradengine.kernels.layout import Array


class NotYetError(Exception):
    """A run cannot be captured, but an ordinary run makes the next one ready for it."""


class Gradient(NamedTuple):
    """A tensor whose `grad` a captured run set, and what it was before."""

    tensor: weakref.ref[Any]
    before: Any
    replaced: bool  # by something that does not depend on what was there before


class Capture:
    """What one captured run leaves to be done before each replay, and what it relies on."""

    def __init__(self, reserve: Callable[[tuple[int, ...], Any], Array]) -> None:
        self._reserve = reserve
        self.actions: list[Callable[[], Any]] = []
        self.conditions: list[Callable[[], bool]] = []
        self.written: dict[int, weakref.ref[Any]] = {}
        self.gradients: dict[int, Gradient] = {}
        self.kept: list[Any] = []

    def feed(self, read: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array of the device into which what `read` gives is copied before each replay.

        Its memory is no part of what the step allocates: what kernels from before it was allocated
        use, the replay's own kernels write after the copy.
        """
        array = self._reserve(shape, dtype)
        self.actions.append(lambda: copy_from_host(array, read()))
        return array

    def is_valid(self) -> bool:
        """Return whether all that the run relied on is as it was."""
        return all(condition() for condition in self.conditions)


class _Current(threading.local):
    capture: Capture | None = None
    in_step = False


_current = _Current()


def current() -> Capture | None:
    """Return what this thread's run is being captured into, or None."""
    return _current.capture


@contextmanager
def running_step(capture: Capture | None) -> Iterator[None]:
    """Note what a step does in `capture`, or with None let it run as it is until it is captured."""
    before = _current.capture, _current.in_step
    _current.capture, _current.in_step = capture, True
    try:
        yield
    finally:
        _current.capture, _current.in_step = before


def in_step() -> bool:
    """Return whether a step runs that is to be captured, now or later.

    What no graph can hold, such as a call of cuBLAS, is done in another way then: in both runs, so
    that they give the same numbers.
    """
    return _current.in_step


# ---- for code that runs inside steps ---------------------------------------------------------------


def repeated(action: Callable[[], Any]) -> None:
    """Run an action of Python now; in a captured step before each replay, in the order of the step."""
    if _current.capture is None:
        action()
    else:
        _current.capture.actions.append(action)


def valid_while(condition: Callable[[], bool]) -> None:
    """Let a captured step be replayed while the condition holds, and be captured anew otherwise."""
    if _current.capture is not None:
        _current.capture.conditions.append(condition)


def postpone() -> None:
    """Let this run be an ordinary one instead of a captured one, after which this need not be called."""
    if _current.capture is not None:
        raise NotYetError


def keep(array: Array) -> None:
    """Keep an array that a captured step reads, and that its owner may drop before the last replay."""
    if _current.capture is not None:
        _current.capture.kept.append(array)


def by_value_or_live(
    dtype: np.dtype, read: Callable[[], np.ndarray]
) -> tuple[np.ndarray, Array | None]:
    """Return a record of this dtype for a kernel, by value, and None, or its bytes on the device.

    In a captured step the second holds what `read` gives before each replay, and the first nothing.
    """
    if _current.capture is None:
        return read(), None
    live = _current.capture.feed(lambda: _bytes_of(read()), (dtype.itemsize,), np.uint8)
    return np.zeros((), dtype), live


def _bytes_of(record: np.ndarray) -> np.ndarray:
    return record.reshape(1).view(np.uint8)


# ---- for the tape ----------------------------------------------------------------------------------


def note_write(version: Any) -> None:
    """Note that memory with this version record was written: so it will be by each replay."""
    if _current.capture is not None:
        _current.capture.written[id(version)] = weakref.ref(version)


def note_grad(tensor: Any, replaced: bool) -> None:
    """Note that a tensor's `grad` is about to be set, or added to."""
    capture = _current.capture
    if capture is None:
        return
    known = capture.gradients.get(id(tensor))
    if known is None or known.tensor() is not tensor:  # an address may be used again
        capture.gradients[id(tensor)] = Gradient(weakref.ref(tensor), tensor._grad, replaced)


# ---- graphs ----------------------------------------------------------------------------------------


class Graphs(Protocol):
    """Runs and captures work of one device beside the current stream, in memory of its own."""

    def run(self, work: Callable[[], Any]) -> Any:
        """Run work after all that the current stream was given, and before what it is given next."""
        ...

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """Run work without letting the device do anything; return its result and what it launched."""
        ...

    def launch(self, graph: Any) -> None:
        """Let the device do, on the current stream, what was captured."""
        ...

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array in memory that no step works in."""
        ...


class CupyGraphs:
    """Graphs on a device that CuPy drives.

    Memory of a captured step is a pool's of its own, since its kernels use the same addresses at every
    replay; what the step freed meanwhile lies in the pool unused by anybody else. Runs before the
    capture use the pool and its stream too, so that the memory is there when the capture begins.
    """

    def __init__(self, device: int) -> None:
        import cupy  # pyright: ignore[reportMissingImports]

        self._cupy = cupy
        self._device = cupy.cuda.Device(device)
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._reserve = _Reserve()
        self._pool = cupy.cuda.MemoryPool(self._reserve.allocate)
        self._apart = cupy.cuda.MemoryPool()  # of what is written before each replay

    def run(self, work: Callable[[], Any]) -> Any:
        cuda = self._cupy.cuda
        with self._device:
            outside = cuda.get_current_stream()
            self._stream.wait_event(outside.record(cuda.Event(disable_timing=True)))
            try:
                with self._stream, cuda.using_allocator(self._pool.malloc):
                    return work()
            finally:
                outside.wait_event(self._stream.record(cuda.Event(disable_timing=True)))

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        with self._device, self._stream, self._cupy.cuda.using_allocator(self._pool.malloc):
            before = self._reserve.bytes - self._pool.total_bytes()
            self._stream.begin_capture()  # in the relaxed mode, in which the pool may still grow
            self._reserve.capturing = True
            try:
                result = work()
            except BaseException:
                with suppress(Exception):  # an invalid capture says so once more
                    self._stream.end_capture()
                raise
            finally:
                self._reserve.capturing = False
            graph = self._stream.end_capture()
            if self._reserve.bytes - self._pool.total_bytes() != before:
                # A limit to its size made the pool free memory that kernels captured before use
                raise MemoryError(_TOO_LITTLE_MEMORY)
            return result, graph

    def launch(self, graph: Any) -> None:
        with self._device:
            graph.launch()

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> Array:
        with self._device, self._cupy.cuda.using_allocator(self._apart.malloc):
            return self._cupy.empty(shape, dtype)


class _Reserve:
    """Where a pool of captured steps gets its memory.

    A pool that gets none frees what it holds unused, and asks again. During a capture that must not
    be: kernels captured before work there. Then an error that is not CuPy's keeps it from it.
    """

    def __init__(self) -> None:
        self.capturing = False
        self.bytes = 0  # that were ever handed out

    def allocate(self, size: int) -> Any:
        from cupy import cuda  # pyright: ignore[reportMissingImports]

        try:
            pointer = cuda.MemoryPointer(cuda.Memory(size), 0)
        except cuda.runtime.CUDARuntimeError as error:
            if not self.capturing or error.status != cuda.runtime.errorMemoryAllocation:
                raise
            raise MemoryError(_TOO_LITTLE_MEMORY) from error
        self.bytes += size
        return pointer


_TOO_LITTLE_MEMORY = "graph: there is too little memory on the device to capture the step"


def copy_from_host(array: Array, values: np.ndarray) -> None:
    """Copy NumPy's values into an array of a device, in the order of the current stream.

    The values may be changed as soon as this returns.
    """
    if type(array) is np.ndarray:
        array[...] = values
        return
    # CuPy copies contiguous memory: axes in the order of the array's memory make it so
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    array.transpose(order).set(values.transpose(order))


# How graphs are made for the device of an index; tests put a stand-in here.
make_graphs: Callable[[int], Graphs] = CupyGraphs
