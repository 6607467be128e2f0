"""The graph from outside: what engine and users tell each other about nodes, saved values and memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gradengine.autograd.saved_hooks import (
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)
from gradengine.backward_walk import Walk, walks
from gradengine.devices import array_module
from gradengine.tape import Node, RemovableHandle, Variable

__all__ = [
    "GradientEdge",
    "Node",
    "disable_saved_tensors_hooks",
    "get_gradient_edge",
    "increment_version",
    "register_multi_grad_hook",
    "save_on_cpu",
    "saved_tensors_hooks",
]


def increment_version(tensor: Variable | Iterable[Variable]) -> None:
    """Say that the memory of a tensor, or of several, was changed without gradengine's knowledge.

    For kernels and NumPy code that write to `tensor.array`: values that were saved before are refused in
    backward from now on, as after an in-place operation. Raises TypeError for what is no Tensor.
    """
    tensors: Any = (tensor,) if isinstance(tensor, Variable) else tuple(tensor)
    for x in tensors:
        if not isinstance(x, Variable):
            raise TypeError(f"increment_version: expected Tensors; got {type(x).__name__}")
    for x in tensors:
        x.written("increment_version")


class GradientEdge(NamedTuple):
    """A tensor's place in the graph: among inputs and outputs of backward it stands for the tensor.

    `autograd.grad` and `backward` take it where they need no value of the tensor, which so need not be
    kept. As an output it needs a gradient; among `inputs` of `backward` only a leaf's has an effect; and
    `materialize_grads` does not go with it.
    """

    node: Node
    output_nr: int

    def as_output(self, gradient: Any) -> Any:
        """Return a tensor that can stand where backward begins, given its gradient: without values."""
        array = gradient.array if isinstance(gradient, Variable) else gradient
        if not hasattr(array, "dtype"):
            raise RuntimeError(
                "backward: the gradient of a GradientEdge cannot be implicitly created; it must be a "
                f"Tensor or an array, got {type(gradient).__name__}"
            )
        xp = array_module(array)
        values = xp.broadcast_to(xp.zeros((), self.node.dtype), self.node.shape)
        return Variable.Result(values, self.node)


def get_gradient_edge(tensor: Variable) -> GradientEdge:
    """Return where a tensor's gradient arrives: its grad_fn, or a leaf's AccumulateGrad node.

    Raises RuntimeError for a tensor that does not require gradients.
    """
    if tensor.node is None:
        raise RuntimeError(
            "get_gradient_edge: it is not possible to get the gradient edge for a Tensor that does not "
            "require gradients"
        )
    return GradientEdge(tensor.node, 0)


class MultiHandle(tuple[RemovableHandle, ...]):
    """The handles of one hook on several tensors."""

    __slots__ = ()

    def remove(self) -> None:
        """Take the hook away from all of them."""
        for handle in self:
            handle.remove()

    def __enter__(self) -> MultiHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_multi_grad_hook(
    tensors: Sequence[Variable], fn: Callable[[Any], Any], *, mode: str = "all"
) -> MultiHandle:
    """Call `fn` once in each backward that computes gradients of these tensors.

    With mode "all" it is `fn(grads)`, when the last of their gradients is there: one for each tensor, None
    for those that this backward does not come to. With mode "any" it is `fn(grad)` with the first
    one. What `fn` returns is ignored. Raises ValueError for another mode, and RuntimeError in mode "all"
    for a tensor that requires no gradient, which "any" passes over.
    """
    if mode == "all":
        together = _Together(tensors, fn)
        return MultiHandle(x.register_hook(together.hook(place)) for place, x in enumerate(tensors))
    if mode != "any":
        raise ValueError(
            f'register_multi_grad_hook: mode must be one of "all", "any"; got {mode!r}'
        )
    first = _First(fn)
    return MultiHandle(x.register_hook(first) for x in tensors if x.requires_grad)


class _Together:
    """Gathers the gradients of several tensors in one walk."""

    def __init__(self, tensors: Sequence[Variable], fn: Callable[[list[Any]], Any]) -> None:
        # The nodes hold the hooks, and so this.
        self._nodes = [weakref.ref(x.node) if x.node is not None else None for x in tensors]
        self._fn = fn

    def hook(self, place: int) -> Callable[[Any], None]:
        """Return the hook of the tensor in this place."""

        def gather(grad: Any) -> None:
            walk = _innermost_walk()
            known = walk.notes.get(self)
            if known is None:
                reached = _reached(walk)
                left = sum(node is not None and node() in reached for node in self._nodes)
                known = walk.notes[self] = [left, [None] * len(self._nodes)]
            known[0] -= 1
            known[1][place] = grad
            if known[0] == 0:
                del walk.notes[self]
                self._fn(known[1])

        return gather


class _First:
    """Passes the first gradient of each walk on."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self._fn = fn

    def __call__(self, grad: Any) -> None:
        notes = _innermost_walk().notes
        if self not in notes:
            notes[self] = True
            self._fn(grad)


def _innermost_walk() -> Walk:
    walk = walks.innermost
    assert walk is not None, "hooks run in walks"
    return walk


def _reached(walk: Walk) -> set[Node]:
    """Return the nodes that a walk comes to."""
    if walk.needed is not None:
        return walk.needed
    reached = walk.notes.get(_reached)
    if reached is None:
        reached = walk.notes[_reached] = set(walk.roots)
        stack = list(walk.roots)
        while stack:
            for edge in stack.pop().edges:
                if edge is not None and edge[0] not in reached:
                    reached.add(edge[0])
                    stack.append(edge[0])
    return reached
