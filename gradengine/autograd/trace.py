"""A run as data: each operation with shapes, checksums, times, module and line, forward and backward."""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from gradengine import devices, source_lines
from gradengine.autograd import chrome, drawing
from gradengine.autograd.watching import (
    ACCUMULATE,
    APPLY,
    MODULE_CALL,
    NEW_NODE,
    PULL,
    Handlers,
    ModulePaths,
    Watch,
)
from gradengine.kernels.cuda import capture
from gradengine.tape import Node, Variable


@dataclass
class Checksum:
    """An array in a few numbers: equal `bits` mean equal arrays, near numbers near ones."""

    bits: str  # of shape-ordered bytes
    not_finite: int  # how many elements; the others make up the rest
    sum: float
    norm: float
    projection: float  # the sum with a fixed pattern of signs, which notices a change of order


@dataclass
class Value:
    """An input or a result of an operation."""

    shape: tuple[int, ...]
    dtype: str
    source: int | None = None  # which of the trace's operations made it; None: it came from outside
    name: str = ""  # of a parameter, such as "ResNet.conv1.weight"
    checksum: Checksum | None = None


@dataclass
class Operation:
    """One operation that ran: in backward, all pullbacks of a node."""

    phase: str  # "forward" or "backward"
    name: str  # "conv2d"; in backward the node's "ConvolutionBackward0", or what its pullback calls
    module: str  # "ResNet.conv1", or "" outside of any
    line: str  # of the user's code, "train.py:31"; in backward, where the forward operation was called
    inputs: list[Value]
    outputs: list[Value]
    start: float  # in seconds since the trace began
    seconds: float  # that the CPU took; on a GPU, to launch the work
    gpu_seconds: float | None = None
    forward: int | None = None  # of a backward operation: which operation it is the backward of


@dataclass
class Span:
    """One call of a module."""

    module: str
    start: float
    seconds: float


_KEYS = ("name", "module", "line", "phase")  # what times are added up by


@dataclass
class Trace:
    """What `trace` recorded: operations in the order in which they ended, and calls of modules."""

    operations: list[Operation] = field(default_factory=list)
    modules: list[Span] = field(default_factory=list)
    result: Any = None  # of the function that was traced

    def seconds(self, by: str = "name") -> dict[str, float]:
        """Return the time by "name", "module", "line" or "phase", most first; the GPU's, where it worked."""
        if by not in _KEYS:
            raise ValueError(f"Trace.seconds: by must be one of {', '.join(_KEYS)}; got by={by!r}")
        sums: dict[str, float] = {}
        for each in self.operations:
            key = getattr(each, by)
            spent = each.seconds if each.gpu_seconds is None else each.gpu_seconds
            sums[key] = sums.get(key, 0.0) + spent
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def dot(self) -> str:
        """Return the forward operations as a graph for Graphviz, with modules as boxes."""
        return drawing.dot(self.operations)

    def svg(self) -> str:
        """Return a drawing of the forward operations from top to bottom, with modules as boxes."""
        return drawing.svg(self.operations)

    def chrome_trace(self) -> dict[str, Any]:
        """Return what chrome://tracing and ui.perfetto.dev show: modules and operations in time."""
        return chrome.chrome_trace(self.operations, self.modules)

    def save(self, path: Any) -> None:
        """Write by the file's ending: .svg, .dot, .trace.json for Chrome, or .json for `load_trace`."""
        name = str(path)
        if name.endswith(".svg"):
            text = self.svg()
        elif name.endswith(".dot"):
            text = self.dot()
        elif name.endswith(".trace.json"):
            text = json.dumps(self.chrome_trace())
        elif name.endswith(".json"):
            text = json.dumps({"operations": [asdict(each) for each in self.operations]})
        else:
            raise ValueError(
                f"save: a trace's file ends with .svg, .dot, .trace.json or .json; got path={name!r}"
            )
        Path(path).write_text(text)


def load_trace(path: Any) -> Trace:
    """Return a trace's operations as `save` wrote them to a .json file."""
    rows = json.loads(Path(path).read_text())["operations"]
    for row in rows:
        for key in ("inputs", "outputs"):
            row[key] = [_value_from(value) for value in row[key]]
    return Trace([Operation(**row) for row in rows])


def _value_from(row: dict[str, Any]) -> Value:
    checksum = None if row["checksum"] is None else Checksum(**row["checksum"])
    return Value(**row | {"shape": tuple(row["shape"]), "checksum": checksum})


