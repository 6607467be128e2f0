"""A ledger of the memory that backward keeps: which operation, line and module saved what."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from gradengine import source_lines
from gradengine.autograd.checkpoint import Twin
from gradengine.autograd.saved_hooks import Packed, Unpacking
from gradengine.autograd.watching import (
    MODULE_CALL,
    NEW_NODE,
    WALK,
    Handlers,
    ModulePaths,
    Watch,
)
from gradengine.tape import Node, SavedOutput, Variable, tick


class Saved(NamedTuple):
    """One piece of memory that backward keeps, and the first operation that saved it."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str  # the name of its node, such as "ConvolutionBackward0"
    line: str  # of the user's code, such as "train.py:31"
    module: str  # such as "ResNet.layer1.0.conv1", or "" outside of any


class Checkpointed(NamedTuple):
    """What backward would not keep if a module were called through a checkpoint."""

    module: str
    bytes: int  # saved, less what the checkpoint would keep instead
    share: float  # of all that is kept


class _Origin(NamedTuple):
    line: str
    module: str


class _Call(NamedTuple):
    """A call of a module: which nodes are younger and older, and the memory of what it was given."""

    module: str
    began: int
    ended: int
    inputs: tuple[tuple[int, int, Any], ...]  # storage, bytes, weak reference to the version record


def memory() -> Ledger:
    """Keep the books, in a `with` block, of what backward keeps for what is recorded there.

    The account, `saved`, is taken at the end of the block, or at the beginning of a backward within it
    where that is more. Memory counts once, whoever shares it; parameters do not count.
    `total` is its sum in bytes, `by("module")` sums, `table("line")` a text, and `checkpoints()` what
    checkpoints would save.
    """
    return Ledger()


