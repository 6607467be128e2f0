"""Compiled code kept on disk, such that stale, foreign or broken code is never run.

Numba's own cache looks at a function's own file only. Here the name of an entry is made of all that
the code depends on: sources, constants, versions, the processor and the types of the arguments.
What this takes from Numba's inside is in `keep_code` and `CodeCache`; where a version of Numba lacks
it, kernels are compiled anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core import compiler, serialize
from numba.core.bytecode import FunctionIdentity
from numba.core.runtime.nrt import rtsys

from gradengine.kernels.cache_folder import private_cache_folder
from gradengine.kernels.cpu.code_identity import machine, read_source, signature, source_digest

_SECONDS = "20 to 40"  # a first training step's, on two cores of a Zen 4 and of a busy Zen 3
_VARIANTS = 4  # kept for one function and signature: other versions, processors, working copies
_UNUSED = 90 * 86400  # seconds after which an entry goes
_ABANDONED = 3600  # seconds after which a file that was never finished goes

# Told each function that was compiled, and how many seconds it took. Without one, the first
# function that a process compiles is announced on stderr.
on_compiled: Callable[[str, float], None] | None = None
_announced = False

# Functions that compiled code may name, and what makes each known to the loader (see `linked`).
linked_names: dict[str, Callable[[], None]] = {}


def keep_code(dispatcher: Any, function: Callable[..., Any], variant: str = "") -> None:
    """Make a function that Numba compiles lazily keep its code on disk, if Numba's inside allows.

    A variant is another way of compiling the same function.
    """
    known = all(hasattr(compiler.CompileResult, name) for name in ("_reduce", "_rebuild"))
    if known and hasattr(dispatcher, "_cache") and hasattr(FunctionIdentity, "_unique_ids"):
        FunctionIdentity._unique_ids = _NUMBERS
        dispatcher._cache = CodeCache(function, variant)


class _Numbers:
    """Numbers by which Numba tells functions of one name apart in machine code.

    It counts in each process from 1; but here code of several processes comes together in one, and of
    two functions of one name and number the linker would take the first for both.
    """

    def __next__(self) -> int:
        return secrets.randbits(62)


_NUMBERS: Any = _Numbers()


class CodeCache:
    """What a dispatcher asks before it compiles, and tells afterwards.

    Nothing here raises for what the folder holds or refuses: the function is compiled then.
    """

    cache_path = None

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        parts = (function.__module__.rpartition(".")[2], function.__qualname__, variant)
        self._name = ".".join(part for part in parts if part).replace("<locals>.", "")
        self._function = function
        self._started = 0.0
        read_source(function.__module__)  # now: it may change before the function is compiled

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Give the code kept for these argument types, or None."""
        rtsys.initialize(target_context)  # what kept code calls; the compiler needs more, later
        with suppress(Exception):  # whatever a file holds, it does no more harm than none
            path = self._path(sig, target_context.codegen())
            kept, parts = _read(path)
            if kept == sig:
                return compiler.CompileResult._rebuild(target_context, *parts)
        _announce()
        self._started = time.perf_counter()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code that was just compiled, unless it is good for this process only."""
        if on_compiled is not None:
            on_compiled(self._name, time.perf_counter() - self._started)
        if data.lifted or data.library.has_dynamic_globals:
            return
        with suppress(Exception):  # no folder, a full disk, a constant without a lasting name
            path = self._path(sig, data.codegen)
            _write(path, serialize.dumps((sig, data._reduce())))
            _remove_old(path)

    def flush(self) -> None:
        """Do nothing: a change of the source makes another name."""

    def _path(self, sig: Any, codegen: Any) -> Path:
        """Return the entry's file: function, argument types, and all else that matters."""
        digest = hashlib.sha256()
        for part in (machine(codegen), source_digest(self._function)):
            digest.update(part.encode())
        name = f"{self._name}-{signature(sig)}-{digest.hexdigest()[:32]}.kernel"
        return private_cache_folder() / name


def _read(path: Path) -> Any:
    content = path.read_bytes()
    digest, pickled = content[:32], content[32:]
    if hashlib.sha256(pickled).digest() != digest:  # cut short by a crash of the machine
        raise ValueError(f"{path} is damaged")
    for name in [name for name in linked_names if name.encode() in pickled]:
        linked_names[name]()
    result = pickle.loads(pickled)
    with suppress(OSError):
        os.utime(path)  # when it was last used
    return result


def _write(path: Path, pickled: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(pickled).digest())
            file.write(pickled)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        os.unlink(partial)
        raise


def _remove_old(path: Path) -> None:
    """Remove what `path` replaces, what nobody used for long, and what was never finished."""
    now = time.time()
    function, _, _ = path.name.rpartition("-")
    variants = []
    with os.scandir(path.parent) as entries:
        for entry in entries:
            age = now - entry.stat().st_mtime
            limit = {".kernel": _UNUSED, ".partial": _ABANDONED}.get(Path(entry.name).suffix)
            if limit is not None and age > limit:
                os.unlink(entry.path)
            elif entry.name.rpartition("-")[0] == function and entry.name != path.name:
                variants.append((age, entry.path))
    for _, old in sorted(variants)[_VARIANTS - 1 :]:
        os.unlink(old)


def _announce() -> None:
    """Say once that kernels are being compiled, how long that takes and what would avoid it."""
    global _announced
    if _announced or on_compiled is not None:
        return
    _announced = True
    what = f"gradengine: compiling CPU kernels, {_SECONDS} s for a network's training step"
    try:
        folder = private_cache_folder()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"{what}, at every start: {error}", file=sys.stderr)
        return
    how = "once for this machine (`python -m gradengine compile` does it ahead)"
    print(f"{what}, {how}", file=sys.stderr)
