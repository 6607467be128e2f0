"""Numba's threads: how they wait for work, how many run, and what a forked process does instead.

Importing this module imports no Numba.
"""

from __future__ import annotations

import os
import threading

# Numba's `workqueue` threading layer, the only one on some systems, ends the process when two
# Python threads are inside parallel functions at once. `nogil` lets other Python threads (a data
# loader) run beside a kernel, so the GIL does not keep the launches apart: this lock does. One
# launch uses all cores anyway, and taking a free lock costs far less than starting its threads.
# Re-entrant: what a kernel computes in may be taken before it is launched (see workspace).
LAUNCH_LOCK = threading.RLock()

# How often GNU OpenMP's threads look for work before they sleep: 110 us of looking on a Zen 4, twice
# that where a pause takes longer. A launch then costs 2 us while launches are up to 100 us apart,
# as an operation's Python is; waking a sleeping thread costs 50 to 80. The price is paid beside
# NumPy's matmul, whose BLAS has threads of its own that need the same cores: a product right after
# a kernel waits 0.3 ms for the cores. Unlimited, as OpenMP does it by itself, that would be 8 ms.
_SPINS = "5000"


_chosen: int | None = None  # how many threads shall run, if the user said so
_forked = False  # whether this process was forked from one whose threads ran
_applied = threading.local()  # .count: the number set in a Python thread; Numba keeps one for each


def set_num_threads(n: int) -> None:
    """Let CPU kernels run on `n` threads, in all Python threads of the process.

    The results are the same for every number. NumPy's BLAS has settings of its own.

    Raises:
        ValueError: `n` is less than 1, or more than Numba started (NUMBA_NUM_THREADS).
    """
    global _chosen
    highest = _most_threads()
    if not 1 <= n <= highest:
        raise ValueError(
            f"set_num_threads: n must be one of the threads there are (1 <= n <= {highest}); got n={n}"
        )
    _chosen = int(n)


def get_num_threads() -> int:
    """Return on how many threads CPU kernels run."""
    return _most_threads() if _chosen is None else _chosen


def _most_threads() -> int:
    from numba import config

    return config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]


def prepare_launch() -> bool:
    """Set this Python thread's number of threads; return whether there are threads to launch.

    A forked process has none: OpenMP's did not come along, and Numba would end the process.
    """
    if _chosen is not None and getattr(_applied, "count", None) != _chosen:
        from numba import set_num_threads as set_numba_threads

        set_numba_threads(_chosen)
        _applied.count = _chosen
    return not _forked


def _note_fork() -> None:
    global _forked
    _forked = True
    LAUNCH_LOCK.release()


def start_threads() -> None:
    """Start Numba's threads, those of OpenMP so that they spin for a moment only, then sleep.

    OpenMP reads the setting once, when it is loaded, which another package may have done before.
    A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stands, and child processes see none.
    """
    from numba import get_num_threads as start

    if hasattr(os, "register_at_fork"):
        # No fork in the middle of a launch or a compilation, which the child could never finish.
        os.register_at_fork(
            before=LAUNCH_LOCK.acquire,
            after_in_parent=LAUNCH_LOCK.release,
            after_in_child=_note_fork,
        )
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        start()
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        start()
    finally:
        del os.environ["GOMP_SPINCOUNT"]
