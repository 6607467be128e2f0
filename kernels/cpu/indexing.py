"""Adding and writing at positions that may repeat, one after the other."""

from __future__ import annotations

import numpy as np

from gradengine.kernels.layout import Array


def add_at(name: str, out: Array, positions: Array, values: Array) -> None:
    np.add.at(out, positions, values)


def put_at(name: str, out: Array, positions: Array, values: Array) -> None:
    out[positions] = values
