"""Checkpoints: backward computes a part of the graph again instead of keeping what it saved.

The part is recorded as usual; then the saved values of its nodes are dropped, and each pullback gets
a stand-in. The first stand-in that the walk runs calls the function once more, on the same arguments
and random numbers. The graph which that records is the old one node by node, so that every stand-in
runs its twin's pullback on its twin's values. The walk itself knows nothing of all this.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gradengine.autocast_mode import autocast, autocast_mode
from gradengine.autograd import saved_hooks
from gradengine.autograd.saved_hooks import Packed
from gradengine.backward_walk import unpack
from gradengine.grad_mode import enable_grad, grad_mode
from gradengine.kernels.cuda import capture
from gradengine.ops import random
from gradengine.tape import Node, SavedOutput, Variable, holds_memory, tick

DETERMINISM_CHECKS = ("default", "none")


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    **kwargs: Any,
) -> Any:
    """Return `function(*args, **kwargs)`, keeping for backward only the arguments.

    Backward calls the function again, with the same random numbers (`preserve_rng_state`), grad mode
    and autocast; it must compute the same as before. Checkpoints nest and may be differentiated
    twice. Unlike PyTorch's, the second call leaves the running statistics of batch normalization
    alone, and an argument or parameter written in the meantime is an error. There is no reentrant kind.

    Raises, from backward, RuntimeError where the second call records other operations, or values of other
    shapes or dtypes (`determinism_check="none"` skips the latter).
    """
    if use_reentrant:
        raise ValueError(
            "checkpoint: there is only the kind that is not reentrant (use_reentrant=False); "
            f"got {use_reentrant=}"
        )
    if determinism_check not in DETERMINISM_CHECKS:
        raise ValueError(
            f"checkpoint: determinism_check must be one of {DETERMINISM_CHECKS}; "
            f"got {determinism_check=}"
        )
    if not grad_mode.enabled:
        return function(*args, **kwargs)
    again = _Again(function, args, kwargs, preserve_rng_state, determinism_check)
    outputs = again.call(args, kwargs)
    again.take_over(_nodes_behind(outputs, again.began))
    return outputs


class _Again:
    """A function with its arguments, and what its second call needs to compute the same."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        preserve_rng_state: bool,
        determinism_check: str,
    ) -> None:
        self._function = function
        self._name = getattr(function, "__name__", type(function).__name__)
        self._checks_values = determinism_check == "default"
        self._autocast = autocast_mode.dtype
        self._random: list[Any] | None = None
        if preserve_rng_state:
            state: list[Any] = [None]
            self._random = state
            capture.repeated(lambda: state.__setitem__(0, random.default.state()))
        self.began = tick()
        self._arguments = saved_hooks.packed_nest((args, kwargs), self.began)
        self.inputs = list(_tensors(self._arguments))
        self._nodes: list[tuple[Any, weakref.ref[Twin]]] = []  # the form of each, and its twin
        self._leaves: dict[int, tuple[weakref.ref[Any], int]] = {}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function; what it saves is not packed by hooks from outside, since it is dropped."""
        with saved_hooks.suspended():
            return _without_cast_cache(self._function, args, kwargs)

    def take_over(self, nodes: list[Node]) -> None:
        """Drop what the nodes saved, and let their pullbacks call for it."""
        for node in nodes:
            twin = Twin(self)
            self._nodes.append((_form(node, self._checks_values), weakref.ref(twin)))
            self._note_leaves(node)
            node.edges = [
                (edge[0], _StandIn(place, edge[1]), (twin,))
                if edge is not None and any(map(holds_memory, edge[2]))
                else edge
                for place, edge in enumerate(node.edges)
            ]

    def _note_leaves(self, node: Node) -> None:
        """Note the leaves that were saved, of which a later write is to be noticed."""
        for edge in node.edges:
            for value in edge[2] if edge is not None else ():
                if isinstance(value, Twin):  # of a checkpoint within this one
                    self._leaves.update(value.again._leaves)
                for tensor in _tensors(value):
                    if isinstance(tensor, Packed):
                        version = tensor.version_of_leaf
                    else:
                        version = weakref.ref(tensor.version()) if tensor.is_leaf else None
                    if version is not None:
                        self._leaves[id(version())] = version, node.index

    def recompute(self) -> None:
        """Call the function again, and give each old node that is still there its twin."""
        args, kwargs = self._checked_arguments()
        began = tick()
        with self._as_before():
            outputs = self.call(args, kwargs)
        nodes = _nodes_behind(outputs, began)
        for (before, reference), node in zip(self._nodes, nodes, strict=False):
            now = _form(node, self._checks_values)
            if now != before:
                self._refuse(" ".join(map(str, before)), " ".join(map(str, now)))
            twin = reference()
            if twin is not None:
                twin.node = node
        if len(nodes) != len(self._nodes):
            self._refuse(f"{len(self._nodes)} operations", f"{len(nodes)}")

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Run under the modes of the first call, and with its random numbers."""
        with ExitStack() as stack:
            stack.enter_context(enable_grad())
            stack.enter_context(_recomputing())
            if self._autocast is not None:
                stack.enter_context(autocast("cuda", dtype=self._autocast))
            if self._random is not None:
                stack.enter_context(_random_numbers_of(self._random))
            yield

    def _checked_arguments(self) -> Any:
        """Return the arguments after checking that neither they nor parameters were written since."""
        arguments = saved_hooks.unpacked_nest(self._arguments)
        written = False
        for kept, tensor in zip(self.inputs, _tensors(arguments), strict=True):
            if isinstance(kept, Packed):
                written = written or kept.is_stale(tensor)
            else:
                written = written or kept.version().stamp > self.began
        for reference, index in self._leaves.values():
            version = reference()
            written = written or (version is not None and version.stamp > index)
        if written:
            raise RuntimeError(
                f"checkpoint: an argument or a parameter of {self._name} has been modified by an "
                "inplace operation since its first call began, so that a second one would compute "
                "something else; pass a clone(), or write to it after backward"
            )
        return arguments

    def _refuse(self, before: str, now: str) -> None:
        raise RuntimeError(
            f"checkpoint: {self._name} must compute the same when backward calls it again; got "
            f"{before} the first time, {now} the second; look for what it draws, counts or keeps "
            "between its calls"
        )


