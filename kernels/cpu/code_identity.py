"""What compiled code depends on, as text: two codes that may differ have different texts."""

from __future__ import annotations

import dis
import hashlib
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import config
from numba.core.types import Type

_PACKAGE = "gradengine.kernels"
_FOLDER = Path(__file__).parents[1]
_SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE")
# Searched for in the text: to parse it took a fifth of a second of each start.
_FROM = re.compile(r"^ *from ([\w.]+) import (\([^)]*\)|.*)", re.MULTILINE)


def signature(sig: Any) -> str:
    """Return a short name for argument types."""
    return hashlib.sha256(str(sig).encode()).hexdigest()[:16]


def machine(codegen: Any) -> str:
    """Return the versions, settings and processor features that Numba compiles with."""
    settings = [(name, getattr(config, name, None)) for name in _SETTINGS]
    versions = (numba.__version__, llvmlite.__version__, np.__version__, platform.python_version())
    return repr((versions, platform.python_implementation(), settings, codegen.magic_tuple()))


def source_digest(function: FunctionType) -> str:
    """Return a digest of the sources and the constants that a function of the kernels is made from.

    Raises:
        ValueError: the function is not of the kernels.
    """
    digest = hashlib.sha256()
    for module in sorted(_modules(function.__module__)):
        digest.update(f"{module}\n".encode() + read_source(module))
    for constant in _constants(function, set()):
        digest.update(constant.encode())
    return digest.hexdigest()


@cache
def read_source(module: str) -> bytes:
    """Return the source of a module of the kernels as it was when first asked for."""
    if not f"{module}.".startswith(f"{_PACKAGE}."):
        raise ValueError(f"{module} is not a module of {_PACKAGE}")
    path = _FOLDER.joinpath(*module.split(".")[2:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes()


def _modules(module: str) -> set[str]:
    """Return a module of the kernels and all that it imports of them, directly or not."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(name)
    return found


@cache
def _imports(module: str) -> list[str]:
    source = re.sub(r"#.*", "", read_source(module).decode())
    found = re.findall(r"[\w.]+", " ".join(re.findall(r"^ *import (.*)", source, re.MULTILINE)))
    for name, imported in _FROM.findall(source):
        found += [name, *(f"{name}.{word}" for word in re.findall(r"\w+", imported))]
    return [name for name in found if _is_module(name)]


@cache
def _is_module(name: str) -> bool:
    try:
        read_source(name)
    except (OSError, ValueError):
        return False
    return True


def _constants(function: FunctionType, seen: set[int]) -> Iterator[str]:
    """Yield the values outside a function that are compiled into it, and into what it calls.

    The source alone does not tell them: they may stem from the machine or from a closure.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    names = sorted(_globals(function.__code__))
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        values[name] = cell.cell_contents
    for name, value in values.items():
        yield from _described(f"{function.__qualname__}.{name}", value, seen)


@cache
def _globals(code: CodeType) -> set[str]:
    """Return the global names that a function and those inside it read."""
    inner = (_globals(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*inner)


def _described(name: str, value: Any, seen: set[int]) -> Iterator[str]:
    """Yield a named value as text, for a function the values it uses, for modules nothing."""
    # What Numba compiles and what emits code wrap a function.
    value = getattr(value, "py_func", getattr(value, "_defn", value))
    if isinstance(value, FunctionType):
        if f"{value.__module__}.".startswith(f"{_PACKAGE}."):
            yield from _constants(value, seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _described(name, item, seen)
    elif isinstance(value, np.ndarray):
        yield f"{name}={value.dtype}{value.shape}{value.tobytes()!r}\n"
    elif value is None or isinstance(value, (bool, int, float, str, np.dtype, np.generic, Type)):
        yield f"{name}={value!r}\n"
