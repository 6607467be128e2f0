"""The operations, where PyTorch's users look for them: `import gradengine.nn.functional as F`.

Where PyTorch's take `inplace`, these do too, for its sake: x itself is never overwritten.
"""

from __future__ import annotations

from typing import Any

from gradengine import functional
from gradengine.functional import *  # pyright: ignore[reportAssignmentType]


def relu(x: Any, inplace: bool = False) -> Any:
    """Return `gradengine.relu` of x."""
    return functional.relu(x)


def relu6(x: Any, inplace: bool = False) -> Any:
    """Return `gradengine.relu6` of x."""
    return functional.relu6(x)


def silu(x: Any, inplace: bool = False) -> Any:
    """Return `gradengine.silu` of x."""
    return functional.silu(x)


def leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """Return `gradengine.leaky_relu` of x."""
    return functional.leaky_relu(x, negative_slope)


def elu(x: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    """Return `gradengine.elu` of x."""
    return functional.elu(x, alpha)


def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    """Return `gradengine.hardtanh` of x."""
    return functional.hardtanh(x, min_val, max_val)


def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Return `gradengine.dropout` of x."""
    return functional.dropout(x, p, training)
