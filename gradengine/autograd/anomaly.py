"""Anomaly mode: backward stops at the first nan and names the line of forward that it belongs to.

While it is on, every node's line is noted when the node is made, and the walk looks at what each pullback
returns. While it is off none of this is there: the walk asks once, when it starts.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from gradengine import backward_walk, source_lines
from gradengine.autograd.lines import trace_lines
from gradengine.devices import array_module
from gradengine.dtypes import is_floating_point
from gradengine.tape import Node, Variable

_WHERE = "WhereBackward0"

# The `where` from which a gradient came to a node, maybe through others.
_where_before: WeakKeyDictionary[Node, Node] = WeakKeyDictionary()


class _Mode:
    """Whether the mode is on, for all threads, and what it looks for."""

    enabled = False
    check_nan = True
    check_inf = False
    lines: trace_lines | None = None


def is_anomaly_enabled() -> bool:
    """Return whether anomaly mode is on."""
    return _Mode.enabled


def is_anomaly_check_nan_enabled() -> bool:
    """Return whether anomaly mode looks for nan."""
    return _Mode.check_nan


def _switch(enabled: bool, check_nan: bool, check_inf: bool) -> None:
    _Mode.enabled, _Mode.check_nan, _Mode.check_inf = enabled, check_nan, check_inf
    if enabled and _Mode.lines is None:
        _Mode.lines = trace_lines()
        _Mode.lines.__enter__()
    elif not enabled and _Mode.lines is not None:
        _Mode.lines.__exit__()
        _Mode.lines = None
    backward_walk.pull_instead = _pull_and_check if enabled else None
    if not enabled:
        _where_before.clear()


class set_detect_anomaly:  # noqa: N801 - PyTorch's name
    """Switch anomaly mode on or off: at once when called, and back again at the end of a `with` block.

    The rest is as in `detect_anomaly`.
    """

    def __init__(self, mode: bool, check_nan: bool = True, check_inf: bool = False) -> None:
        self._previous = (_Mode.enabled, _Mode.check_nan, _Mode.check_inf)
        _switch(mode, check_nan, check_inf)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _switch(*self._previous)


class detect_anomaly:  # noqa: N801 - PyTorch's name
    """Find where gradients become nan, or with `check_inf` infinite: a context for forward and backward.

    Backward raises RuntimeError at the first such gradient, and any error in backward tells the line of
    forward that it belongs to. Slow, since every gradient is looked at; on a GPU it waits each time.
    """

    def __init__(self, check_nan: bool = True, check_inf: bool = False) -> None:
        warnings.warn(
            "Anomaly Detection has been enabled. This mode will increase the runtime and should only be "
            "enabled for debugging.",
            stacklevel=2,
        )
        self._wanted = (True, check_nan, check_inf)
        self._previous: list[tuple[bool, bool, bool]] = []

    def __enter__(self) -> None:
        self._previous.append((_Mode.enabled, _Mode.check_nan, _Mode.check_inf))
        _switch(*self._wanted)

    def __exit__(self, *_: object) -> None:
        _switch(*self._previous.pop())


# ---- what the tape calls while the mode is on ------------------------------------------------------


def _pull_and_check(
    node: Node,
    gradients: dict[Node, Any],
    heap: Any,
    needed: Any,
    create_graph: bool,
    edges: Any = None,
) -> None:
    """Do what the tape does for one node, and look at each share of the gradient."""
    checked = [
        edge and (edge[0], edge[1] and functools.partial(_checked, node, edge, i), edge[2])
        for i, edge in enumerate(node.edges if edges is None else edges)
    ]
    try:
        backward_walk.pull_shares(node, gradients, heap, needed, create_graph, checked)
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"in backward of {node.label}{_line(node)}")
        raise


def _checked(node: Node, edge: Any, position: int, grad: Any, *saved: Any) -> Any:
    parent, pullback, _ = edge
    share = pullback(grad, *saved)
    source = node if node.label == _WHERE else _where_before.get(node)
    if source is not None:
        _where_before[parent] = source
    array = share.array if isinstance(share, Variable) else share
    if not hasattr(array, "flags") or not is_floating_point(array.dtype):  # or a bundle of several
        return share
    xp = array_module(array)
    incoming = grad.array if isinstance(grad, Variable) else grad
    if _Mode.check_nan and bool(xp.isnan(array).any()):
        _refuse("nan", node, position, _where_trap(source, node, incoming, xp.isnan(array)))
    if _Mode.check_inf and bool(xp.isinf(array).any()):
        _refuse("inf", node, position, "")
    return share


def _where_trap(source: Node | None, node: Node, incoming: Any, is_nan: Any) -> str:
    """Say that 0 * inf made the nan, if the gradient of a `where` came as zeros at each of its places."""
    if source is None or source is node or getattr(incoming, "shape", None) != is_nan.shape:
        return ""
    if bool((incoming[is_nan] != 0).any()):  # nan is not 0 either
        return ""
    return (
        f"; there the incoming gradient is 0, since `where`{_line(source)} took the other branch, and 0 * "
        "inf is nan: keep the unselected argument away from the bad point too, as in "
        "where(c, f(where(c, x, 1)), other)"
    )


def _line(node: Node) -> str:
    place = source_lines.places_of_nodes.get(node)
    return f" at {source_lines.line_of(place)}" if place is not None else ""


def _refuse(what: str, node: Node, position: int, reason: str) -> NoReturn:
    line = _line(node)
    where = (
        f"its forward was{line}"
        if line
        else "its forward ran before anomaly detection was enabled, so its line is not known"
    )
    raise RuntimeError(
        f"Function '{node.label}' returned {what} values in its {position}th output; {where}{reason}"
    )
