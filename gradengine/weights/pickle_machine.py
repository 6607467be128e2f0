"""Run the few pickle opcodes that weight files need.

Pickle is a small stack language. Here its opcodes build plain values only. A global name is looked
up in a table that the caller passes, never imported, and only that table's constructors are called.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LONGEST_PICKLE = 16 << 20  # bytes; the structure of a file, without its arrays, is far smaller
DEEPEST = 100  # levels of nesting
_SHARED_VALUES = 1_000_000  # values that may come from repeating shared containers
_LONGEST_NAME = 200
_PROTOCOL = 2
_STOP = ord(".")


class Constructor:
    """A function of this package that REDUCE may call. No file can make one."""

    __slots__ = ("build",)

    def __init__(self, build: Callable[..., object]) -> None:
        self.build = build


class PickleMachine:
    """Build the value that the pickle at `data[position:]` describes.

    `globals_` maps "module.name" to what GLOBAL pushes, `load_persistent` maps a persistent id
    to a value. After `run`, `position` is the index behind the pickle. Refusals are ValueErrors.
    """

    def __init__(
        self,
        data: bytes,
        position: int,
        globals_: Mapping[str, object],
        load_persistent: Callable[[object], object],
    ) -> None:
        self.data = data
        self.position = position
        self.globals = globals_
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # stack heights
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """Return the value; it holds arrays, dicts, lists, tuples, numbers, strings and None."""
        start = self.position
        while (code := self.take(1)[0]) != _STOP:
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise ValueError(f"pickle opcode {code:#04x} at {self.position - 1} is not allowed")
            operation(self)
        if len(self.stack) != 1 or self.marks:
            raise ValueError("the pickle must end with exactly one value")
        _check_plain(self.stack[0], self.position - start + _SHARED_VALUES)
        return self.stack[0]

    def take(self, count: int) -> bytes:
        piece = self.data[self.position : self.position + count]
        if len(piece) != count:
            raise ValueError("the pickle ends in the middle of an opcode")
        self.position += count
        return piece

    def unpack(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def take_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _LONGEST_NAME)
        if end < 0:
            raise ValueError("a global's name does not end")
        return self.take(end + 1 - self.position)[:-1].decode()

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("the pickle takes a value that it never made")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("the pickle takes a mark that it never made")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def check_protocol(self) -> None:
        protocol = self.take(1)[0]
        if protocol != _PROTOCOL:
            raise ValueError(
                f"the pickle protocol must be {_PROTOCOL} (PyTorch's default); got {protocol}"
            )

    def push_mark(self) -> None:
        self.marks.append(len(self.stack))

    def push_text(self, length_layout: struct.Struct) -> None:
        self.stack.append(self.take(self.unpack(length_layout)).decode("utf-8", "surrogatepass"))

    def push_long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def push_tuple(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def push_global(self) -> None:
        name = f"{self.take_line()}.{self.take_line()}"
        if name not in self.globals:
            raise ValueError(f"the global {name!r} is not allowed")
        self.stack.append(self.globals[name])

    def push_persistent(self) -> None:
        self.stack.append(self.load_persistent(self.pop()))

    def construct(self) -> None:
        arguments, constructor = self.pop(), self.pop()
        if type(constructor) is not Constructor or type(arguments) is not tuple:
            raise ValueError("only the known constructors can be called")
        self.stack.append(constructor.build(*arguments))

    def drop_attributes(self) -> None:
        # PyTorch hangs version numbers (`_metadata`) on state dicts; a plain dict carries none.
        if type(self.pop()) is not dict or type(self.top()) is not dict:
            raise ValueError("only a dict can be given attributes")

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def remember(self, layout: struct.Struct) -> None:
        self.memo[self.unpack(layout)] = self.top()

    def recall(self, layout: struct.Struct) -> None:
        index = self.unpack(layout)
        if index not in self.memo:
            raise ValueError(f"the pickle recalls value {index}, which it never stored")
        self.stack.append(self.memo[index])

    def extend_list(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError("only a list can be appended to")
        target.extend(items)

    def extend_dict(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError("only a dict can be given items, in pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.extend_dict([key, value])


def check_key(key: object) -> str | int | float | bool:
    """Return `key` if a dict may have it.

    Tuples and large integers could be made to collide or to hash for hours; weights need neither.
    """
    if type(key) is str or type(key) is float or type(key) is bool:
        return key
    if type(key) is int and -(1 << 63) <= key < 1 << 63:
        return key
    raise ValueError(f"a dict's key must be a string or a number; got a {type(key).__name__}")


def _check_plain(value: object, most_values: int) -> None:
    """Refuse all but plain values, cycles, deep nesting, and containers repeated to explode."""
    measured: dict[int, tuple[int, int]] = {}  # id of a container -> (values, levels) in it

    def measure(value: object, depth: int) -> tuple[int, int]:
        if isinstance(value, dict):
            children = list(value.values())
        elif isinstance(value, list | tuple):
            children = value
        elif value is None or type(value) in _PLAIN:
            return 1, 0
        else:
            raise ValueError(f"weights hold no {type(value).__name__}")
        if id(value) in measured:
            return measured[id(value)]
        inner = (
            [measure(child, depth + 1) for child in children] if depth < DEEPEST else [(0, depth)]
        )
        values, levels = (
            1 + sum(count for count, _ in inner),
            1 + max((n for _, n in inner), default=0),
        )
        if levels > DEEPEST:
            raise ValueError(f"containers must nest at most {DEEPEST} deep, none inside itself")
        if values > most_values:
            raise ValueError("containers are repeated by reference until they hold too many values")
        measured[id(value)] = values, levels
        return values, levels

    measure(value, 0)


_PLAIN = frozenset({np.ndarray, str, int, float, bool})
_UINT8, _UINT16, _INT32 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<i")
_UINT32, _FLOAT64 = struct.Struct("<I"), struct.Struct(">d")

_OPERATIONS: dict[int, Callable[[PickleMachine], None]] = {
    ord(code): operation
    for code, operation in {
        b"\x80": PickleMachine.check_protocol,
        b"(": PickleMachine.push_mark,
        b"N": lambda machine: machine.stack.append(None),
        b"\x88": lambda machine: machine.stack.append(True),
        b"\x89": lambda machine: machine.stack.append(False),
        b"K": lambda machine: machine.stack.append(machine.unpack(_UINT8)),
        b"M": lambda machine: machine.stack.append(machine.unpack(_UINT16)),
        b"J": lambda machine: machine.stack.append(machine.unpack(_INT32)),
        b"\x8a": PickleMachine.push_long,
        b"G": lambda machine: machine.stack.append(machine.unpack(_FLOAT64)),
        b"X": lambda machine: machine.push_text(_UINT32),
        b"U": lambda machine: machine.push_text(_UINT8),  # a string of Python 2
        b"]": lambda machine: machine.stack.append([]),
        b"}": lambda machine: machine.stack.append({}),
        b")": lambda machine: machine.stack.append(()),
        b"\x85": lambda machine: machine.push_tuple(1),
        b"\x86": lambda machine: machine.push_tuple(2),
        b"\x87": lambda machine: machine.push_tuple(3),
        b"t": lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
        b"a": lambda machine: machine.extend_list([machine.pop()]),
        b"e": lambda machine: machine.extend_list(machine.pop_to_mark()),
        b"s": PickleMachine.set_item,
        b"u": lambda machine: machine.extend_dict(machine.pop_to_mark()),
        b"q": lambda machine: machine.remember(_UINT8),
        b"r": lambda machine: machine.remember(_UINT32),
        b"h": lambda machine: machine.recall(_UINT8),
        b"j": lambda machine: machine.recall(_UINT32),
        b"c": PickleMachine.push_global,
        b"R": PickleMachine.construct,
        b"b": PickleMachine.drop_attributes,
        b"Q": PickleMachine.push_persistent,
    }.items()
}
