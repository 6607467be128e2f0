"""Convolution: one operation for each of its three passes, each the adjoint of the other two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.kernels.geometry import Conv2dGeometry, conv2d_geometry
from gradengine.operation import operation
from gradengine.ops.reduction import sum
from gradengine.ops.shape import squeeze, unsqueeze
from gradengine.precision import lowered
from gradengine.tape import Variable


@operation(label="ConvolutionBackward0")
def _conv2d(x, weight, bias, *, geometry):
    return kernels.conv2d(x, weight, bias, geometry)


@operation(label="ConvolutionBackward0")
def _conv2d_moments(x, weight, bias, *, geometry, moments):
    """Convolve, and put mean and variance of the result by channel into the list `moments`."""
    out, *moments[:] = kernels.conv2d_moments(x, weight, bias, geometry)
    return out


@operation(label="ConvolutionBackwardBackward0")
def _conv2d_grad_input(grad, weight, *, geometry):
    return kernels.conv2d_grad_input(grad, weight, geometry)


@operation(label="ConvolutionBackwardBackward0")
def _conv2d_grad_weight(grad, x, *, geometry, dtype=None):
    return kernels.conv2d_grad_weight(grad, x, geometry, dtype)


def _grad_input_onto(grad, weight, geometry, *, onto=None):
    if onto is None:
        return _conv2d_grad_input(grad, weight, geometry=geometry)
    return kernels.conv2d_grad_input(grad, weight, geometry, onto)


def _grad_weight(grad, x, geometry, weight_grad_dtype):
    if isinstance(grad, Variable):  # recorded, in one dtype
        return _conv2d_grad_weight(grad, x, geometry=geometry)
    return _conv2d_grad_weight(grad, x, geometry=geometry, dtype=weight_grad_dtype)


for _convolution in (_conv2d, _conv2d_moments):
    _convolution.pullbacks(
        x=_grad_input_onto,
        weight=_grad_weight,
        bias=lambda grad: sum(grad, dim=(0, 2, 3)),
    )
_conv2d_grad_input.pullbacks(
    grad=lambda x, weight, geometry: _conv2d(x, weight, None, geometry=geometry),
    weight=lambda x, grad, geometry: _conv2d_grad_weight(grad, x, geometry=geometry),
)
_conv2d_grad_weight.pullbacks(
    grad=lambda weight, x, geometry: _conv2d(x, weight, None, geometry=geometry),
    x=lambda weight, grad, geometry: _conv2d_grad_input(grad, weight, geometry=geometry),
)


def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Cross-correlate x (N, C, H, W) with weight (K, C / groups, R, S) and add bias (K,).

    x may lack N, and so will the result. Numbers are ints or (vertical, horizontal) pairs; padding
    is also "valid" (none) or "same" (stride 1 only). Returns (N, K, out_height, out_width), with
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 along each axis.
    Raises ValueError if the shapes do not fit, TypeError unless all inputs have one dtype, float32
    or float64; float16 needs CUDA.
    """
    if x.ndim == 3:
        out = conv2d(unsqueeze(x, 0), weight, bias, stride, padding, dilation, groups)
        return squeeze(out, 0)
    geometry = conv2d_geometry(x.shape, weight.shape, stride, padding, dilation, groups)
    if autocast_mode.dtype is not None:
        x, weight, bias = lowered(x), lowered(weight), lowered(bias)
    return _conv2d(x, weight, bias, geometry=geometry)


def conv2d_moments(
    x: Any, weight: Any, bias: Any, geometry: Conv2dGeometry
) -> tuple[Any, tuple[Any, Any]]:
    """Return `conv2d` of x (N, C, H, W), and mean and biased variance of it by channel.

    The two are float64 arrays (K,) without a gradient, 0 for an empty batch: what follows from them
    must count in its own gradient that they depend on the result, as batch normalization's does.
    The geometry is the one of x and weight; bias may be None.
    """
    if autocast_mode.dtype is not None:
        x, weight, bias = lowered(x), lowered(weight), lowered(bias)
    moments: list[Any] = []
    out = _conv2d_moments(x, weight, bias, geometry=geometry, moments=moments)
    return out, (moments[0], moments[1])


def conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Cross-correlate x (N, C, L) or (C, L) with weight (K, C / groups, S) and add bias (K,).

    It is `conv2d` on images of height 1, with its arguments, size formula and errors.
    """
    if weight.ndim != 3 or x.ndim not in (2, 3):
        raise ValueError(
            "conv1d: x must be 2-D or 3-D and weight 3-D (x.ndim in (2, 3) and weight.ndim == 3); "
            f"got x.shape={tuple(x.shape)}, weight.shape={tuple(weight.shape)}"
        )
    if autocast_mode.dtype is not None:  # here, where a weight is still a leaf
        x, weight, bias = lowered(x), lowered(weight), lowered(bias)
    out = conv2d(
        unsqueeze(x, -2),
        unsqueeze(weight, -2),
        bias,
        (1, _single(stride)),
        padding if isinstance(padding, str) else (0, _single(padding)),
        (1, _single(dilation)),
        groups,
    )
    return squeeze(out, -2)


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
