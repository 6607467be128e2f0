"""Where in the user's source something happened: noted as two numbers, put into words when asked for.

A place is the code object and the position in it of the innermost call from outside this package. Noting
one reads a few frames and keeps none of them; source text is only looked at when a message is written.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import os
import sys
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

Place = tuple[CodeType, int]

_PACKAGE = os.path.dirname(__file__) + os.sep
_OPERATORS = {
    **{ast.Add: "+=", ast.Sub: "-=", ast.Mult: "*=", ast.Div: "/=", ast.FloorDiv: "//=", ast.Mod: "%="},
    **{ast.Pow: "**=", ast.BitAnd: "&=", ast.BitOr: "|=", ast.BitXor: "^=", ast.MatMult: "@="},
}  # fmt: skip

# The places of recorded operations, by node: filled only while something traces them.
places_of_nodes: WeakKeyDictionary[Any, Place] = WeakKeyDictionary()


def calling_place() -> Place | None:
    """Return where the innermost code outside this package stands."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def line_of(place: Place) -> str:
    """Return a place as file and line, such as "train.py:31": the path as seen from the current folder."""
    code, _ = place
    path = code.co_filename
    if os.path.isabs(path):
        relative = os.path.relpath(path)
        path = path if relative.startswith(os.pardir) else relative
    return f"{path}:{_position(place)[0] or code.co_firstlineno}"


def _position(place: Place) -> tuple[int | None, int | None, int | None, int | None]:
    """Return the first and last line and the first and last column (in bytes) of a place's expression."""
    code, last = place
    positions = itertools.islice(code.co_positions(), last // 2, None)
    return next(positions, (None, None, None, None))


def write_of(place: Place, method: str) -> tuple[str | None, str]:
    """Return what an in-place write at this place is spelled as: the tensor, where it can be told, and how.

    `b.mul_(2)` gives ("b", "mul_"), `b += 1` ("b", "+="), `b[0] = 1` ("b", "item assignment"), and a call
    that writes to tensors it was not called on, as an optimizer's, (None, "optimizer.step").
    """
    named = "item assignment" if method == "__setitem__" else method
    match _parsed(place):
        case ast.AugAssign(target=target, op=op) if type(op) in _OPERATORS:
            return ast.unparse(target), _OPERATORS[type(op)]
        case ast.Expr(value=ast.Subscript(value=target)) if method == "__setitem__":
            return ast.unparse(target), named
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=target, attr=called))):
            if called == method:
                return ast.unparse(target), named
            return None, f"{ast.unparse(target)}.{called}"
        case ast.Expr(value=ast.Call(func=function)):
            return None, ast.unparse(function)
        case _:
            return None, named


def _parsed(place: Place) -> ast.stmt | None:
    """Return the expression or statement at a place, or None where its source cannot be read."""
    first, last, start, end = _position(place)
    if first is None or last is None or start is None or end is None:
        return None
    file = place[0].co_filename
    lines = [linecache.getline(file, number).encode() for number in range(first, last + 1)]
    if not all(lines):
        return None
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    try:
        return ast.parse(b"".join(lines).decode().strip()).body[0]
    except (SyntaxError, IndexError, UnicodeDecodeError):
        return None
