"""Why a gradient is missing or zero, in one sentence.

The tape alone tells whether a parameter is connected, and where a gradient becomes zero. What was not
recorded left nothing on it: within `record_reasons` each result is noted with what it was made of, also
where it left the tape, and by which line.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from itertools import pairwise
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from gradengine import source_lines
from gradengine.autograd.watching import APPLY, MODULE_CALL, Handlers, ModulePaths, Watch
from gradengine.backward_walk import leading_to, seeds_of, walk_back
from gradengine.devices import array_module
from gradengine.grad_mode import grad_mode
from gradengine.tape import Node, Variable

CONVERSIONS = ("item", "tolist", "numpy", "__array__", "__bool__", "__dlpack__")


class Origin(NamedTuple):
    """How a tensor was made: by what, where, of which others, and whether it is on the tape."""

    name: str
    line: str
    parents: tuple[Origin, ...]
    connected: bool
    lost: str  # why it is not on the tape although something it was made of is, or ""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Latest(threading.local):
    reasons: Reasons | None = None


_latest = _Latest()


def record_reasons() -> Reasons:
    """Note in a `with` block what each tensor was made of and why it left the tape, for `explain`."""
    return Reasons()


class Reasons:
    """What `record_reasons` notes."""

    def __init__(self) -> None:
        self.modules = ModulePaths()
        self.origins: list[Origin] = []
        self.conversions: list[tuple[Origin, str, str]] = []  # of what, how, where
        self._of_tensors: dict[int, tuple[weakref.ref[Any], Origin]] = {}
        self._of_nodes: weakref.WeakKeyDictionary[Node, Origin] = weakref.WeakKeyDictionary()
        self._frozen: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._switches: list[str] = []  # the lines of the grad modes that are on, inner ones last
        self._given: list[tuple[FrameType, list[tuple[Origin, bool]]]] = []
        operations = Handlers(self._enter_operation, self._leave_operation)
        tape, tensor, mode = "gradengine.tape:", "gradengine.tensor:", "gradengine.grad_mode:"
        handlers = {
            MODULE_CALL: Handlers(
                self.modules.entered, lambda frame, _: (self.modules.left(frame), None)[1]
            ),
            f"{tape}Variable.detach": Handlers(left=self._detach),
            f"{tape}Variable.requires_grad": Handlers(entered=self._set_requires_grad),
            f"{tensor}Tensor._write": Handlers(left=self._write),
            f"{tensor}Tensor.__setitem__": Handlers(left=self._write),
            f"{tensor}Parameter.__init__": Handlers(left=self._copy),
            "gradengine.factories:tensor": Handlers(left=self._copy),
            f"{mode}_ModeSwitch.__enter__": Handlers(entered=self._switch),
            f"{mode}set_grad_enabled.__init__": Handlers(entered=self._switch_for_good),
            f"{mode}_ModeSwitch.__exit__": Handlers(left=self._switch_back),
        }
        handlers |= {f"{tensor}Tensor.{name}": Handlers(self._convert) for name in CONVERSIONS}
        self._watch = Watch(handlers | dict.fromkeys(APPLY, operations))

    def __enter__(self) -> Reasons:
        _latest.reasons = self
        self.modules.start()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    # -- what is asked

    def of(self, tensor: Any) -> Origin | None:
        """Return how a tensor was made, as far as that was recorded."""
        reference, origin = self._of_tensors.get(id(tensor), (None, None))
        return origin if reference is not None and reference() is tensor else None

    def line_of(self, node: Node) -> str:
        """Return the line that made a node, or ""."""
        origin = self._of_nodes.get(node)
        return origin.line if origin is not None else ""

    def frozen_at(self, tensor: Any) -> str:
        """Return the line that set a tensor's `requires_grad` to False, or ""."""
        reference, line = self._frozen.get(id(tensor), (None, ""))
        return line if reference is not None and reference() is tensor else ""

    # -- what is noted

    def _note(
        self, tensor: Any, name: str, line: str, parents: Iterable[Origin], lost: str = ""
    ) -> None:
        origin = Origin(name, line, tuple(parents), tensor.node is not None, lost)
        self.origins.append(origin)
        self._of_tensors[id(tensor)] = weakref.ref(tensor), origin
        if tensor.node is not None and tensor.node.leaf is None:
            self._of_nodes[tensor.node] = origin

    def _origin(self, tensor: Any) -> Origin:
        known = self.of(tensor)
        if known is None:
            self._note(tensor, "", "", ())
            known = self.of(tensor)
        assert known is not None
        return known

    def _enter_operation(self, frame: FrameType) -> None:
        names = frame.f_locals
        given = names["inputs"] if "inputs" in names else (names["x"], names.get("y"))
        tensors = [x for x in given if isinstance(x, Variable)]
        if tensors:
            found = [(self._origin(x), x.node is not None) for x in tensors]
            self._given.append((frame, found))

    def _leave_operation(self, frame: FrameType, result: Any) -> None:
        if not self._given or self._given[-1][0] is not frame:
            return
        _, given = self._given.pop()
        if not isinstance(result, Variable):
            return
        operation = frame.f_locals["op"]
        lost = ""
        if result.node is None and any(wanted for _, wanted in given):
            if not grad_mode.enabled:
                line = self._switches[-1] if self._switches else ""
                since = f"entered at {line}" if line else "entered before the recording"
                lost = f"it ran with gradients switched off (no_grad, {since})"
            else:
                lost = "it has no derivative"
        name = operation.name.strip("_")
        self._note(result, name, _line(), [origin for origin, _ in given], lost)

    def _detach(self, frame: FrameType, result: Any) -> None:
        caller = frame.f_back.f_code.co_name if frame.f_back is not None else ""
        name = ".data" if caller == "data" else "detach()"
        if caller == "to_dtype" and frame.f_back is not None:
            name = f"the conversion to {frame.f_back.f_locals['dtype']}"
        source = frame.f_locals["self"]
        if isinstance(result, Variable):
            lost = "it takes its result off the tape" if source.node is not None else ""
            self._note(result, name, _line(), [self._origin(source)], lost)

    def _copy(self, frame: FrameType, result: Any) -> None:
        names = frame.f_locals
        made, data = names.get("self", result), names.get("data")
        sources = data if isinstance(data, (list, tuple)) else [data]
        tensors = [x for x in sources if isinstance(x, Variable)]
        if tensors and isinstance(made, Variable):
            lost = "" if all(x.node is None for x in tensors) else "it makes a new leaf"
            name = "Parameter()" if "self" in names else "tensor()"
            self._note(made, name, _line(), map(self._origin, tensors), lost)

    def _write(self, frame: FrameType, _: Any) -> None:
        names = frame.f_locals
        written, value = names["self"], names.get("result", names.get("value"))
        sources = [self._origin(written)]
        if isinstance(value, Variable):
            sources.insert(0, self._origin(value))
        lost = ""
        if written.node is None and any(origin.connected for origin in sources):
            line = self._switches[-1] if self._switches else ""
            lost = "it ran with gradients switched off" + (f" (no_grad, at {line})" if line else "")
        self._note(written, "the write in place", _line(), sources, lost)

    def _convert(self, frame: FrameType) -> None:
        tensor = frame.f_locals["self"]
        self.conversions.append((self._origin(tensor), frame.f_code.co_name, _line()))

    def _set_requires_grad(self, frame: FrameType) -> None:
        if frame.f_locals.get("value") is False:
            tensor = frame.f_locals["self"]
            self._frozen[id(tensor)] = weakref.ref(tensor), _line()

    def _switch(self, frame: FrameType) -> None:
        self._switches.append(_line())

    def _switch_for_good(self, frame: FrameType) -> None:
        self._switches[-1:] = [_line()]

    def _switch_back(self, frame: FrameType, _: Any) -> None:
        if self._switches:
            self._switches.pop()


