"""Dropout."""

from __future__ import annotations

from gradengine import functional as F
from gradengine.nn.module import Module
from gradengine.tensor import Tensor


class Dropout(Module):
    """In training mode zero each element with probability p and divide the others by 1 - p.

    `inplace` is accepted for PyTorch's sake: x itself is never overwritten.
    Raises ValueError unless 0 <= p <= 1.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p must be a probability (0 <= p <= 1); got p={p}")
        self.p = p
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"
