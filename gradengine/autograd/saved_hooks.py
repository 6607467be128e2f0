"""Hooks of saved tensors: what backward keeps can be packed when it is saved, and unpacked when it is used.

Only while some thread is in a block of `saved_tensors_hooks` do operations make nodes of the class here,
which pack what they are given to keep and are ordinary nodes from then on. The pullbacks of such a node
are handed to the walk with a wrapper that unpacks first. The walk knows nothing of all this.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from gradengine import devices, operation
from gradengine.backward_walk import refuse_stale
from gradengine.grad_mode import no_grad
from gradengine.tape import Edge, Node, SavedOutput, Variable


class Hooks(NamedTuple):
    """The two functions of a block."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


class _Mode(threading.local):
    """This thread's blocks, the innermost last (None where they are suspended), and why none may begin."""

    blocks: tuple[Hooks | None, ...] = ()
    refusal: str | None = None


_mode = _Mode()
_count_lock = threading.Lock()
_blocks_of_all_threads = 0


def current_hooks() -> Hooks | None:
    """Return the hooks of this thread's innermost block."""
    return _mode.blocks[-1] if _mode.blocks else None


def _enter(hooks: Hooks | None) -> None:
    global _blocks_of_all_threads
    _mode.blocks = (*_mode.blocks, hooks)
    with _count_lock:
        _blocks_of_all_threads += 1
        operation.new_node = _PackingNode


def _leave() -> None:
    global _blocks_of_all_threads
    _mode.blocks = _mode.blocks[:-1]
    with _count_lock:
        _blocks_of_all_threads -= 1
        if not _blocks_of_all_threads:
            operation.new_node = Node


class saved_tensors_hooks:  # noqa: N801 - PyTorch's name
    """Keep `pack_hook(tensor)` instead of each tensor saved in this block, and give backward what
    `unpack_hook` makes of it: a Tensor with the same values, shape and dtype.

    Of nested blocks the innermost counts, in this thread alone. `pack_hook` must not write to the tensor
    in place. Each value that a node saves is packed once, and unpacked at each backward through the node.
    A write in place to the tensor afterwards is an error, as without hooks, if what is unpacked still
    shares its memory, and harmless if it is a copy. Both functions run in the mode of what calls them:
    `pack_hook` without recording, `unpack_hook` as backward does.
    """

    def __init__(self, pack_hook: Callable[[Any], Any], unpack_hook: Callable[[Any], Any]) -> None:
        self._hooks = Hooks(pack_hook, unpack_hook)

    def __enter__(self) -> None:
        if _mode.refusal is not None:
            raise RuntimeError(_mode.refusal)
        _enter(self._hooks)

    def __exit__(self, *_: object) -> None:
        _leave()