def _line() -> str:
    place = source_lines.calling_place()
    return source_lines.line_of(place) if place is not None else ""


# ---- the sentence --------------------------------------------------------------------------------


def explain(target: Any, parameter: Any) -> str:
    """Say in a sentence why the gradient of `target` by `parameter` is missing or zero, or that it is there.

    `target` is a tensor, such as the loss, or a function that computes it, which is run within
    `record_reasons`. For a tensor, lines are known if it was computed in such a block. Where the
    two are connected, a backward pass runs: no `grad` changes, but hooks are called.
    """
    if not isinstance(target, Variable):
        with record_reasons():
            target = target()
    reasons = _latest.reasons or Reasons()
    name = reasons.modules.parameter(parameter) or f"the tensor of shape {tuple(parameter.shape)}"
    if not parameter.requires_grad:
        line = reasons.frozen_at(parameter)
        if reasons.of(parameter) is not None and reasons.of(parameter).parents:  # type: ignore[union-attr]
            return f"{name} is not on the tape: {_of_result(reasons, parameter)}"
        since = f" since {line}" if line else ""
        return (
            f"{name} is frozen: its requires_grad is False{since}; requires_grad_() or the "
            "module's unfreeze() lets it have a gradient"
        )
    nodes = _nodes_of(target, parameter)
    if nodes:
        return _of_connected(target, parameter, name, nodes, reasons)
    return _of_unconnected(target, parameter, name, reasons)


