"""The walk back along the tape, which turns nodes into gradients.

It runs pullbacks on plain arrays. With `create_graph=True` it runs the same pullbacks on Tensors, which
records them in turn: that is how one formula gives derivatives of any order.
"""

from __future__ import annotations

import heapq
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from gradengine import devices, source_lines
from gradengine.autocast_mode import autocast
from gradengine.dtypes import is_bfloat16
from gradengine.grad_mode import set_grad_enabled
from gradengine.kernels.cuda.capture import note_grad
from gradengine.tape import Edge, Node, SavedOutput, Variable, Version


def accumulate_gradients(
    tensors: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Any = None,
) -> None:
    """Walk back from `tensors` and add to `grad` of the leaves, or of `inputs` alone where they are given."""
    seeds = seeds_of(tensors, gradients, create_graph)
    if inputs is None:
        walk_back(seeds, retain_graph, create_graph, None, True)
        return
    targets = [inputs] if hasattr(inputs, "node") else list(inputs)
    if not targets:
        raise RuntimeError("backward: inputs argument to backward() cannot be empty")
    captured = walk_back(seeds, retain_graph, create_graph, _nodes_of(targets, "backward"), True)
    for target in targets:
        if not isinstance(target, Variable) or target.retains_grad:
            continue  # the graph's place of a tensor, which has no grad; or it was added to on the way
        if target.node in captured:
            _accumulate(target, captured.pop(target.node), create_graph)


def gradients_of(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
) -> list[Any]:
    """Return the gradient of `outputs` by each of `inputs` (None where unused); no `grad` is touched."""
    targets = _nodes_of(inputs, "grad")
    captured = walk_back(
        seeds_of(outputs, gradients, create_graph), retain_graph, create_graph, targets
    )
    found = [captured.get(x.node) for x in inputs]
    return [g if g is None or isinstance(g, Variable) else Variable.Result(g) for g in found]


def _nodes_of(inputs: Iterable[Any], name: str) -> set[Node]:
    nodes = {x.node for x in inputs}
    if None in nodes:
        raise RuntimeError(f"{name}: one of the differentiated Tensors does not require grad")
    return nodes


def seeds_of(
    tensors: Sequence[Any], gradients: Sequence[Any], create_graph: bool
) -> dict[Node, Any]:
    """Return the incoming gradient of each root node, as Tensors if the walk is to be recorded."""
    seeds: dict[Node, Any] = {}
    for position, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        if tensor.node is None:
            raise RuntimeError(
                f"backward: element {position} of tensors does not require grad and does not have a grad_fn"
            )
        array = tensor.array
        if gradient is None:
            if array.size != 1:
                raise RuntimeError(
                    "backward: grad can be implicitly created only for scalar outputs; "
                    f"got shape={array.shape}, pass gradient="
                )
            seed = devices.array_module(array).ones_like(array)
        else:
            seed = gradient.array if isinstance(gradient, Variable) else gradient
            if not hasattr(seed, "dtype"):
                raise TypeError(
                    "backward: gradient must be a Tensor, an array or None; "
                    f"got {type(seed).__name__}"
                )
            if seed.shape != array.shape:
                raise RuntimeError(
                    f"backward: Mismatch in shape: grad_output[{position}] has a shape of "
                    f"{seed.shape} and output[{position}] has a shape of {array.shape}"
                )
            devices.check_same_device("backward", seed, array)
            seed = seed.astype(array.dtype, copy=False)
        if create_graph:
            recorded = isinstance(gradient, Variable) and gradient.array is seed
            seed = gradient if recorded else Variable.Result(seed)
        seeds[tensor.node] = seeds[tensor.node] + seed if tensor.node in seeds else seed
    return seeds


class Walk:
    """A walk that is under way in this thread, from its roots, and what hooks note until it ends."""

    __slots__ = ("_outer", "needed", "notes", "roots")

    def __init__(self, roots: Iterable[Node], needed: set[Node] | None) -> None:
        self.roots = tuple(roots)
        self.needed = needed
        self.notes: dict[Any, Any] = {}

    def __enter__(self) -> None:
        self._outer = walks.innermost
        walks.innermost = self

    def __exit__(self, *_: object) -> None:
        walks.innermost = self._outer


class _Walks(threading.local):
    innermost: Walk | None = None


walks = _Walks()
_ndarray = np.ndarray

# What takes the place of `pull_shares` in walks that start: anomaly mode's, while that is on.
pull_instead: Callable[..., None] | None = None


