"""Hooks of nodes and tensors: what users attach to a place on the tape, and how the walk meets it.

A node that nothing is attached to has no `NodeHooks`, and the walk asks for them once. On the way back a
complete gradient passes the hooks of its tensor, `retain_grad`, the node's hooks before it runs, the
node, and the node's hooks after it, in this order; each kind runs in the order of registration.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from gradengine.backward_walk import accumulate_at_leaf, accumulation, sum_of
from gradengine.tape import Node, Variable

Gradients = tuple[
    Any, ...
]  # one place for each input, or result, of a node; None where there is none


class NodeHooks:
    """What is attached to one node."""

    __slots__ = (
        *("__weakref__", "accumulated", "after", "before"),
        *("metadata", "of_tensor", "retained_by"),
    )

    def __init__(self, node: Node) -> None:
        self.of_tensor: dict[int, Callable[[Any], Any]] = {}
        self.before: dict[int, Callable[[Gradients], Any]] = {}
        self.after: dict[int, Callable[[Gradients, Gradients], Any]] = {}
        self.accumulated: dict[
            int, Callable[[Any], Any]
        ] = {}  # of a leaf whose `grad` was added to
        self.metadata: dict[Any, Any] = {}
        self.retained_by: weakref.ref[Variable] | None = None  # the tensor that keeps its gradient
        if node.leaf is not None:
            _of_leaves.add(self)

    # -- what the walk calls

    @staticmethod
    def early_leaves(roots: Iterable[Node], needed: set[Node] | None) -> EarlyLeaves | None:
        """Return the leaves with hooks that a walk from `roots` meets; None where no leaf has any."""
        return EarlyLeaves(roots, needed) if _of_leaves else None

    def on_gradient(self, node: Node, grad: Any) -> Any:
        """Run the hooks of the node's tensor, then keep the gradient where `retain_grad` asked for it."""
        if not self.of_tensor and self.retained_by is None:
            return grad
        tensor = _as_tensor(grad)
        for hook in list(self.of_tensor.values()):
            replacement = hook(tensor)
            if replacement is not None:
                _check(hook, replacement, node)
                tensor = replacement
        holder = None if self.retained_by is None else self.retained_by()
        if holder is not None:
            with accumulation:
                holder._grad = tensor if holder._grad is None else holder._grad + tensor
        return tensor if isinstance(grad, Variable) else tensor.array

    def pull(
        self,
        pull: Callable[..., None],
        node: Node,
        gradients: dict[Node, Any],
        heap: list[tuple[int, Node]],
        needed: set[Node] | None,
        create_graph: bool,
    ) -> None:
        """Do what `pull` does for a node, between the hooks before and after it."""
        if not self._run_before(node, gradients, create_graph):
            return
        if not self.after:
            pull(node, gradients, heap, needed, create_graph)
            return
        grad = gradients.pop(node)
        edges, shares = _shares(pull, node, grad, needed, create_graph)
        grads = tuple(map(_as_tensor, node.split(grad)))
        shares = tuple(map(_as_tensor, shares))
        for hook in list(self.after.values()):
            shares = _replaced(hook, hook(shares, grads), shares)
        for edge, share in zip(edges, shares, strict=True):
            if edge is None or share is None:
                continue
            parent, share = edge[0], share if create_graph else share.array
            if parent in gradients:
                gradients[parent] = sum_of(gradients[parent], share)
            else:
                gradients[parent] = share
                heapq.heappush(heap, (-parent.index, parent))

    def accumulate(self, node: Node, gradients: dict[Node, Any], create_graph: bool) -> None:
        """Add a complete gradient to its leaf's `grad`, between the hooks before and after that."""
        if not self._run_before(node, gradients, create_graph):
            return
        grads = (_as_tensor(gradients[node]),) if self.after else ()
        accumulate_at_leaf(node, gradients, create_graph)
        leaf = node.variable
        for hook in list(self.accumulated.values()) if leaf is not None else ():
            if hook(leaf) is not None:
                raise RuntimeError(
                    f"hook '{_name(hook)}': post accumulate grad hooks should return None; one may set "
                    "the grad of the tensor that it is given"
                )
        for hook in list(self.after.values()):
            _replaced(hook, hook((), grads), ())

    def _run_before(self, node: Node, gradients: dict[Node, Any], create_graph: bool) -> bool:
        """Let the hooks before a node replace what it is about to get; return whether anything is left."""
        if not self.before:
            return True
        grads = tuple(map(_as_tensor, node.split(gradients[node])))
        for hook in list(self.before.values()):
            grads = _replaced(hook, hook(grads), grads)
        if not create_graph:
            grads = tuple(None if grad is None else grad.array for grad in grads)
        gradients[node] = node.join(grads)
        if gradients[node] is None:
            del gradients[node]
            return False
        return True