def _of_result(reasons: Reasons, tensor: Any) -> str:
    origin = reasons.of(tensor)
    assert origin is not None
    while not origin.lost and origin.parents:
        origin = origin.parents[0]
    return f"{origin.name} at {origin.line}: {origin.lost or 'nothing it is made of requires grad'}"


def _nodes_of(target: Any, parameter: Any) -> set[Node]:
    """Return the nodes on the way from target to parameter; none if there is no way."""
    if target.node is None:
        return set()
    leaves = {parameter.node}  # and one from before requires_grad was switched off and on
    seen, stack = {target.node}, [target.node]
    while stack:
        node = stack.pop()
        if node.leaf is not None and node.leaf() is parameter:
            leaves.add(node)
        for edge in node.edges:
            if edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return leading_to(leaves & seen, [target.node]) if leaves & seen else set()


def _of_connected(
    target: Any, parameter: Any, name: str, nodes: set[Node], reasons: Reasons
) -> str:
    freed = any(edge is not None and edge[1] is None for node in nodes for edge in node.edges)
    if freed:
        return (
            f"{name} is connected, by {len(nodes)} nodes, but a backward has freed what they saved: "
            "compute the loss again and ask before backward, or with retain_graph=True"
        )
    seed = array_module(target.array).ones_like(target.array)
    grads = walk_back(seeds_of((target,), (seed,), False), True, False, nodes)
    size = max(
        (_largest(grads[n]) for n in nodes if _ends_at(n, parameter) and n in grads), default=0.0
    )
    if size:
        missing = parameter.grad is None if parameter.is_leaf else False
        hint = (
            "; its grad is None, since backward() was not called, or zero_grad() came after it"
            if missing
            else ""
        )
        return (
            f"the gradient of {name} is there, up to {size:.3g} large: {len(nodes) - 1} "
            f"operations connect it{hint}"
        )
    for node in sorted(nodes, key=lambda node: -node.index):
        alive = node in grads and _largest(grads[node]) > 0
        parents = {edge[0] for edge in node.edges if edge is not None and edge[0] in nodes}
        if alive and any(not _largest(grads[parent]) for parent in parents if parent in grads):
            return (
                f"the gradient of {name} is zero: {_place(node, reasons)} gets one and passes on "
                f"zeros{_cause(node)}"
            )
    return f"the gradient of {name} is zero: that of the result is zero already"


def _ends_at(node: Node, parameter: Any) -> bool:
    return node is parameter.node or (node.leaf is not None and node.leaf() is parameter)


def _largest(grad: Any) -> float:
    """Return the largest magnitude in a gradient; inf for nan and for what is no array."""
    if not hasattr(grad, "dtype"):
        return np.inf
    if grad.size == 0:
        return 0.0
    largest = float(abs(grad).max())
    return np.inf if np.isnan(largest) else largest


_CAUSES = {
    "Relu": ", as no element of its input that matters is above 0",
    "Where": ", as its condition chooses the other branch",
    "MaskedFill": ", as its mask covers all that matters",
    "Clamp": ", as all elements that matter lie outside its bounds",
    "Mul": ", as it multiplies by 0",
    "Sign": ", as its derivative is 0 everywhere",
    "Floor": ", as its derivative is 0 everywhere",
    "Ceil": ", as its derivative is 0 everywhere",
    "Round": ", as its derivative is 0 everywhere",
    "Sigmoid": ", as it is saturated",
    "Tanh": ", as it is saturated",
}


def _cause(node: Node) -> str:
    name = node.label.partition("Backward")[0]
    return _CAUSES.get(name, ", as its derivative is 0 where it matters")


def _place(node: Node, reasons: Reasons) -> str:
    place = source_lines.places_of_nodes.get(node)
    line = source_lines.line_of(place) if place is not None else reasons.line_of(node)
    return f"{node.label} at {line}" if line else node.label


