"""Functions that are compiled only within the kernels that call them.

Numba would optimize a compiled function and make machine code of it on its own, with all that it
calls, before the caller's turn: twice the work, or more where parts call parts. What this takes from
Numba's inside is here; where a version of Numba lacks it, parts are compiled as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher

_HOOKS = (
    "_optimize_functions",
    "_optimize_final_module",
    "_finalize_final_module",
    "_finalize_dynamic_globals",
)
_KNOWN = all(hasattr(JITCodeLibrary, name) for name in _HOOKS)


def part(function: Callable[..., Any], *, apart: bool = False, reorders: bool = False) -> Any:
    """Make a function that compiled code may call; called from Python it runs as it is written.

    Arrays given to a function with `apart` share no memory that it writes: loops need not look.
    With `reorders`, the terms of its sums may be added in any order.
    """
    options: Any = {"nogil": True, "fastmath": {"reassoc"} if reorders else False}
    if not _KNOWN:
        return njit(**options)(function)
    compiler = _ApartCompiler if apart else _Compiler
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Any = njit(pipeline_class=compiler, **options)(function)
    if isinstance(compiled, CPUDispatcher):  # not where the user switched compilation off
        compiled.__class__ = _Part
    return compiled


class _Library(JITCodeLibrary):
    """LLVM code that is linked into other libraries and never run itself."""

    @property
    def codegen(self) -> Any:
        return _WithoutEnvironments(self._codegen)

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # "not defined here"

    def _optimize_functions(self, ll_module: Any) -> None:
        """Run the passes, which Numba would make anew for each function and mere declaration."""
        ll_module.data_layout = self._codegen._data_layout
        passes, builder = self._codegen._function_pass_manager()
        for function in ll_module.functions:
            if not function.is_declaration:
                passes.run(function, builder)

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _WithoutEnvironments:
    """A code generator that does not look for a part's environment where no code is.

    Only code that handles Python objects reads environments.
    """

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def set_env(self, env_name: str, env: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)


class _Compiler(Compiler):
    """Numba's compiler, with a library of its own for the code."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        if self.state.library is None:
            self.state.library = _Library(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


class _ApartCompiler(_Compiler):
    """Says of the arguments what Numba says by itself of those of a parallel loop's body."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.flags.noalias = True
        return super().compile_extra(func)


class _Part(CPUDispatcher):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.py_func(*args, **kwargs)
