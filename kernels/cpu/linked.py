"""Functions that are compiled once, and called by the code of many kernels at their address.

A `kernel_part` becomes part of each kernel that calls it, and is compiled as often: right for what is
short. What is long and seldom called is linked instead: kernels name it, as they name functions of
the C library, and the name is resolved when their code is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import binding
from numba import njit, types
from numba.core import cgutils

from gradengine.kernels.cpu.atomics import intrinsic
from gradengine.kernels.cpu.code_cache import keep_code, linked_names
from gradengine.kernels.cpu.launch import kernel_part
from gradengine.kernels.cpu.team import address


def linked(signatures: Sequence[tuple[Any, ...]]) -> Callable[[Callable[..., None]], Any]:
    """Make a function of compiled code that is compiled for these argument types alone, each once.

    It returns nothing and must not raise. Callers may pass integers of any size for intp.
    """

    def decorate(function: Callable[..., None]) -> Any:
        options: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        compiled: Any = njit(nogil=True, error_model="numpy", **options)(function)
        keep_code(compiled, function)
        names = {
            kinds: f"linked.{function.__module__}.{function.__qualname__}.{number}"
            for number, kinds in enumerate(signatures)
        }

        def provide(kinds: tuple[Any, ...]) -> None:
            compiled.compile(kinds)
            binding.add_symbol(names[kinds], address(compiled.overloads[kinds]))
            linked_names.pop(names[kinds], None)

        linked_names.update((name, partial(provide, kinds)) for kinds, name in names.items())

        @intrinsic
        def call(typing_context, arguments):
            kinds = tuple(types.intp if isinstance(k, types.Integer) else k for k in arguments)
            if names[kinds] in linked_names:
                provide(kinds)
            return types.void(types.Tuple(kinds)), partial(_call, names[kinds])

        @kernel_part
        def linked_call(*arguments):
            call(arguments)

        return linked_call

    return decorate


def _call(name: str, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kinds = tuple(signature.args[0])
    convention = context.call_conv
    kind = convention.get_function_type(types.none, kinds)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    values = cgutils.unpack_tuple(builder, arguments[0])
    convention.call_function(builder, function, types.none, kinds, values)
    return context.get_dummy_value()