def _of_unconnected(target: Any, parameter: Any, name: str, reasons: Reasons) -> str:
    origin, start = reasons.of(target), reasons.of(parameter)
    if origin is not None and start is not None:
        path = _path(start, origin)
        for before, after in pairwise(path):
            if after.lost:
                return (
                    f"{name} gets no gradient, as {_named(after)} cuts the path: {after.lost}; "
                    f"{_last(before, start)}"
                )
    heirs = _heirs(start, reasons) if start is not None else set()
    for converted, how, line in reasons.conversions:
        if converted in heirs:
            return (
                f"{name} gets no gradient, as {how}() at {line} makes plain numbers of what depends on "
                f"it, and the result is not connected otherwise; {_last(converted, start)}"
            )
    if start is not None:
        used = [each for each in reasons.origins if each in heirs and each is not start]
        tail = _last(used[-1], start) if used else "no operation used it while that was recorded"
        return (
            f"{name} gets no gradient, as the result does not depend on it (a dead branch); {tail}"
        )
    return _by_the_tape(target, parameter, name, origin is not None)


def _by_the_tape(target: Any, parameter: Any, name: str, recorded: bool) -> str:
    """Say what the tape alone tells of a parameter that no recorded operation had to do with."""
    advice = "explain(function, ...), or record_reasons() around forward, tells at which line"
    if target.node is None:
        return (
            f"{name} gets no gradient, as the result is not on the tape at all: it was made under no_grad, "
            f"by detach(), by an operation without a derivative, or of frozen tensors alone; {advice}"
        )
    leaves, constants = _ends(target.node)
    if any(_is_copy(leaf.leaf(), parameter) for leaf in leaves if leaf.leaf is not None):
        return (
            f"{name} gets no gradient, as the result depends on another leaf of its shape and values "
            "in its place: perhaps a copy, of deepcopy() or Parameter(), is what was used"
        )
    if recorded:
        return (
            f"{name} gets no gradient, as the result does not depend on it; no operation used it while "
            "that was recorded"
        )
    cut = f"; constants enter at {', '.join(constants)}" if constants else ""
    return (
        f"{name} gets no gradient, as the result, a {target.node.label}, depends on other leaves "
        f"({len(leaves)}), but not on it{cut}; {advice}"
    )


def _is_copy(leaf: Any, parameter: Any) -> bool:
    return (
        leaf is not None
        and (leaf.shape, leaf.dtype, leaf.device)
        == (parameter.shape, parameter.dtype, parameter.device)
        and bool((leaf.array == parameter.array).all())
    )


def _ends(root: Node) -> tuple[list[Node], list[str]]:
    """Return the leaves' nodes below a node, and the oldest operations that took a constant."""
    seen, stack = {root}, [root]
    constants: list[Node] = []
    while stack:
        node = stack.pop()
        if any(edge is None for edge in node.edges):
            constants.append(node)
        new = {edge[0] for edge in node.edges if edge is not None} - seen
        seen |= new
        stack += new
    leaves = [node for node in seen if node.leaf is not None]
    constants.sort(key=lambda node: node.index)
    return leaves, [node.label for node in constants[:3]]


def _path(start: Origin, end: Origin) -> list[Origin]:
    """Return a shortest chain of origins from start to end, or none."""
    came: dict[Origin, Origin | None] = {end: None}
    queue = [end]
    for origin in queue:
        if origin is start:
            break
        for parent in origin.parents:
            if parent not in came:
                came[parent] = origin
                queue.append(parent)
    path, step = [], start if start in came else None
    while step is not None:
        path.append(step)
        step = came[step]
    return path


def _heirs(start: Origin, reasons: Reasons) -> set[Origin]:
    """Return all that was made of start; origins are in the order of their making."""
    heirs = {start}
    for origin in reasons.origins:
        if any(parent in heirs for parent in origin.parents):
            heirs.add(origin)
    return heirs


def _named(origin: Origin) -> str:
    return f"{origin.name} at {origin.line}" if origin.line else origin.name


def _last(origin: Origin, start: Origin | None) -> str:
    while not origin.connected and origin is not start and origin.parents:
        origin = origin.parents[0]
    if origin is start or not origin.name:
        return "no operation on it was recorded before"
    return f"the last connected operation is {_named(origin)}"
