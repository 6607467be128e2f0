"""A trace in the form that chrome://tracing and ui.perfetto.dev show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradengine.autograd.trace import Operation, Span

CPU, GPU = 1, 2  # the rows, "threads", of the picture


def chrome_trace(operations: Sequence[Operation], modules: Iterable[Span]) -> dict[str, Any]:
    """Return operations and calls of modules as events, in microseconds since the trace began."""
    events = [_row(CPU, "CPU")]
    events += [_event(each.module, "module", each.start, each.seconds, CPU, {}) for each in modules]
    for each in operations:
        details = {
            "module": each.module,
            "line": each.line,
            "inputs": [f"{value.dtype}{list(value.shape)}" for value in each.inputs],
            "outputs": [f"{value.dtype}{list(value.shape)}" for value in each.outputs],
        }
        events.append(_event(each.name, each.phase, each.start, each.seconds, CPU, details))
    return {"traceEvents": events + _on_gpu(operations), "displayTimeUnit": "ms"}


def _on_gpu(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    """Return the GPU's row: each operation starts once it is launched and the one before has ended."""
    events: list[dict[str, Any]] = []
    free = 0.0
    for each in operations:
        if each.gpu_seconds is not None:
            start = max(free, each.start)
            free = start + each.gpu_seconds
            details = {"module": each.module, "line": each.line}
            events.append(_event(each.name, each.phase, start, each.gpu_seconds, GPU, details))
    return [_row(GPU, "GPU"), *events] if events else []


def _row(thread: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _event(
    name: str, category: str, start: float, seconds: float, thread: int, details: dict[str, Any]
) -> dict[str, Any]:
    place = {"ph": "X", "pid": 1, "tid": thread, "ts": start * 1e6, "dur": seconds * 1e6}
    return {"name": name, "cat": category, **place, "args": details}
