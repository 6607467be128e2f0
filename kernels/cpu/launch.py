"""Compile and launch parallel Numba functions."""

from __future__ import annotations

from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from numba import njit

from gradengine.kernels.cpu.code_cache import keep_code
from gradengine.kernels.cpu.memory import keep_freed_memory
from gradengine.kernels.cpu.parts import part
from gradengine.kernels.cpu.threads import LAUNCH_LOCK, prepare_launch, start_threads
from gradengine.kernels.layout import Array, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Callable

start_threads()
keep_freed_memory()


def parallel_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for all cores on its first call; one launch runs at a time.

    The compiled code is kept on disk (see `code_cache`). A forked process runs the function on one
    core, with the same result. What the function calls is a `kernel_part`.
    """
    compiled = njit(parallel=True, nogil=True)(function)
    keep_code(compiled, function)

    @cache
    def serial() -> Any:
        alone = njit(nogil=True)(function)
        keep_code(alone, function, variant="serial")
        return alone

    @wraps(function)
    def launch(*arguments: Any) -> Any:
        with LAUNCH_LOCK:
            run = compiled if prepare_launch() else serial()
            return run(*arguments)

    return launch


def kernel_part(function: Callable[..., Any]) -> Any:
    """Make a function that kernels of any module may call; it is compiled and kept with them.

    Called from Python it runs as it is written, not compiled.
    """
    return part(function)


def kernel_input(x: Array) -> Array:
    """Give x (N, C, H, W) as the (N, H, W, C) array that a compiled function takes."""
    array = to_nhwc(x)
    # To Numba a read-only array is another type: it would compile everything a second time.
    return array if array.flags.writeable else array.copy()
