"""Watching the engine at work: some of its functions are noticed when they are entered and left.

The engine is Python, so the interpreter's own hook for profilers tells of every call. None of its code
asks whether somebody watches, and nothing is slower while nobody does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

APPLY = (  # the bodies that all operations share
    "gradengine.operation:_general.<locals>.apply",
    "gradengine.elementwise:_unary.<locals>.apply",
    "gradengine.elementwise:_binary.<locals>.apply",
)
MODULE_CALL = "gradengine.nn.module:Module.__call__"
NEW_NODE = "gradengine.tape:Node.__init__"
WALK = "gradengine.backward_walk:walk_back"
PULL = "gradengine.backward_walk:pull_shares"
ACCUMULATE = "gradengine.backward_walk:accumulate_at_leaf"


class Handlers(NamedTuple):
    """What to call with the frame of a function that is entered, and with its result when it is left."""

    entered: Callable[[FrameType], None] | None = None
    left: Callable[[FrameType, Any], None] | None = None


class Watch:
    """Calls handlers for functions "module:qualified name" of the engine, in this thread, while it is on.

    Watches nest. What handlers do is not watched. A profiler written in C rests meanwhile.
    """

    def __init__(self, handlers: Mapping[str, Handlers]) -> None:
        self._handlers = handlers
        self._known: dict[CodeType, Handlers | None] = {}
        self._outer: Any = None

    def start(self) -> None:
        """Begin to watch."""
        outer = sys.getprofile()
        self._outer = outer if callable(outer) else None
        sys.setprofile(self._notice)

    def stop(self) -> None:
        """Watch no more."""
        sys.setprofile(self._outer)

    def _notice(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        try:
            handlers = self._known[code]
        except KeyError:
            name = f"{frame.f_globals.get('__name__')}:{code.co_qualname}"
            handlers = self._known[code] = self._handlers.get(name)
        if handlers is not None:
            if event == "call" and handlers.entered is not None:
                handlers.entered(frame)
            elif event == "return" and handlers.left is not None:
                handlers.left(frame, result)
        if self._outer is not None:
            self._outer(frame, event, result)


class ModuleCall(NamedTuple):
    """A module that is being called, and its dotted path from the class of the outermost one."""

    frame: FrameType
    module: Any
    path: str


class ModulePaths:
    """Which module is being called, and what modules and parameters are called in the models seen so far."""

    def __init__(self) -> None:
        self._stack: list[ModuleCall] = []
        self._modules: dict[int, tuple[Any, str]] = {}  # by id, with the object so that it stays
        self._parameters: dict[int, tuple[Any, str]] = {}

    def start(self) -> None:
        """Look up which modules are being called already."""
        frame: FrameType | None = sys._getframe(1)
        found: list[FrameType] = []
        while frame is not None:
            name = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"
            if name == MODULE_CALL:
                found.append(frame)
            frame = frame.f_back
        for frame in reversed(found):
            self.entered(frame)

    def entered(self, frame: FrameType) -> None:
        """Note that `Module.__call__` was entered."""
        module = frame.f_locals["self"]
        if id(module) not in self._modules:
            self._learn(module)
        self._stack.append(ModuleCall(frame, module, self._modules[id(module)][1]))

    def left(self, frame: FrameType) -> ModuleCall | None:
        """Note that `Module.__call__` was left, and return which call that was."""
        if self._stack and self._stack[-1].frame is frame:
            return self._stack.pop()
        return None

    def _learn(self, root: Any) -> None:
        around = f"{self.current()}." if self._stack else ""
        path = f"{around}{type(root).__name__}"
        for name, module in root.named_modules():
            self._modules.setdefault(id(module), (module, f"{path}.{name}" if name else path))
        for name, parameter in root.named_parameters():
            self._parameters.setdefault(id(parameter), (parameter, f"{path}.{name}"))

    def current(self) -> str:
        """Return the path of the innermost module being called, or ""."""
        return self._stack[-1].path if self._stack else ""

    def of_operation(self, inputs: Any) -> str:
        """Return the module to which an operation on these inputs belongs.

        Fused layers are computed without being called: then it is that of the first parameter.
        """
        current = self.current()
        for value in inputs:
            owner = self.parameter(value).rpartition(".")[0]
            if owner.startswith(f"{current}."):
                return owner
        return current

    def parameter(self, tensor: Any) -> str:
        """Return the path of a parameter of a model that was seen, or ""."""
        return self._parameters.get(id(tensor), (None, ""))[1]