class save_on_cpu(saved_tensors_hooks):  # noqa: N801 - PyTorch's name
    """Keep what is saved in this block in the memory of the CPU, as a copy, until backward needs it.

    On the CPU it is a copy too, so that the same writes in place are allowed. With `pin_memory` copies
    of arrays on a GPU are page-locked: faster to move, and scarce.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        def pack(tensor: Any) -> Any:
            array, device = tensor.array, devices.device_of(tensor.array)
            if device.type == "cpu":
                return device, array.copy(order="K")
            return device, devices.to_pinned(array) if pin_memory else devices.to_device(
                array, "cpu"
            )

        def unpack(packed: Any) -> Any:
            device, array = packed
            return Variable.Result(devices.to_device(array, device))

        super().__init__(pack, unpack)


@contextmanager
def disable_saved_tensors_hooks(error_message: str) -> Iterator[None]:
    """Let a block of `saved_tensors_hooks` that begins within this one raise RuntimeError(error_message).

    So does this one, if it begins within such a block.
    """
    if current_hooks() is not None:
        raise RuntimeError(error_message)
    before = _mode.refusal
    _mode.refusal = error_message
    try:
        yield
    finally:
        _mode.refusal = before


@contextmanager
def suspended() -> Iterator[None]:
    """Pack nothing that is saved in this block, unless another block of hooks begins in it."""
    if not _mode.blocks:
        yield
        return
    _enter(None)
    try:
        yield
    finally:
        _leave()


# ---- packing -------------------------------------------------------------------------------------


class Packed:
    """In the edges of a node, the place of a value that a hook has packed."""

    __slots__ = (
        *("_hooks", "_is_array", "_is_output", "_last", "_left", "_node", "_owner"),
        *("_version", "content", "dtype", "index", "shape", "uses"),
    )
    nbytes = 0  # to the walk it is memory, which is freed behind it

    def __init__(self, value: Any, hooks: Hooks, owner: Node | None, index: int) -> None:
        tensor = _tensor_of(value, owner)
        before = tensor._version
        with no_grad():
            self.content = hooks.pack(tensor)
        if tensor._version != before:
            raise RuntimeError(
                "saved_tensors_hooks: a saved tensor pack hook is modifying its input in place; it "
                "cannot be modified by in-place operations, since others hold the same memory: work "
                "on a clone()"
            )
        if self.content is tensor and tensor is not value:
            self.content = tensor.detach()  # with its node, the node would keep itself alive
        self.shape, self.dtype = tensor.array.shape, tensor.array.dtype
        self.index = index
        self.uses = 0  # by how many pullbacks of the node
        self._hooks = hooks
        self._owner = None if owner is None else weakref.ref(owner)
        self._is_output = isinstance(value, SavedOutput)
        self._node = None if self._is_output else tensor.node
        self._is_array = not isinstance(value, (Variable, SavedOutput))
        self._version = weakref.ref(tensor.version())
        self._left = 0
        self._last: tuple[Any, Any] | None = None

    def unpacked(self, recorded: bool) -> Any:
        """Return the value: an array or, if the walk is `recorded`, a Tensor at its place on the tape."""
        value = self._hooks.unpack(self.content)
        if not isinstance(value, Variable):
            raise TypeError(
                "saved_tensors_hooks: output of saved tensor unpack_hook expected to be a Tensor but "
                f"got result of type {type(value).__name__}"
            )
        if value.array.shape != self.shape or value.array.dtype != self.dtype:
            raise RuntimeError(
                "saved_tensors_hooks: unpack_hook must return a Tensor of the saved one's shape and "
                f"dtype; got shape={value.array.shape}, dtype={value.array.dtype}, "
                f"expected shape={self.shape}, dtype={self.dtype}"
            )
        owner = None if self._owner is None else self._owner()
        if owner is not None and self.is_stale(value):
            refuse_stale(owner, value.version(), value.array)
        if self._is_array or not recorded:
            return value.array
        # What a result of the node unpacks to is at the node, which does not hold itself.
        node = owner if self._is_output else self._node
        if value.node is node:
            return value
        placed = Variable.Result(value.array, node)
        placed._counter = value.version()
        return placed

    @property
    def version_of_leaf(self) -> weakref.ref[Any] | None:
        """The version record of what was saved, if that was a leaf."""
        is_leaf = not self._is_output and (self._node is None or self._node.leaf is not None)
        return self._version if is_leaf else None

    def is_stale(self, value: Any) -> bool:
        """Whether what it unpacked to has the memory of what was saved, and that was written since."""
        version = self._version()
        return version is not None and value._counter is version and version.stamp > self.index

    def value_for(self, grad: Any, recorded: bool) -> Any:
        """Return the value, unpacked once for all pullbacks of the node that get the same gradient."""
        if self.uses < 2:
            return self.unpacked(recorded)
        last = self._last
        if last is None or last[0] is not grad:
            self._last = last = grad, self.unpacked(recorded)
            self._left = self.uses
        self._left -= 1
        if self._left == 0:
            self._last = None
        return last[1]


class PackedTuple(list):
    """The place of a tuple with packed values; in contrast to one it is memory to the walk."""

    __slots__ = ("kind",)
    nbytes = 0

    def __init__(self, parts: list[Any], kind: type[tuple[Any, ...]]) -> None:
        super().__init__(parts)
        self.kind = kind

    def packed(self) -> Iterator[Packed]:
        """Yield the packed values in it, at any depth."""
        for part in self:
            if isinstance(part, Packed):
                yield part
            elif isinstance(part, PackedTuple):
                yield from part.packed()


def _tensor_of(value: Any, owner: Node | None) -> Any:
    """Return a saved value as the tensor that a hook is given."""
    if isinstance(value, Variable):
        return value
    if not isinstance(value, SavedOutput):
        return Variable.Result(value)
    tensor = Variable.Result(value.array, owner)
    tensor._counter = value
    return tensor


class Unpacking:
    """The pullback of an edge whose saved values are packed."""

    def __init__(self, pullback: Any) -> None:
        self.pullback = pullback
        # Whether it can add to the gradient so far: the walk looks for that in a pullback.
        self.__kwdefaults__ = getattr(pullback, "__kwdefaults__", None)
        self._joint = joint_of(pullback)

    def __call__(self, grad: Any, *saved: Any, **onto: Any) -> Any:
        # In one step: another thread may compute its shares, and so forget these, at any time.
        known = self._joint and self._joint.known_share(self.pullback.args[0], grad)
        if known is not None:
            return known
        recorded = isinstance(grad, Variable)
        return self.pullback(grad, *[_unpacked(x, grad, recorded) for x in saved], **onto)


def joint_of(pullback: Any) -> Any:
    """Return the joint computation that a pullback is one share of, or None."""
    owner = getattr(getattr(pullback, "func", None), "__self__", None)
    return owner if isinstance(owner, operation.Joint) else None


def _unpacked(value: Any, grad: Any, recorded: bool) -> Any:
    if isinstance(value, Packed):
        return value.value_for(grad, recorded)
    if isinstance(value, PackedTuple):
        parts = [_unpacked(x, grad, recorded) for x in value]
        return tuple(parts) if value.kind is tuple else value.kind(*parts)
    return value


class _Packer:
    """Packs what one node saves, each value once."""

    def __init__(self, hooks: Hooks, node: Node) -> None:
        self._hooks, self._node = hooks, node
        self._known: dict[int, Packed] = {}  # by id, of values that the node's edges hold meanwhile

    def packed(self, value: Any) -> Any:
        """Return what takes the place of a saved value: itself, if it is neither tensor nor array."""
        if isinstance(value, tuple):
            parts = [self.packed(x) for x in value]
            same = all(part is x for part, x in zip(parts, value, strict=True))
            return value if same else PackedTuple(parts, type(value))
        if not (isinstance(value, (Variable, SavedOutput)) or _is_array(value)):
            return value
        known = self._known.get(id(value))
        if known is None:
            known = Packed(value, self._hooks, self._node, self._node.index)
            self._known[id(value)] = known
        return known


def _is_array(value: Any) -> bool:
    return hasattr(value, "strides") and not isinstance(value, np.generic)


def packed_values(node: Node, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return values that a node is about to save, packed if this thread is in a block of hooks."""
    hooks = current_hooks()
    if hooks is None:
        return values
    packer = _Packer(hooks, node)
    return tuple([packer.packed(value) for value in values])


