"""The tape: nodes, the variable that carries them, and the walk that turns them into gradients.

Every recorded operation leaves one `Node` on its result. A node holds one edge for each input: the input's
own node, the pullback that maps the incoming gradient to that input's, and the values this pullback named.
An input that needs no gradient has no edge, so nothing is kept and nothing is ever computed for it.

The walk runs pullbacks on plain arrays. With `create_graph=True` it runs the same pullbacks on Tensors, which
records them in turn: that is how one formula gives derivatives of any order.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np

from gradengine import devices, source_lines
from gradengine.autocast_mode import autocast
from gradengine.dtypes import is_bfloat16, is_floating_point
from gradengine.grad_mode import set_grad_enabled
from gradengine.kernels.cuda.capture import note_grad, note_write

# One clock orders nodes and in-place writes: a saved value is stale if written after its node was made.
tick = itertools.count(1).__next__

# None, or (parent node, pullback, saved values); a pullback of None says that the values were freed.
Edge = Any


class WriteLog:
    """How often a piece of memory was written in place, who did it last and where, and its views."""

    __slots__ = ("count", "method", "place", "room", "views")

    def __init__(self) -> None:
        self.count = 0
        self.method = ""
        self.place: source_lines.Place | None = None
        self.views: list[weakref.ref[Variable]] = []
        self.room = 8  # views are looked through for dead ones when there are more

    def add_view(self, tensor: Variable) -> None:
        """Remember a view as long as it lives."""
        self.views.append(weakref.ref(tensor))
        if len(self.views) > self.room:
            self.views = [reference for reference in self.views if reference() is not None]
            self.room = 2 * len(self.views) + 8


class Version:
    """When a piece of memory was last written in place: shared by a tensor, its views and detached copies."""

    __slots__ = ("__weakref__", "_log", "stamp")

    def __init__(self) -> None:
        self.stamp = 0  # `_log` comes with the first write or view: most memory has neither

    @property
    def log(self) -> WriteLog:
        """The writes in detail."""
        try:
            return self._log
        except AttributeError:
            self._log = log = WriteLog()
            return log

    def written(self, at: int, method: str = "", place: source_lines.Place | None = None) -> None:
        """Note a write at this time of the clock, by this method of Tensor if it was one, and where."""
        self.stamp = at
        log = self.log
        log.count += 1
        log.method = method
        log.place = place or source_lines.calling_place()
        note_write(self)


class SavedOutput(Version):
    """An operation's own result, kept without its Tensor so that no reference cycle holds the memory.

    It is the result's version record at once: one small object for each such operation, not two.
    """

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.stamp = 0
        self.array = array


class Node:
    """One recorded operation, or the leaf into which a gradient accumulates."""

    __slots__ = (
        *("__weakref__", "dtype", "edges", "grad_dtype", "hooks"),
        *("index", "label", "leaf", "shape"),
    )

    Hooks: ClassVar[Any]  # the class of what is attached to a node; `autograd` sets it

    def __init__(self, label: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.label = label
        self.shape = shape
        self.dtype = dtype
        # What its gradient may be too: of a conversion to 16 bits the dtype from before, float32.
        self.grad_dtype: Any = None
        self.edges: Sequence[Edge] = ()
        self.hooks: Any = None  # of class Hooks, once anything is attached
        self.leaf: weakref.ref[Variable] | None = None
        self.index = tick()

    def name(self) -> str:
        """Return the name that PyTorch would print, such as "SumBackward0"."""
        return self.label

    @property
    def next_functions(self) -> tuple[tuple[Node | None, int], ...]:
        """One pair (node or None, 0) for each input."""
        return tuple((edge[0] if edge is not None else None, 0) for edge in self.edges)

    @property
    def variable(self) -> Any:
        """The tensor whose `grad` an AccumulateGrad node adds to; None once that tensor is gone."""
        if self.leaf is None:
            raise AttributeError(f"variable: only an AccumulateGrad node has one; got {self.label}")
        return self.leaf()

    # -- hooks

    def attached(self) -> Any:
        """Return what is attached to this node, hooks and metadata: made when it is first asked for."""
        if self.hooks is None:
            self.hooks = Node.Hooks(self)
        return self.hooks

    @property
    def metadata(self) -> dict[Any, Any]:
        """A dict for whatever the user wants to note at this node."""
        return self.attached().metadata

    def register_hook(self, fn: Callable[..., Any]) -> RemovableHandle:
        """Call `fn(grad_inputs, grad_outputs)` each time after backward has run this node.

        Both are tuples: one place for each input of the operation (None where no gradient is wanted; none
        at all for AccumulateGrad), and one for each result. A tuple that is returned replaces
        grad_inputs; a None in it means that no gradient goes there.
        """
        return RemovableHandle(self.attached().after, fn)

    def register_prehook(self, fn: Callable[..., Any]) -> RemovableHandle:
        """Call `fn(grad_outputs)` each time before backward runs this node; a returned tuple replaces it."""
        return RemovableHandle(self.attached().before, fn)

    def split(self, grad: Any) -> tuple[Any, ...]:
        """Return an incoming gradient as one for each result: most nodes have one."""
        return (grad,)

    def join(self, grads: tuple[Any, ...]) -> Any:
        """Undo `split`; None where nothing is left."""
        return grads[0]

    def release(self) -> None:
        """Free the saved arrays. A node that saved none can be walked again, as in PyTorch."""
        for edge in self.edges:
            if edge is not None and edge[2] and any(map(_holds_memory, edge[2])):
                self.edges = [edge and (edge[0], None, ()) for edge in self.edges]
                return

    def __repr__(self) -> str:
        return f"<{self.label}>"


def _holds_memory(saved: Any) -> bool:
    """Whether a saved value is an array in some form, and not a number or a shape."""
    if isinstance(saved, tuple):
        return any(isinstance(value, Variable) for value in saved)
    return isinstance(saved, (Variable, SavedOutput)) or hasattr(saved, "nbytes")


class RemovableHandle:
    """What registering a hook returns: `remove()` takes the hook away, as does the end of a `with` block."""

    _new_key = itertools.count().__next__

    def __init__(self, hooks: dict[int, Any], hook: Any) -> None:
        self._hooks = hooks
        self._key = RemovableHandle._new_key()
        hooks[self._key] = hook

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# ---- views ---------------------------------------------------------------------------------------

# The operations that lead from a base to a view of it: (the steps before, operation, attributes).
Steps = tuple[Any, Callable[..., Any], dict[str, Any]] | None


def replayed(steps: Steps, x: Any) -> Any:
    """Return the view that the steps give of x, an array or a Tensor."""
    calls = []
    while steps is not None:
        steps, operation, attributes = steps
        calls.append((operation, attributes))
    for operation, attributes in reversed(calls):
        x = operation(x, **attributes)
    return x


class View:
    """What a tensor that shares the memory of another, its base, knows of it.

    Where a recorded operation wrote to that memory the view is out of date: it takes a new node, made by
    taking the view of the base again, when it is next asked for its own.
    """

    __slots__ = ("base", "outdated", "restriction", "steps")

    def __init__(self, base: Variable, steps: Steps, restriction: str) -> None:
        self.base = base
        self.steps = steps
        self.restriction = restriction  # why the view cannot be written on the tape, or ""
        self.outdated = False

    def check(self, written: str) -> None:
        """Raise RuntimeError for a view that cannot follow a write to its memory."""
        if self.restriction:
            raise RuntimeError(f"view: {self.restriction}; {written}")

    def renew(self, tensor: Variable) -> None:
        """Give the view the node that its base's present one leads to."""
        self.check("its base or another view of its base has been modified in place since")
        with set_grad_enabled(True):
            node = replayed(self.steps, self.base)._node
        self.outdated = False
        tensor.replace_node(None if tensor._node is _OUTDATED else tensor._node, node)


