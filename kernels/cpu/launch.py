"""Compile and launch parallel Numba functions."""

from __future__ import annotations

import os
import threading
from functools import wraps
from typing import TYPE_CHECKING, Any

from numba import get_num_threads, njit

from gradengine.kernels.layout import Array, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Callable

# Numba's `workqueue` threading layer, the only one on some systems, ends the process when two
# Python threads are inside parallel functions at once. `nogil` lets other Python threads (a data
# loader) run beside a kernel, so the GIL does not keep the launches apart: this lock does. One
# launch uses all cores anyway, and taking a free lock costs far less than starting its threads.
LAUNCH_LOCK = threading.Lock()


def _start_threads() -> None:
    """Start Numba's threads, those of OpenMP so that they sleep between two launches.

    OpenMP's would spin, and the BLAS behind NumPy has threads of its own that need the same cores:
    a small kernel beside a small product then takes milliseconds instead of microseconds. OpenMP
    reads the policy once, when it is loaded; a user's choice stands, and child processes see none.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        get_num_threads()
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        get_num_threads()  # starts them
    finally:
        del os.environ["OMP_WAIT_POLICY"]


_start_threads()


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