def packed_nest(values: Any, index: int) -> Any:
    """Return nested tuples, lists and dicts with their tensors packed, if this thread is in a block."""
    hooks = current_hooks()
    if hooks is None:
        return values
    return _mapped(
        lambda x: Packed(x, hooks, None, index) if isinstance(x, Variable) else x, values
    )


def unpacked_nest(values: Any) -> Any:
    """Undo `packed_nest`, for a call that is recorded."""
    return _mapped(lambda x: x.unpacked(True) if isinstance(x, Packed) else x, values)


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)([_mapped(function, value) for value in values])
    return function(values)


def _packed_edges(node: Node, edges: Sequence[Edge], hooks: Hooks) -> list[Edge]:
    packer = _Packer(hooks, node)
    result: list[Any] = []
    seen: set[Any] = set()  # joint computations
    for edge in edges:
        saved: Any = packer.packed(edge[2]) if edge is not None else ()
        if edge is None or saved is edge[2]:
            result.append(edge)
            continue
        joint = joint_of(edge[1])
        if joint not in seen:  # its other shares use nothing
            for value in {id(x): x for x in saved.packed()}.values():
                value.uses += 1
        if joint is not None:
            seen.add(joint)
        result.append((edge[0], Unpacking(edge[1]), tuple(saved)))
    return result


class _PackingNode(Node):
    """The node of an operation in a block of hooks, until it is given its edges."""

    __slots__ = ()

    @property
    def edges(self) -> Any:
        """The node's edges."""
        return ()

    @edges.setter
    def edges(self, edges: Sequence[Edge]) -> None:
        hooks = current_hooks()
        if not edges:  # from the constructor
            return
        packed = edges if hooks is None else _packed_edges(self, edges, hooks)
        self.__class__ = Node  # type: ignore[assignment]
        self.edges = packed  # pyright: ignore[reportIncompatibleVariableOverride]