_OUTDATED: Any = Node("Outdated", (), None)  # of a view that had no node when its base got one


class Variable:
    """An array with its place on the tape. `Tensor` adds everything that is arithmetic."""

    # Only the path of every small operation reads `_node`, and asks for `node` where `_view` is set.
    # `_attached` is set only for a leaf with hooks that stops requiring a gradient.
    __slots__ = ("__weakref__", "_attached", "_counter", "_grad", "_node", "_view", "array")

    Result: ClassVar[type[Any]]  # the class of every operation's result; `tensor.py` sets it

    def __init__(self, array: Any, node: Node | None = None) -> None:
        if type(array) is not np.ndarray and isinstance(array, np.generic):
            array = np.asarray(array)  # NumPy's reductions and 0-d arithmetic give scalars
        self.array = array
        self._node = node
        self._grad: Any = None
        self._counter: Version | None = None
        self._view: View | None = None

    # -- flags

    @property
    def node(self) -> Node | None:
        """Where this tensor is on the tape: None if it is not."""
        if self._view is not None and self._view.outdated:
            self._view.renew(self)
        return self._node

    @node.setter
    def node(self, node: Node | None) -> None:
        if self._view is not None:
            self._view.outdated = False
        self._node = node

    @property
    def requires_grad(self) -> bool:
        """Whether backward computes a gradient for this tensor or passes one through it."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if not self.is_leaf:
            if not value:
                raise RuntimeError(
                    "requires_grad: you can only change requires_grad flags of leaf variables; "
                    "use tensor.detach() for a tensor that is not part of the graph"
                )
        elif not value:
            if self.node is not None and self.node.hooks is not None:
                self._attached = self.node.hooks
            self.node = None
        elif self.node is None:
            if not is_floating_point(self.array.dtype):
                raise RuntimeError(
                    "requires_grad: only Tensors of floating point dtype can require gradients; "
                    f"got dtype={self.array.dtype}"
                )
            self.node = Node("AccumulateGrad", self.array.shape, self.array.dtype)
            self.node.leaf = weakref.ref(self)
            self.node.hooks = getattr(self, "_attached", None)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Set `requires_grad` in place and return this tensor."""
        self.requires_grad = requires_grad
        return self

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operation made this tensor."""
        return self.node is None or self.node.leaf is not None

    @property
    def grad_fn(self) -> Node | None:
        """The node of the operation that made this tensor; None for a leaf."""
        return None if self.is_leaf else self.node

    # -- gradients

    @property
    def grad(self) -> Any:
        """The accumulated gradient: a tensor of this shape, dtype and device, or None."""
        if self._grad is None and not self.is_leaf and not self.retains_grad:
            warnings.warn(
                "grad: this tensor is not a leaf, so its gradient was not kept; call "
                "retain_grad() on it before backward(), or read the leaf's grad instead",
                UserWarning,
                stacklevel=2,
            )
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            if not isinstance(value, Variable):
                raise TypeError(
                    f"grad: assigned grad expected to be a Tensor or None; got {type(value).__name__}"
                )
            if value.array.shape != self.array.shape:
                raise RuntimeError(
                    "grad: attempting to assign a gradient of size that is not the tensor's; "
                    f"got grad.shape={value.array.shape}, tensor.shape={self.array.shape}"
                )
            if value.array.dtype != self.array.dtype:
                raise RuntimeError(
                    "grad: attempting to assign a gradient of dtype that is not the tensor's; "
                    f"got grad.dtype={value.array.dtype}, tensor.dtype={self.array.dtype}"
                )
            devices.check_same_device("grad", value.array, self.array)
        note_grad(self, replaced=True)
        self._grad = value

    @property
    def retains_grad(self) -> bool:
        """Whether `retain_grad()` was called on this non-leaf tensor."""
        if self.node is None or self.node.leaf is not None or self.node.hooks is None:
            return False
        return self.node.hooks.retained_by is not None

    def retain_grad(self) -> None:
        """Add this non-leaf tensor's gradient to `grad`, after its hooks; nothing to do for a leaf."""
        if self.node is None:
            raise RuntimeError(
                "retain_grad: can't retain_grad on a Tensor that has requires_grad=False"
            )
        if self.node.leaf is None:
            self.node.attached().retained_by = weakref.ref(self)

    def register_hook(self, hook: Callable[[Any], Any]) -> RemovableHandle:
        """Call `hook(grad)` when this tensor's gradient is complete; a tensor it returns takes its place.

        The hooks of one tensor run in the order of registration, before `retain_grad` looks and before
        the hooks of its node. What was registered before an operation in place goes on seeing the
        gradient of what the tensor was then.
        """
        return RemovableHandle(self._attached_to_node("register_hook").of_tensor, hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call `hook(tensor)` each time after backward has added to `grad` of this leaf.

        It may use `grad` at once and set it to None, such as an optimizer that steps within backward.
        Raises RuntimeError for a tensor that is no leaf.
        """
        hooks = self._attached_to_node("register_post_accumulate_grad_hook")
        if not self.is_leaf:
            raise RuntimeError(
                "register_post_accumulate_grad_hook: post accumulate grad hooks cannot be registered on "
                "non-leaf tensors"
            )
        return RemovableHandle(hooks.accumulated, hook)

    def _attached_to_node(self, name: str) -> Any:
        if self.node is None:
            raise RuntimeError(
                f"{name}: cannot register a hook on a tensor that doesn't require gradient"
            )
        return self.node.attached()

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Add the gradient of this tensor to `grad` of every leaf that it depends on.

        `gradient` has this tensor's shape and weighs its elements; a tensor of one element can do without.
        `retain_graph` keeps the saved values for another pass (default: as `create_graph`), `create_graph`
        records the pass itself for higher derivatives, and `inputs` (a tensor or several) confines
        accumulation to these. Raises RuntimeError where nothing requires a gradient or the graph was freed.
        """
        accumulate_gradients((self,), (gradient,), retain_graph, create_graph, inputs)

    def detach(self) -> Any:
        """Return a tensor of the same memory that is not on the tape."""
        result = Variable.Result(self.array)
        result._counter = self.version()
        return result

    # -- in-place bookkeeping

    def version(self) -> Version:
        """Return the version record of this memory, made when it is first asked for."""
        if self._counter is None:
            self._counter = Version()
        return self._counter

    @property
    def _version(self) -> int:
        """How often this memory was written in place, by whatever way to it that the engine knows."""
        return 0 if self._counter is None else self._counter.log.count

    @property
    def _base(self) -> Variable | None:
        """The tensor whose memory this one is a view of, the first of several; None if it has its own."""
        view = self._view
        # A base that was given other memory, by `.data = ...`, has left its views on their own.
        return view.base if view is not None and view.base._counter is self._counter else None

    def _is_view(self) -> bool:
        """Return whether this tensor is a view of another."""
        return self._base is not None

    def written(self, method: str = "", at: int | None = None) -> None:
        """Note that the memory was just written: values saved by earlier nodes are stale from now on.

        `method` is the Tensor's that wrote it. `at` is the index of the node that recorded the write.
        """
        self.version().written(tick() if at is None else at, method)

    def views(self) -> list[Variable]:
        """Return the living tensors that are views of this one."""
        views = (reference() for reference in self.version().log.views)
        return [view for view in views if view is not None and view._base is self]

    def set_outdated(self) -> None:
        """Let this view take a new node when it is next asked for its own, since its base has one."""
        if self._view is not None:
            self._view.outdated = True
            self._node = _OUTDATED if self._node is None else self._node

    def replace_node(self, old: Node | None, new: Node | None) -> None:
        """Put this tensor on another node of the tape; `retain_grad` goes on at the new one."""
        self.node = new
        hooks = None if old is None or old is new else old.hooks
        if hooks is None or new is None or hooks.retained_by is None:
            return
        if hooks.retained_by() is self:
            new.attached().retained_by, hooks.retained_by = hooks.retained_by, None


def note_writes(tensors: Iterable[Variable]) -> None:
    """Note that the memory of all these tensors was just written, by one call of the user's."""
    at, place = tick(), source_lines.calling_place()
    for tensor in tensors:
        tensor.version().written(at, place=place)


# ---- the walk ------------------------------------------------------------------------------------


def accumulate_gradients(
    tensors: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Any = None,
) -> None:
    """Walk back from `tensors` and add to `grad` of the leaves, or of `inputs` alone where they are given."""
    seeds = _seeds(tensors, gradients, create_graph)
    if inputs is None:
        _walk(seeds, retain_graph, create_graph, None, True)
        return
    targets = [inputs] if hasattr(inputs, "node") else list(inputs)
    if not targets:
        raise RuntimeError("backward: inputs argument to backward() cannot be empty")
    captured = _walk(seeds, retain_graph, create_graph, _nodes_of(targets, "backward"), True)
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
    captured = _walk(_seeds(outputs, gradients, create_graph), retain_graph, create_graph, targets)
    found = [captured.get(x.node) for x in inputs]
    return [g if g is None or isinstance(g, Variable) else Variable.Result(g) for g in found]


def _nodes_of(inputs: Iterable[Any], name: str) -> set[Node]:
    nodes = {x.node for x in inputs}
    if None in nodes:
        raise RuntimeError(f"{name}: one of the differentiated Tensors does not require grad")
    return nodes


def _seeds(tensors: Sequence[Any], gradients: Sequence[Any], create_graph: bool) -> dict[Node, Any]:
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

# What takes the place of `_pull` in walks that start: anomaly mode's, while that is on.
pull_instead: Callable[..., None] | None = None


def _walk(
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
    needed = None if targets is None else _leading_to(targets, gradients)
    captured: dict[Node, Any] = {}
    early = Node.Hooks.early_leaves(gradients, needed) if accumulates else None
    pull = pull_instead or _pull
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
                accumulate = _accumulate_at_leaf if hooks is None else hooks.accumulate
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


def _pull(
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
            unpacked = saved, _unpack(node, saved, create_graph)
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
            gradients[parent] = known + share if type(known) is _ndarray else _sum(known, share)


def _conformed(node: Node, share: Any, parent: Node) -> Any:
    """Return a share of another dtype in the parent's, or as it is where that takes it.

    A pullback's plain arithmetic of bfloat16 with Python numbers gives float32.
    """
    is_wide = parent.grad_dtype is not None and share.dtype == parent.grad_dtype
    is_float32 = share.dtype == np.float32 and is_bfloat16(parent.dtype)
    if share.shape != parent.shape or not (is_wide or is_float32):
        _refuse_share(node, share, parent)
    return share if is_wide and parent.hooks is None else share.astype(parent.dtype)


def _sum(x: Any, y: Any) -> Any:
    if type(x) is _ndarray or isinstance(x, Variable):
        return x + y
    return devices.in_memory_order(operator.add, x, y)


def _leading_to(targets: set[Node], roots: Iterable[Node]) -> set[Node]:
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


def _unpack(node: Node, saved: tuple[Any, ...], create_graph: bool) -> list[Any]:
    """Return what a pullback named, as arrays or as Tensors, after checking that none was written since."""
    values = []
    for value in saved:
        if isinstance(value, Variable):
            if value._counter is not None and value._counter.stamp > node.index:
                _refuse_stale(node, value._counter, value.array)
            values.append(value if create_graph else value.array)
        elif isinstance(value, SavedOutput):
            if value.stamp > node.index:
                _refuse_stale(node, value, value.array)
            values.append(Variable.Result(value.array, node) if create_graph else value.array)
        elif isinstance(value, tuple) and value and isinstance(value[0], Variable):
            values.append(tuple(_unpack(node, value, create_graph)))
        else:
            values.append(value)
    return values


def _accumulate_at_leaf(node: Node, gradients: dict[Node, Any], create_graph: bool) -> None:
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


def _refuse_stale(node: Node, version: Version, array: Any) -> NoReturn:
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
