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


def start_threads() -> None:
    """Start Numba's threads, those of OpenMP so that they spin for a moment only, then sleep.

    OpenMP reads the setting once, when it is loaded, which another package may have done before.
    A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stands, and child processes see none.
    """
    from numba import get_num_threads

    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        get_num_threads()
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        get_num_threads()  # starts them
    finally:
        del os.environ["GOMP_SPINCOUNT"]
