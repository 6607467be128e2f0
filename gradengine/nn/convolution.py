"""Convolution layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradengine import functional as F
from gradengine.factories import empty
from gradengine.nn import init
from gradengine.nn.module import Module
from gradengine.tensor import Parameter, Tensor

Sizes = int | Sequence[int]


class _Convolution(Module):
    """What convolutions of any number of axes share."""

    axes: int
    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: groups must divide both numbers of channels; "
                f"got {in_channels=}, {out_channels=}, {groups=}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self._for_each_axis(kernel_size)
        self.stride = self._for_each_axis(stride)
        self.padding = padding if isinstance(padding, str) else self._for_each_axis(padding)
        self.dilation = self._for_each_axis(dilation)
        self.groups = groups
        # Channels-last in memory: as the kernels take it, and as they give its gradient.
        memory = (out_channels, *self.kernel_size, in_channels // groups)
        self.weight = Parameter(empty(memory, device=device, dtype=dtype).movedim(-1, 1))
        self.register_parameter(
            "bias", Parameter(empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def _for_each_axis(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes,) * self.axes if isinstance(sizes, int) else tuple(sizes)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, evenly from +-1 / sqrt(fan in)."""
        init.reset_linear_(self.weight, self.bias)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        ordinary = {"padding": (0,) * self.axes, "dilation": (1,) * self.axes, "groups": 1}
        for name, value in ordinary.items():
            if getattr(self, name) != value:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else f"{text}, bias=False"


class Conv1d(_Convolution):
    """Cross-correlate x (N, in_channels, L), or without N, with a learned weight: see `conv1d`.

    weight is (out_channels, in_channels / groups, kernel_size), bias (out_channels,).
    """

    axes = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv2d(_Convolution):
    """Cross-correlate x (N, in_channels, H, W), or without N, with a learned weight: see `conv2d`.

    Sizes are ints or (vertical, horizontal) pairs; weight is (out_channels, in_channels / groups,
    *kernel_size), bias (out_channels,).
    """

    axes = 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
