"""Every array function that the code calls by `xp` exists in CuPy and takes the same arguments.

The calls are read from the sources; CuPy can be imported, and its signatures read, without a GPU.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gradengine.devices import import_cupy

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("gradengine/*.py"), *ROOT.glob("kernels/*.py")]
    + [
        p
        for folder in ("autograd", "nn", "ops", "optim")
        for p in ROOT.glob(f"gradengine/{folder}/*.py")
    ]
    + [*ROOT.glob("kernels/cuda/*.py")]
)
# In these, what has a method of numpy.ndarray is an array.
CORE = ("operation.py", "precision.py", "elementwise.py")
ARRAY_CODE = [p for p in SOURCES if p.parent.name in ("ops", "cuda") or p.name in CORE]
ARRAY_METHODS = {name for name in dir(np.ndarray) if callable(getattr(np.ndarray, name))}
ARRAY_METHODS -= set(dir(str))  # str.partition, say


class Call(NamedTuple):
    """A call as it is written: of xp.name, or of a method of an array."""

    name: str
    positional: int
    keywords: tuple[str, ...]
    place: str

    def __str__(self) -> str:
        return f"{self.name}({', '.join(['.'] * self.positional + list(self.keywords))})"


def calls_in(path: Path) -> Iterator[Call]:
    """Give the calls of `xp.name(...)` and `array_module(x).name(...)`."""
    for node in _calls(path):
        names = _names(node.func)
        if names:
            yield _call(".".join(names), node, path)


def method_calls_in(path: Path) -> Iterator[Call]:
    """Give the calls of methods that arrays have, on anything that is not an imported module."""
    tree = ast.parse(path.read_text())
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    for node in _calls(path):
        function = node.func
        if not isinstance(function, ast.Attribute) or _names(function):
            continue
        module = isinstance(function.value, ast.Name) and function.value.id in imported
        if function.attr in ARRAY_METHODS and not module:
            yield _call(function.attr, node, path)


def _calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def _names(node: ast.expr) -> list[str]:
    """Return ["linalg", "norm"] for the expression xp.linalg.norm, [] for what is not xp's."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    by_name = isinstance(node, ast.Name) and node.id == "xp"
    by_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("array_module")
    return names if by_name or by_call else []


def _call(name: str, node: ast.Call, path: Path) -> Call:
    positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
    return Call(name, len(positional), keywords, f"{path.relative_to(ROOT)}:{node.lineno}")


def signature_of(function: Any) -> inspect.Signature:
    """Return a signature; of compiled functions, the one that their docstring begins with."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        first = function.__doc__.strip().splitlines()[0]
        text = first[first.index("(") :].split(" -> ")[0].replace("\\*", "*")
        text = re.sub(r"(?<=[(,])\s*\w+ (?=\w)", "", text)  # types of C before the names
        namespace: dict[str, Any] = {}
        exec(f"def f{text}: pass", {}, namespace)
        return inspect.signature(namespace["f"])


def refusal(function: Any, call: Call) -> str | None:
    """Return why a function cannot be called so, or None."""
    signature = signature_of(function)
    given = [None] * (call.positional + ("self" in signature.parameters))
    try:
        signature.bind_partial(*given, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.place}: CuPy's {call.name}{signature} cannot be called as {call}: {error}"
    return None


def unique(calls: Iterator[Call]) -> list[Any]:
    """Return one parameter of each kind of call."""
    kinds = {str(call): call for call in calls}
    return [pytest.param(kinds[kind], id=kind) for kind in sorted(kinds)]


FUNCTIONS = unique(call for path in SOURCES for call in calls_in(path))
METHODS = unique(call for path in ARRAY_CODE for call in method_calls_in(path))


@pytest.mark.nvrtc
@pytest.mark.parametrize("call", FUNCTIONS)
def test_cupy_has_the_function(call):
    cupy = import_cupy()
    try:
        function = reduce(getattr, call.name.split("."), cupy)
    except AttributeError:
        pytest.fail(f"{call.place}: CuPy has no {call.name}")
    assert refusal(function, call) is None


@pytest.mark.nvrtc
def test_cupy_has_every_name():
    cupy = import_cupy()
    missing = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = _names(node) if isinstance(node, ast.Attribute) else []
            if names and not hasattr(reduce(getattr, names[:-1], cupy), names[-1]):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {'.'.join(names)}")
    assert not missing


@pytest.mark.nvrtc
@pytest.mark.parametrize("call", METHODS)
def test_cupy_s_arrays_have_the_method(call):
    cupy = import_cupy()
    method = getattr(cupy.ndarray, call.name, None)
    assert method is not None, f"{call.place}: CuPy's arrays have no {call.name}"
    assert refusal(method, call) is None


def test_the_calls_are_found():
    names = {call.name for path in SOURCES for call in calls_in(path)}
    assert {"empty", "linalg.norm"} <= names, "the sources call these, and others"
    assert {"astype", "sum", "reshape"} <= {c.name for p in ARRAY_CODE for c in method_calls_in(p)}


@pytest.mark.nvrtc
def test_what_cupy_does_not_take_is_refused():
    cupy = import_cupy()
    for function, keywords in (
        (cupy.sqrt, ("where",)),
        (cupy.ndarray.sum, ("where",)),
        (cupy.empty, ("like",)),
    ):
        call = Call("name", 1, keywords, "here")
        assert "here: CuPy's name" in (refusal(function, call) or "")
        assert refusal(function, call._replace(keywords=())) is None
    assert refusal(cupy.flip, Call("flip", 3, (), "here")) is not None
