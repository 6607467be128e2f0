"""2-D convolution: the choice between the direct kernels and Winograd's, and the memory of results.

All arrays here are channels-last: pixels (N, H, W, C), weights (K, R, S, C / groups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradengine.kernels import settings
from gradengine.kernels.cpu import direct, epilogue, winograd
from gradengine.kernels.cpu.launch import kernel_input
from gradengine.kernels.layout import Array, from_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry


class _Packed(NamedTuple):
    """A weight as one of the algorithms reads it."""

    winograd: bool
    data: Array


def conv2d(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    return from_nhwc(_forward(x, weight, bias, geometry, residual, relu, None))


def conv2d_moments(
    x: Array, weight: Any, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    blocks = _block_count(geometry, x.dtype, _uses_winograd(weight, geometry, x.dtype))
    moments = epilogue.empty_moments(blocks, geometry.out_channels, x.dtype)
    out = from_nhwc(_forward(x, weight, bias, geometry, None, False, moments))
    if geometry.batch == 0:
        return out, *np.zeros((2, geometry.out_channels))
    return out, *epilogue.combine_moments(moments)


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> _Packed:
    if _uses_winograd(weight, geometry, weight.dtype):
        return _Packed(True, winograd.pack(kernel_input(weight), flipped=False))
    return _Packed(False, direct.pack(kernel_input(weight), geometry.groups))


def conv2d_grad_input(grad: Array, weight: Array, geometry: Conv2dGeometry) -> Array:
    shape = (geometry.batch, geometry.height, geometry.width, geometry.in_channels)
    out = np.empty(shape, grad.dtype)
    grad, weight = kernel_input(grad), kernel_input(weight)
    if geometry.batch == 0:
        return from_nhwc(out)
    if not _uses_winograd(weight, geometry, grad.dtype):
        direct.grad_input(grad, weight, out, geometry)
        return from_nhwc(out)
    (top, _), (left, _) = geometry.padding
    finish = (
        _absent(1, grad),
        _absent(4, grad),
        False,
        _no_moments(winograd.block_count(*out.shape[:3]), grad),
    )
    padding = (2 - top, 2 - left)
    winograd.convolve(grad, weight, True, _absent(2, grad), out, padding, finish)
    return from_nhwc(out)


def conv2d_grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    grad, x = kernel_input(grad), kernel_input(x)
    if geometry.batch and _uses_winograd(None, geometry, x.dtype):
        (top, _), (left, _) = geometry.padding
        return from_nhwc(winograd.grad_weight(grad, x, (top, left)))
    return from_nhwc(direct.grad_weight(grad, x, geometry))


def _forward(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    residual: Array | None,
    relu: bool,
    moments: Array | None,
) -> Array:
    """Choose and run an algorithm; moments are the blocks' to be filled, or None."""
    batch, outputs, height, width = geometry.output_shape
    out = np.empty((batch, height, width, outputs), x.dtype)
    if batch == 0:
        return out
    x = kernel_input(x)
    uses_winograd = _uses_winograd(weight, geometry, x.dtype)
    finish = (
        _absent(1, x) if bias is None else np.require(bias, requirements="CW"),
        _absent(4, x) if residual is None else kernel_input(residual),
        relu,
        _no_moments(_block_count(geometry, x.dtype, uses_winograd), x)
        if moments is None
        else moments,
    )
    packed = weight.data.data if _is_packed(weight) else None
    if uses_winograd:
        (top, _), (left, _) = geometry.padding
        weight = _absent(4, x) if packed is not None else kernel_input(weight)
        packed = _absent(2, x) if packed is None else packed
        winograd.convolve(x, weight, False, packed, out, (top, left), finish)
    else:
        if packed is None:
            packed = direct.pack(kernel_input(weight), geometry.groups)
        direct.convolve(x, packed, out, geometry, finish)
    return out


def _is_packed(weight: Any) -> bool:
    return isinstance(weight, tuple)  # the seam's PackedConv2d


def _uses_winograd(weight: Any, geometry: Conv2dGeometry, dtype: np.dtype) -> bool:
    if _is_packed(weight):
        return weight.data.winograd
    return settings.cpu.winograd and winograd.is_suitable(geometry, dtype)


def _block_count(geometry: Conv2dGeometry, dtype: np.dtype, uses_winograd: bool) -> int:
    if uses_winograd:
        return winograd.block_count(geometry.batch, geometry.out_height, geometry.out_width)
    return direct.block_count(geometry, dtype.itemsize)


def _absent(ndim: int, like: Array) -> Array:
    """Give an empty array: compiled code takes no None without being compiled again."""
    return np.empty((0,) * ndim, like.dtype)


def _no_moments(blocks: int, like: Array) -> Array:
    return np.empty((blocks, 0, 0), like.dtype)