class Twin:
    """The place in an old node's edges for the node that the second call makes of it.

    To the walk it is a saved value like an array, and so is freed behind it.
    """

    nbytes = 0

    def __init__(self, again: _Again) -> None:
        self.again = again
        self.node: Node | None = None

    def edge(self, place: int) -> Any:
        """Return the new node and its edge in a place."""
        if self.node is None:
            self.again.recompute()
        assert self.node is not None
        return self.node, self.node.edges[place]


class _StandIn:
    """The pullback of an old edge: its twin's, on the twin's values."""

    def __init__(self, place: int, pullback: Callable[..., Any]) -> None:
        self._place = place
        # Whether it can add to the gradient so far: the walk looks for that in a pullback
        self.__kwdefaults__ = getattr(pullback, "__kwdefaults__", None)

    def __call__(self, grad: Any, twin: Twin, **onto: Any) -> Any:
        node, (_, pullback, saved) = twin.edge(self._place)
        return pullback(grad, *unpack(node, saved, isinstance(grad, Variable)), **onto)


def _form(node: Node, with_values: bool) -> tuple[Any, ...]:
    """Return what must be the same of a node the second time."""
    edges = tuple(edge is not None for edge in node.edges)
    place = (node.label, tuple(node.shape), str(node.dtype), edges)
    if not with_values:
        return place
    saved = [tuple(_forms(edge[2])) for edge in node.edges if edge is not None]
    return *place, tuple(saved)


def _forms(saved: Any) -> Iterator[Any]:
    for value in saved:
        if isinstance(value, tuple):
            yield tuple(_forms(value))
        elif isinstance(value, (Variable, SavedOutput)):
            yield tuple(value.array.shape), str(value.array.dtype)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            yield tuple(value.shape), str(value.dtype)
        else:
            yield type(value).__name__


def _nodes_behind(outputs: Any, began: int) -> list[Node]:
    """Return the nodes that the outputs depend on and that are younger than `began`, oldest first."""
    stack = [tensor.node for tensor in _tensors(outputs)]
    found: dict[Node, None] = {}
    while stack:
        node = stack.pop()
        if node is None or node in found or node.index < began or node.leaf is not None:
            continue
        found[node] = None
        stack += [edge[0] for edge in node.edges if edge is not None]
    return sorted(found, key=lambda node: node.index)


def _tensors(values: Any) -> Iterator[Any]:
    """Yield the tensors in nested tuples, lists and dicts, packed ones as they are."""
    if isinstance(values, (Variable, Packed)):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _without_cast_cache(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function in a region of autocast of its own: each call then converts the same leaves."""
    if autocast_mode.dtype is None:
        return function(*args, **kwargs)
    with autocast("cuda", dtype=autocast_mode.dtype, cache_enabled=False):
        return function(*args, **kwargs)


@contextmanager
def _recomputing() -> Iterator[None]:
    before = grad_mode.recomputing
    grad_mode.recomputing = True
    try:
        yield
    finally:
        grad_mode.recomputing = before


@contextmanager
def _random_numbers_of(state: list[Any]) -> Iterator[None]:
    """Draw from the stream as it was, and leave it as it is; also at each replay of a captured step."""
    present: list[Any] = [None]

    def go_back() -> None:
        present[0] = random.default.state()
        random.default.restore(state[0])

    capture.repeated(go_back)
    try:
        yield
    finally:
        capture.repeated(lambda: random.default.restore(present[0]))