def walk_back(
    gradients: dict[Node, Any],
    retain_graph: bool | None,
    create_graph: bool,
    targets: set[Node] | None,
    accumulates: bool = False,
) -> dict[Node, Any]:
    """Run pullbacks, newest node first. With `targets`, only what leads to them: return their gradients.

    If it `accumulates`, the gradients of leaves go to their `grad` instead.
    """
    release = not (create_graph if retain_graph is None else retain_graph)
    needed = None if targets is None else leading_to(targets, gradients)
    captured: dict[Node, Any] = {}
    early = Node.Hooks.early_leaves(gradients, needed) if accumulates else None
    pull = pull_instead or pull_shares
    heap = [(-node.index, node) for node in gradients if needed is None or node in needed]
    heapq.heapify(heap)
    # Gradients have the dtypes that forward chose, also in a backward under autocast.
    first = next(iter(gradients.values()), None)
    place = devices.on_device_of(first.array if isinstance(first, Variable) else first)
    walk, precision = Walk(gradients, needed), autocast("cuda", enabled=False)
    with walk, place, set_grad_enabled(create_graph), precision:
        while heap:
            node = heapq.heappop(heap)[1]
            hooks = node.hooks
            if hooks is not None:
                gradients[node] = hooks.on_gradient(node, gradients[node])
            if targets is not None and node in targets and (node.leaf is None or not accumulates):
                captured[node] = gradients[node]
                if not _leads_on(node, needed):
                    continue
            if node.leaf is not None:
                accumulate = accumulate_at_leaf if hooks is None else hooks.accumulate
                accumulate(node, gradients, create_graph)
                continue
            if hooks is None:
                pull(node, gradients, heap, needed, create_graph)
            else:
                hooks.pull(pull, node, gradients, heap, needed, create_graph)
            if release:
                node.release()
            if early is not None:
                early.accumulate_after(node, gradients, heap, create_graph)
    return captured


def pull_shares(
    node: Node,
    gradients: dict[Node, Any],
    heap: list[tuple[int, Node]],
    needed: set[Node] | None,
    create_graph: bool,
    edges: Sequence[Edge] | None = None,
) -> None:
    """Run a node's pullbacks on its complete gradient and add each share to the parent's.

    `edges` take the place of the node's own.
    """
    grad = gradients.pop(node)
    unpacked: tuple[Any, Any] = ((), ())  # what several edges name is unpacked once
    for edge in node.edges if edges is None else edges:
        if edge is None or (needed is not None and edge[0] not in needed):
            continue
        parent, pullback, saved = edge
        if pullback is None:
            _refuse_freed(node)
        if saved is not unpacked[0]:
            unpacked = saved, unpack(node, saved, create_graph)
        known = gradients.get(parent)
        if known is None or create_graph or getattr(pullback, "__kwdefaults__", None) is None:
            share, added = pullback(grad, *unpacked[1]) if saved else pullback(grad), False
            if share is None:  # of a Function: there is no gradient
                continue
        else:  # it takes `onto`, its one keyword, and adds in the pass that computes the share
            share, added = pullback(grad, *unpacked[1], onto=known), True
        if share.shape != parent.shape or share.dtype != parent.dtype:
            share = _conformed(node, share, parent)
        if known is None:
            gradients[parent] = share
            heapq.heappush(heap, (-parent.index, parent))
        elif added:
            gradients[parent] = share
        else:
            gradients[parent] = known + share if type(known) is _ndarray else sum_of(known, share)


def _conformed(node: Node, share: Any, parent: Node) -> Any:
    """Return a share of another dtype in the parent's, or as it is where that takes it.

    A pullback's plain arithmetic of bfloat16 with Python numbers gives float32.
    """
    is_wide = parent.grad_dtype is not None and share.dtype == parent.grad_dtype
    is_float32 = share.dtype == np.float32 and is_bfloat16(parent.dtype)
    if share.shape != parent.shape or not (is_wide or is_float32):
        _refuse_share(node, share, parent)
    return share if is_wide and parent.hooks is None else share.astype(parent.dtype)


def sum_of(x: Any, y: Any) -> Any:
    if type(x) is _ndarray or isinstance(x, Variable):
        return x + y
    return devices.in_memory_order(operator.add, x, y)


def leading_to(targets: set[Node], roots: Iterable[Node]) -> set[Node]:
    """Return the nodes on some path from `roots` to `targets`, both included."""
    seen, stack = set(roots), list(roots)
    while stack:
        for edge in stack.pop().edges:
            if edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    needed = set(targets)
    for node in sorted(seen, key=lambda node: node.index):
        if any(edge is not None and edge[0] in needed for edge in node.edges):
            needed.add(node)
    return needed


