"""Compile and launch parallel Numba functions."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from numba import njit

from gradengine.kernels.cpu.threads import LAUNCH_LOCK, start_threads
from gradengine.kernels.layout import Array, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Callable

start_threads()


def parallel_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for all cores on its first call; one launch runs at a time.

    The compiled code is kept on disk. That cache sees a change in the function's own file only: a
    kernel must not call compiled functions of other modules.
    """
    compiled = njit(parallel=True, nogil=True, cache=True)(function)

    @wraps(function)
    def launch(*arguments: Any) -> Any:
        with LAUNCH_LOCK:
            return compiled(*arguments)

    return launch


def kernel_input(x: Array) -> Array:
    """Give x (N, C, H, W) as the (N, H, W, C) array that a compiled function takes."""
    array = to_nhwc(x)
    # To Numba a read-only array is another type: it would compile everything a second time.
    return array if array.flags.writeable else array.copy()
