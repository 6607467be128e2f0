"""How many threads run kernels, and the lock that launches take.

Importing this module imports no Numba.
"""

from __future__ import annotations

import threading
from functools import cache

# Launches use all cores, one after the other; `nogil` lets other Python threads (a data loader) run
# beside a kernel, so the GIL does not keep them apart. Re-entrant: what a kernel computes in may be
# taken before it is launched (see workspace).
LAUNCH_LOCK = threading.RLock()

_chosen: int | None = None  # how many threads shall run, if the user said so


def set_num_threads(n: int) -> None:
    """Let CPU kernels run on `n` threads, in all Python threads of the process.

    The results are the same for every number. NumPy's BLAS has settings of its own.

    Raises:
        ValueError: `n` is less than 1, or more than the process may use (NUMBA_NUM_THREADS, or the
            number of its cores).
    """
    global _chosen
    highest = most_threads()
    if not 1 <= n <= highest:
        raise ValueError(
            f"set_num_threads: n must be one of the threads there are (1 <= n <= {highest}); got n={n}"
        )
    _chosen = int(n)


def get_num_threads() -> int:
    """Return on how many threads CPU kernels run."""
    return most_threads() if _chosen is None else _chosen


@cache
def most_threads() -> int:
    """Return on how many threads they may run at most."""
    from numba import config

    return config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
