"""Random orders that depend on nothing but their seed."""

from __future__ import annotations

import numpy as np


def random_order(count: int, seed: int, stream: int) -> np.ndarray:
    """Return 0 to count - 1 in an order that is a pure function of the arguments, int64.

    `seed` and `stream` are non-negative integers. The process's random stream is not touched.
    """
    # Raw words, for NumPy promises that these stay the same in later versions; shuffles may change.
    words = np.random.Philox([seed, stream]).random_raw(count)
    return np.argsort(words, kind="stable")
