"""Conversions of element type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradengine.kernels.layout import Array


def cast_all(arrays: Sequence[Array], dtype: np.dtype) -> Sequence[Array]:
    return [array.astype(dtype) for array in arrays]
