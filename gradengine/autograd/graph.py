"""The graph from outside: what engine and users tell each other about nodes, saved values and memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradengine.autograd.saved_hooks import (
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)
from gradengine.tape import Variable

__all__ = [
    "disable_saved_tensors_hooks",
    "increment_version",
    "save_on_cpu",
    "saved_tensors_hooks",
]


def increment_version(tensor: Variable | Iterable[Variable]) -> None:
    """Say that the memory of a tensor, or of several, was changed without gradengine's knowledge.

    For kernels and NumPy code that write to `tensor.array`: values that were saved before are refused in
    backward from now on, as after an in-place operation. Raises TypeError for what is no Tensor.
    """
    tensors: Any = (tensor,) if isinstance(tensor, Variable) else tuple(tensor)
    for x in tensors:
        if not isinstance(x, Variable):
            raise TypeError(f"increment_version: expected Tensors; got {type(x).__name__}")
    for x in tensors:
        x.written("increment_version")
