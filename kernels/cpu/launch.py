"""Compile functions by Numba and launch them on all cores."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from numba import config, njit

from gradengine.kernels.cpu.code_cache import keep_code
from gradengine.kernels.cpu.memory import keep_freed_memory
from gradengine.kernels.cpu.parts import part
from gradengine.kernels.cpu.team import team
from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from gradengine.kernels.cpu.workers import run_workers

if TYPE_CHECKING:
    from collections.abc import Callable

keep_freed_memory()


def parallel_kernel(function: Callable[..., Any], variant: str = "") -> Callable[..., None]:
    """Compile function(worker, workers, *arguments) for all cores: kernel(workers, *arguments).

    Workers 0 to `workers` - 1 share the work, on as many threads or, where these are busy and in a
    forked process, on fewer, with the same result. One launch runs at a time. The
    compiled code is kept on disk (see `code_cache`), under `variant` as well where one function is made
    for several formulas. What the function calls is a `kernel_part`.

    An element of float32 beside a number that is written out, as in `x[i] if x[i] > 0 else 0`, is
    computed in float64, at half the speed or less: `x.dtype.type(0)` is a zero of the array's own.

    Raises:
        RuntimeError: a worker raised an exception.
    """
    if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
        return _plain(function)
    body = part(function, apart=True)

    def entry(team, workers, *arguments):
        return run_workers(body, team, workers, arguments)

    options: Any = {"no_cfunc_wrapper": True}
    compiled = njit(nogil=True, error_model="numpy", **options)(entry)
    keep_code(compiled, function, variant)

    @wraps(function)
    def launch(workers: int, *arguments: Any) -> None:
        with LAUNCH_LOCK:
            if compiled(team().for_workers(workers), workers, *arguments):
                raise RuntimeError(f"{function.__qualname__}: a worker raised an exception")

    return launch


def _plain(function: Callable[..., Any]) -> Callable[..., None]:
    """Run the workers as they are written, as Numba does where it is told not to compile."""

    @wraps(function)
    def launch(workers: int, *arguments: Any) -> None:
        for worker in range(workers):
            function(worker, workers, *arguments)

    return launch


def kernel_part(function: Callable[..., Any]) -> Any:
    """Make a function that kernels of any module may call; it is compiled and kept with them.

    Called from Python it runs as it is written, not compiled.
    """
    return part(function)


def summing_part(function: Callable[..., Any]) -> Any:
    """Make a `kernel_part` whose sums the compiler may add up in another order, that of vectors.

    The order depends on the machine and on how many terms there are, not on the threads.
    """
    return part(function, reorders=True)


@kernel_part
def own_range(worker, workers, count):
    """Give the numbers below `count` that are a worker's own: neighbours, in order."""
    return range(count * worker // workers, count * (worker + 1) // workers)