def _leads_on(node: Node, needed: set[Node] | None) -> bool:
    """Whether the walk goes on from a node that is a target itself."""
    return any(edge is not None and edge[0] in (needed or ()) for edge in node.edges)


def unpack(node: Node, saved: tuple[Any, ...], create_graph: bool) -> list[Any]:
    """Return what a pullback named, as arrays or as Tensors, after checking that none was written since."""
    values = []
    for value in saved:
        if isinstance(value, Variable):
            if value._counter is not None and value._counter.stamp > node.index:
                refuse_stale(node, value._counter, value.array)
            values.append(value if create_graph else value.array)
        elif isinstance(value, SavedOutput):
            if value.stamp > node.index:
                refuse_stale(node, value, value.array)
            values.append(Variable.Result(value.array, node) if create_graph else value.array)
        elif isinstance(value, tuple) and value and isinstance(value[0], Variable):
            values.append(tuple(unpack(node, value, create_graph)))
        else:
            values.append(value)
    return values


def accumulate_at_leaf(node: Node, gradients: dict[Node, Any], create_graph: bool) -> None:
    """Add a complete gradient to its leaf's `grad`, unless nobody holds the leaf any more."""
    leaf = node.leaf() if node.leaf is not None else None
    if leaf is not None and leaf._grad is None and not _is_sole_owner(gradients, node):
        gradients[node] = gradients[node].copy(order="K")
    grad = gradients.pop(node)
    if leaf is not None:
        _accumulate(leaf, grad, create_graph)


def _is_sole_owner(gradients: dict[Node, Any], node: Node) -> bool:
    """Whether nobody else can see a gradient's memory, so that it may become a `grad` without a copy."""
    if isinstance(gradients[node], Variable):
        return True  # recorded gradients are never written in place
    base = gradients[node].base
    if base is not None and (
        getattr(base, "size", None) != gradients[node].size  # expanded: elements share memory
        or not getattr(gradients[node].flags, "writeable", True)
        or getattr(base, "base", None) is not None
        or sys.getrefcount(base) > 3  # the view, `base`, and getrefcount's argument
    ):
        return False
    return sys.getrefcount(gradients[node]) <= 2  # the dict, and getrefcount's argument


# Held while a `grad` is added to: NumPy lets other threads run while it adds up large arrays.
accumulation = threading.RLock()


def _accumulate(tensor: Variable, grad: Any, create_graph: bool) -> None:
    """Add `grad` to `tensor.grad`: in place into the same object, except where the sum is recorded."""
    with accumulation:
        note_grad(tensor, replaced=False)
        previous = tensor._grad
        if isinstance(grad, Variable):
            tensor._grad = grad if previous is None else previous + grad
        elif previous is None:
            tensor._grad = Variable.Result(grad)
        elif previous.requires_grad or create_graph:
            tensor._grad = previous.detach() + grad
        else:
            previous.array += grad
            previous.written()


def _refuse_freed(node: Node) -> NoReturn:
    raise RuntimeError(
        f"{node.label}: Trying to backward through the graph a second time, after its saved "
        "values were freed; "
        "pass retain_graph=True to the first backward() or grad()"
    )


def _refuse_share(node: Node, share: Any, parent: Node) -> NoReturn:
    raise RuntimeError(
        f"{node.label}: a pullback must return its input's shape and dtype; got shape={tuple(share.shape)}, "
        f"dtype={share.dtype}, expected shape={parent.shape}, dtype={parent.dtype}"
    )


def refuse_stale(node: Node, version: Version, array: Any) -> NoReturn:
    log = version.log
    name, method = None, log.method
    if log.place is not None:
        name, method = source_lines.write_of(log.place, method)
    saved = source_lines.places_of_nodes.get(node)
    raise RuntimeError(
        f"{node.label}: one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: {name or 'it'} was changed in place"
        + (f" by {method}" if method else "")
        + (f" at {source_lines.line_of(log.place)}" if log.place else "")
        + f" after {_operation_of(node)} saved it"
        + (f" at {source_lines.line_of(saved)}" if saved else "")
        + f"; got a tensor of shape={array.shape}, dtype={array.dtype}, at version {log.count}"
        + ("" if saved else "; forward under ge.autograd.trace_lines() tells where")
    )


def _operation_of(node: Node) -> str:
    """Return the name of a node's operation as it is called: "batch_norm" of "BatchNormBackward0"."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", re.sub(r"Backward\d*$", "", node.label)).lower()