class Ledger:
    """What `memory` returns."""

    def __init__(self) -> None:
        self.saved: list[Saved] = []
        self._origins: weakref.WeakKeyDictionary[Node, _Origin] = weakref.WeakKeyDictionary()
        self._modules = ModulePaths()
        self._open: list[tuple[int, tuple[tuple[int, int, Any], ...]]] = []
        self._calls: list[_Call] = []
        self._keepers: dict[int, tuple[int, list[int]]] = {}  # storage: bytes, indices of nodes
        self._watch = Watch(
            {
                NEW_NODE: Handlers(left=self._note_node),
                MODULE_CALL: Handlers(self._enter_module, self._leave_module),
                WALK: Handlers(entered=lambda frame: self._take_account()),
            }
        )

    def __enter__(self) -> Ledger:
        self._modules.start()
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.stop()
        self._take_account()

    # -- what is noticed

    def _note_node(self, frame: FrameType, result: Any) -> None:
        node = frame.f_locals["self"]
        place = source_lines.calling_place()
        line = source_lines.line_of(place) if place is not None else ""
        caller = frame.f_back.f_locals if frame.f_back is not None else {}
        inputs = caller.get("inputs") or (caller.get("x"), caller.get("y"))
        self._origins[node] = _Origin(line, self._modules.of_operation(inputs))

    def _enter_module(self, frame: FrameType) -> None:
        self._modules.entered(frame)
        given = _memory_in((frame.f_locals["args"], frame.f_locals["kwargs"]))
        inputs = tuple(
            (id(_owner(array)), _bytes(array), weakref.ref(holder.version()))
            for array, holder in given
            if isinstance(holder, Variable)
        )
        self._open.append((tick(), inputs))

    def _leave_module(self, frame: FrameType, result: Any) -> None:
        call = self._modules.left(frame)
        if call is not None and self._open:
            began, inputs = self._open.pop()
            self._calls.append(_Call(call.path, began, tick(), inputs))

    # -- the account

    def _take_account(self) -> None:
        found: dict[int, Saved] = {}
        keepers: dict[int, tuple[int, list[int]]] = {}
        held = []  # so that no two pieces of memory have one id
        for node in sorted(self._origins.keys(), key=lambda node: node.index):
            origin = self._origins[node]
            for array, holder in _memory_in([edge[1:] for edge in node.edges if edge is not None]):
                if isinstance(holder, Variable) and holder.is_leaf and holder.requires_grad:
                    continue
                held.append(owner := _owner(array))
                size = _bytes(array)
                keepers.setdefault(id(owner), (size, []))[1].append(node.index)
                form = tuple(array.shape), str(array.dtype)
                found.setdefault(id(owner), Saved(size, *form, node.label, *origin))
        total = sum(saved.bytes for saved in found.values())
        if total >= self.total:
            self.saved = sorted(found.values(), key=lambda saved: -saved.bytes)
            self._keepers = keepers

    @property
    def total(self) -> int:
        """The bytes that backward keeps."""
        return sum(saved.bytes for saved in self.saved)

    def by(self, what: str) -> dict[str, int]:
        """Return the bytes by "module", "line" or "operation", the most first."""
        if what not in ("module", "line", "operation"):
            raise ValueError(f'memory: by must be "module", "line" or "operation"; got {what!r}')
        sums: dict[str, int] = {}
        for saved in self.saved:
            key = getattr(saved, what)
            sums[key] = sums.get(key, 0) + saved.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def checkpoints(self) -> list[Checkpointed]:
        """Return what a checkpoint around each module called would save, the most first.

        That is what its operations alone keep, less the inputs that a checkpoint keeps instead. Backward
        computes it anew, one module at a time.
        """
        sums: dict[str, int] = {}
        for call in self._calls:
            known = {storage for storage, _, version in call.inputs if version() is not None}
            spared = -sum(
                size
                for storage, size, version in call.inputs
                if storage not in self._keepers or version() is None
            )
            for storage, (size, indices) in self._keepers.items():
                inside = all(call.began < index < call.ended for index in indices)
                if inside and storage not in known:
                    spared += size
            sums[call.module] = sums.get(call.module, 0) + spared
        total = self.total or 1
        rows = (Checkpointed(name, size, size / total) for name, size in sums.items() if size > 0)
        return sorted(rows, key=lambda row: -row.bytes)

    def table(self, by: str = "module", rows: int = 20) -> str:
        """Return a text of one line for each module, line or operation, the `rows` largest."""
        sums = self.by(by)
        lines = [f"{_readable(self.total):>10}         kept for backward"]
        for name, size in list(sums.items())[:rows]:
            lines.append(
                f"{_readable(size):>10} {size / (self.total or 1):>6.1%}  {name or '(none)'}"
            )
        if len(sums) > rows:
            lines.append(f"{'':>17}  and {len(sums) - rows} more")
        spared = self.checkpoints()[: min(rows, 5)] if by == "module" else []
        lines += [
            f"{_readable(row.bytes):>10} {row.share:>6.1%}  less with checkpoint({row.module}, ...)"
            for row in spared
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _memory_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the arrays in what a node keeps, each with what holds it: a tensor, or something else."""
    if isinstance(value, (Variable, SavedOutput)):
        yield value.array, value
    elif isinstance(value, dict):
        yield from _memory_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _memory_in(item)
    elif isinstance(value, functools.partial):
        yield from _memory_in((value.func, value.args, value.keywords))
    elif isinstance(value, Packed):
        yield from _memory_in(value.content)
    elif isinstance(value, Unpacking):
        yield from _memory_in(value.pullback)
    elif isinstance(value, Twin):
        yield from _memory_in(value.again.inputs)
    elif _is_array(value):
        yield value, None
    elif getattr(value, "__closure__", None):
        yield from _memory_in([_content(cell) for cell in value.__closure__])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "nbytes") and hasattr(value, "shape") and hasattr(value, "dtype")


def _owner(array: Any) -> Any:
    """Return the object that owns an array's memory: views of one memory have one owner."""
    while getattr(array, "base", None) is not None and _is_array(array.base):
        array = array.base
    return array


def _bytes(array: Any) -> int:
    return int(_owner(array).nbytes)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
