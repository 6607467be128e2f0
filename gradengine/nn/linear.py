"""Linear, and Identity, its trivial case."""

from __future__ import annotations

from typing import Any

from gradengine import functional as F
from gradengine.factories import empty
from gradengine.nn import init
from gradengine.nn.module import Module
from gradengine.tensor import Parameter, Tensor


class Linear(Module):
    """Return x @ weight.T + bias for x (..., in_features), weight (out_features, in_features)."""

    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", Parameter(empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, evenly from +-1 / sqrt(in_features)."""
        init.reset_linear_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Identity(Module):
    """Return x. Arguments of the constructor are ignored, so that it can stand in for any layer."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
