"""The tape: nodes, and the variable that carries them. `backward_walk` turns them into gradients.

Every recorded operation leaves one `Node` on its result. A node holds one edge for each input: the input's
own node, the pullback that maps the incoming gradient to that input's, and the values this pullback named.
An input that needs no gradient has no edge, so nothing is kept and nothing is ever computed for it.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from gradengine import devices, source_lines
from gradengine.dtypes import is_floating_point
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
            if edge is not None and edge[2] and any(map(holds_memory, edge[2])):
                self.edges = [edge and (edge[0], None, ()) for edge in self.edges]
                return

    def __repr__(self) -> str:
        return f"<{self.label}>"


def holds_memory(saved: Any) -> bool:
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