# Of leaves, as long as the leaves live: without any, no walk looks for them.
_of_leaves: WeakSet[NodeHooks] = WeakSet()


class EarlyLeaves:
    """The leaves with hooks, by the last node that adds to their gradient.

    A walk comes to leaves last, since they are the oldest nodes. But a hook that uses up a gradient is to
    have it as soon as it is complete, so that no other need lie in memory at the same time.
    """

    def __init__(self, roots: Iterable[Node], needed: set[Node] | None) -> None:
        last: dict[Node, Node] = {}
        seen = set(roots)
        stack = list(seen)
        while stack:
            node = stack.pop()
            for edge in node.edges:
                if edge is None or (needed is not None and edge[0] not in needed):
                    continue
                parent = edge[0]
                if parent.hooks is not None and parent.leaf is not None:
                    if parent not in last or node.index < last[parent].index:
                        last[parent] = node
                elif parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        self._after: dict[Node, list[Node]] = {}
        for leaf, node in last.items():
            self._after.setdefault(node, []).append(leaf)

    def accumulate_after(
        self,
        node: Node,
        gradients: dict[Node, Any],
        heap: list[tuple[int, Node]],
        create_graph: bool,
    ) -> None:
        """Let the walk be done with the leaves whose gradients are complete now that `node` has run."""
        for leaf in self._after.get(node, ()):
            if leaf in gradients:
                heap.remove((-leaf.index, leaf))
                heapq.heapify(heap)
                gradients[leaf] = leaf.hooks.on_gradient(leaf, gradients[leaf])
                leaf.hooks.accumulate(leaf, gradients, create_graph)


def _shares(
    pull: Callable[..., None], node: Node, grad: Any, needed: set[Node] | None, create_graph: bool
) -> tuple[Any, Gradients]:
    """Return a node's edges, and what each would add to its parent, by sending it to a node of its own."""
    edges = node.edges
    apart = [edge and (_like(edge[0]), *edge[1:]) for edge in edges]
    wanted = None
    if needed is not None:
        pairs = zip(edges, apart, strict=True)
        wanted = {own[0] for edge, own in pairs if edge is not None and edge[0] in needed}
    gradients = {node: grad}
    pull(node, gradients, [], wanted, create_graph, apart)
    return edges, tuple([own and gradients.get(own[0]) for own in apart])


def _like(node: Node) -> Node:
    return Node(node.label, node.shape, node.dtype)


def _as_tensor(grad: Any) -> Any:
    return grad if grad is None or isinstance(grad, Variable) else Variable.Result(grad)


def _name(hook: Any) -> str:
    return getattr(hook, "__name__", repr(hook))


def _replaced(hook: Any, replacement: Any, gradients: Gradients) -> Gradients:
    """Return the gradients that a hook of a node leaves: its own tuple, or as they were."""
    if replacement is None:
        return gradients
    if not isinstance(replacement, tuple):
        raise TypeError(
            f"hook '{_name(hook)}' must return a tuple of Tensors or None; expected tuple, but hook "
            f"returned {type(replacement).__name__}"
        )
    if len(replacement) != len(gradients):
        raise RuntimeError(
            f"hook '{_name(hook)}' has returned an incorrect number of values "
            f"(got {len(replacement)}, but expected {len(gradients)})"
        )
    for value, gradient in zip(replacement, gradients, strict=True):
        if value is None:
            continue
        if gradient is None:
            raise RuntimeError(
                f"hook '{_name(hook)}': can't replace a None gradient with a non-None value; "
                f"got {type(value).__name__}"
            )
        _check(hook, value, gradient)
    return replacement


def _check(hook: Any, value: Any, expected: Any) -> None:
    """Raise unless what a hook returned is a Tensor of the expected shape and dtype."""
    if not isinstance(value, Variable):
        raise TypeError(
            f"hook '{_name(hook)}' must return a Tensor or None; got {type(value).__name__}"
        )
    for what, got, wanted in (
        ("size", value.array.shape, expected.shape),
        ("dtype", value.array.dtype, expected.dtype),
    ):
        if got != wanted:
            raise RuntimeError(
                f"hook '{_name(hook)}' has changed the {what} of value; got {got}, expected {wanted}"
            )