def trace(
    step: Callable[..., Any] | None = None, *args: Any, checksums: bool = True, **kwargs: Any
) -> Any:
    """Run `step(*args, **kwargs)` and return the `Trace` of what it computed.

    Without a step it is a context manager that gives the trace. Operations on tensors are recorded, of
    this thread, and all of backward. Checksums wait for the GPU after each operation: switch them
    off for times there. Times leave out what recording costs, but not that Python runs slower.
    """
    recorder = Recorder(checksums)
    if step is None:
        return recorder
    with recorder as found:
        found.result = step(*args, **kwargs)
    return found


class Recorder:
    """Fills a `Trace` while its `with` block runs."""

    def __init__(self, checksums: bool) -> None:
        self._checksums = checksums
        self._trace = Trace()
        self._modules = ModulePaths()
        self._open: list[tuple[FrameType, float, list[Value], Any]] = []
        self._spans: list[float] = []
        self._made: dict[int, tuple[weakref.ref[Any], int]] = {}  # by a tensor's id
        self._nodes: weakref.WeakKeyDictionary[Node, int] = weakref.WeakKeyDictionary()
        self._depth = 0  # of nodes whose pullbacks run
        self._places: weakref.WeakKeyDictionary[Node, Any] = weakref.WeakKeyDictionary()
        self._events: list[tuple[Operation, Any, Any]] = []
        self._lost = time.perf_counter()  # the clock's zero, moved on while a handler runs
        timed = self._off_the_clock
        handlers = {
            MODULE_CALL: Handlers(timed(self._enter_module), timed(self._leave_module)),
            NEW_NODE: Handlers(left=timed(self._note_node)),
            PULL: Handlers(timed(self._enter_node), timed(self._leave_node)),
            ACCUMULATE: Handlers(timed(self._accumulate)),
            "gradengine.tensor:Tensor._write": Handlers(timed(self._write)),
        }
        handlers |= dict.fromkeys(
            APPLY, Handlers(timed(self._enter_operation), timed(self._leave_operation))
        )
        self._watch = Watch(handlers)

    def __enter__(self) -> Trace:
        self._modules.start()
        self._lost = time.perf_counter()
        self._watch.start()
        return self._trace

    def __exit__(self, *_: object) -> None:
        self._watch.stop()
        for operation, begin, end in self._events:
            end.synchronize()
            operation.gpu_seconds = begin.elapsed_time(end) / 1000

    def _off_the_clock(self, handler: Callable[..., None]) -> Callable[..., None]:
        def handle(*given: Any) -> None:
            now = time.perf_counter()
            handler(now - self._lost, *given)
            self._lost += time.perf_counter() - now

        return handle

    # -- modules

    def _enter_module(self, now: float, frame: FrameType) -> None:
        self._modules.entered(frame)
        self._spans.append(now)

    def _leave_module(self, now: float, frame: FrameType, result: Any) -> None:
        call = self._modules.left(frame)
        if call is not None and self._spans:
            start = self._spans.pop()
            self._trace.modules.append(Span(call.path, start, now - start))

    # -- forward

    def _enter_operation(self, now: float, frame: FrameType) -> None:
        given = _inputs_of(frame)
        if any(isinstance(x, Variable) for x in given):
            values = [self._value(x) for x in given if x is not None]
            self._open.append((frame, now, values, _event(given)))

    def _leave_operation(self, now: float, frame: FrameType, result: Any) -> None:
        begun = self._close(frame)
        if begun is None or not isinstance(result, Variable):
            return
        _, start, inputs, event = begun
        operation = Operation(
            "backward"
            if self._depth
            else "forward",  # a Function's, or one that is recorded in turn
            frame.f_locals["op"].name.lstrip("_"),
            self._modules.of_operation(_inputs_of(frame)),
            _line(),
            inputs,
            [self._value(result)],
            start,
            now - start,
        )
        index = self._add(operation, event)
        self._made[id(result)] = weakref.ref(result), index
        if result.node is not None:
            self._nodes[result.node] = index

    def _write(self, now: float, frame: FrameType) -> None:
        """Let a tensor that is written in place be what the operation before made."""
        written, result = frame.f_locals["self"], frame.f_locals["result"]
        source = self._source(result)
        if source is not None:
            self._made[id(written)] = weakref.ref(written), source

    # -- backward

    def _note_node(self, now: float, frame: FrameType, _: Any) -> None:
        """Note where a node was made; not only operations make them."""
        names = frame.f_back.f_locals if frame.f_back is not None else {}
        inputs = names.get("inputs") or (names.get("x"), names.get("y"))
        self._places[frame.f_locals["self"]] = self._modules.of_operation(inputs), _line()

    def _enter_node(self, now: float, frame: FrameType) -> None:
        node, gradients = frame.f_locals["node"], frame.f_locals["gradients"]
        grad = gradients[node]
        values = [self._value(grad)] if _is_array(grad) else []
        self._depth += 1
        self._open.append((frame, now, values, _event([grad])))

    def _leave_node(self, now: float, frame: FrameType, result: Any) -> None:
        begun = self._close(frame)
        if begun is None:
            return
        self._depth -= 1
        _, start, inputs, event = begun
        node, gradients = frame.f_locals["node"], frame.f_locals["gradients"]
        edges = frame.f_locals["edges"] or node.edges
        shares = [gradients.get(edge[0]) for edge in edges if edge is not None]
        outputs = [self._value(share) for share in shares if _is_array(share)]
        forward = self._nodes.get(node)
        module, line = self._places.get(node, ("", ""))
        timing = (start, now - start)
        operation = Operation("backward", node.label, module, line, inputs, outputs, *timing)
        operation.forward = forward
        self._add(operation, event)

    def _accumulate(self, now: float, frame: FrameType) -> None:
        node, gradients = frame.f_locals["node"], frame.f_locals["gradients"]
        value = self._value(gradients[node])
        value.name = self._modules.parameter(node.leaf() if node.leaf is not None else None)
        module = value.name.rpartition(".")[0]
        self._add(Operation("backward", node.label, module, "", [value], [], now, 0.0), None)

    # -- both

    def _close(self, frame: FrameType) -> Any:
        """Return what was noted when this function was entered, if it was."""
        if self._open and self._open[-1][0] is frame:
            return self._open.pop()
        return None

    def _add(self, operation: Operation, begin: Any) -> int:
        if begin is not None:
            self._events.append((operation, begin, _recorded_event()))
        self._trace.operations.append(operation)
        return len(self._trace.operations) - 1

    def _source(self, x: Any) -> int | None:
        reference, index = self._made.get(id(x), (lambda: None, None))
        return index if reference() is x else None

    def _value(self, x: Any) -> Value:
        array = x.array if isinstance(x, Variable) else x
        if not _is_array(array):  # a Python number
            return Value((), type(x).__name__, None, "", checksum_of(np.asarray(x)))
        checksum = checksum_of(array) if self._checksums and capture.current() is None else None
        shape = tuple(int(size) for size in array.shape)
        name = self._modules.parameter(x)
        return Value(shape, str(array.dtype), self._source(x), name, checksum)


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor, and not the several gradients of a Function."""
    return hasattr(value, "dtype") and hasattr(value, "nbytes")


def _inputs_of(frame: FrameType) -> tuple[Any, ...]:
    """Return the inputs of an operation whose body is entered or left."""
    names = frame.f_locals
    return names["inputs"] if "inputs" in names else (names["x"], names.get("y"))


def _line() -> str:
    place = source_lines.calling_place()
    return source_lines.line_of(place) if place is not None else ""


def _event(values: Any) -> Any:
    """Return a point in the GPU's work where one of the values lives on a GPU, else None."""
    arrays = [x.array if isinstance(x, Variable) else x for x in values]
    located = [devices.device_of(array) for array in arrays if _is_array(array)]
    on_gpu = any(device.index is not None for device in located)
    return _recorded_event() if on_gpu and capture.current() is None else None


def _recorded_event() -> Any:
    from gradengine import cuda

    event = cuda.Event(enable_timing=True)
    event.record()
    return event


def checksum_of(array: Any) -> Checksum:
    """Return an array's checksum, whatever its device and order in memory. Waits for the GPU."""
    values = np.ascontiguousarray(devices.to_device(array, devices.resolve("cpu")))
    bits = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
    wide = values.astype(np.float64).reshape(-1)
    finite = np.isfinite(wide)
    missing = int(wide.size - finite.sum())
    wide = np.where(finite, wide, 0.0) if missing else wide
    # Signs from the golden ratio's multiples: balanced, without a period that shapes could share
    places = np.arange(wide.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    signs = 1.0 - 2.0 * (places >> np.uint64(63)).astype(np.float64)
    norm = float(np.sqrt((wide * wide).sum()))
    return Checksum(bits, missing, float(wide.sum()), norm, float((wide * signs).sum()))
