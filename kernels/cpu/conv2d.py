"""2-D convolution: the choice of an algorithm, and the memory of results.

Each algorithm is a module with the same functions: pack, block_count, convolve, grad_input and
grad_weight; few_channels has grad_input alone. Small groups are united before one is chosen. All arrays
here are channels-last: pixels (N, H, W, C), weights (K, R, S, C / groups).
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradengine.kernels import settings
from gradengine.kernels.cpu import (
    columns,
    depthwise,
    direct,
    epilogue,
    few_channels,
    small_groups,
    winograd,
)
from gradengine.kernels.cpu.layout import kernel_input
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry


class _Packed(NamedTuple):
    """A weight as an algorithm reads it."""

    algorithm: ModuleType
    data: Array
    apart: _Packed | None = None  # where this is of united groups, the same without unions


def _algorithm(geometry: Conv2dGeometry, dtype: np.dtype) -> ModuleType:
    return _choice(geometry, dtype, settings.cpu.winograd)


@lru_cache(CACHED_GEOMETRIES)
def _choice(geometry: Conv2dGeometry, dtype: np.dtype, allows_winograd: bool) -> ModuleType:
    if allows_winograd and winograd.is_suitable(geometry, dtype):
        return winograd
    if depthwise.is_suitable(geometry):
        return depthwise
    return columns if columns.is_suitable(geometry) else direct


def conv2d(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    out, _ = _forward(x, weight, bias, geometry, residual, relu, wants_moments=False)
    return from_nhwc(out)


def conv2d_moments(
    x: Array, weight: Any, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    out, moments = _forward(x, weight, bias, geometry, None, False, wants_moments=True)
    return from_nhwc(out), *epilogue.combine_moments(moments)


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> _Packed:
    weight = kernel_input(weight)
    apart = _pack(weight, geometry)
    united = small_groups.united(geometry, weight.dtype)
    if united is geometry:
        return apart
    weight = small_groups.unite(weight, geometry.groups, united.groups)
    return _pack(weight, united)._replace(apart=apart)


def _pack(weight: Array, geometry: Conv2dGeometry) -> _Packed:
    algorithm = _algorithm(geometry, weight.dtype)
    return _Packed(algorithm, algorithm.pack(weight, geometry))


def conv2d_grad_input(
    grad: Array, weight: Array, geometry: Conv2dGeometry, onto: Array | None = None
) -> Array:
    shape = (geometry.batch, geometry.height, geometry.width, geometry.in_channels)
    out = np.empty(shape, grad.dtype)
    if geometry.batch:
        grad, weight = kernel_input(grad), kernel_input(weight)
        geometry, weight = _united(grad, weight, geometry)
        few = few_channels.is_suitable(geometry, grad.dtype)
        algorithm = few_channels if few else _algorithm(geometry, grad.dtype)
        onto = epilogue.absent(4, grad.dtype) if onto is None else kernel_input(onto)
        algorithm.grad_input(grad, weight, onto, out, geometry)
    return from_nhwc(out)


def conv2d_grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    if not geometry.batch:
        outputs, channels, height, width = geometry.weight_shape
        return from_nhwc(np.zeros((outputs, height, width, channels), x.dtype))
    united = small_groups.united(geometry, x.dtype)
    algorithm = _algorithm(united, x.dtype)
    out = algorithm.grad_weight(kernel_input(grad), kernel_input(x), united)
    if united is not geometry:
        out = small_groups.divide(out, geometry.groups, united.groups)
    return from_nhwc(out)


def _united(x: Array, weight: Array, geometry: Conv2dGeometry) -> tuple[Conv2dGeometry, Array]:
    """Unite small groups, if x, which the weight will be multiplied with, is finite."""
    united = small_groups.united(geometry, x.dtype)
    if united is geometry or not np.isfinite(x).all():
        return geometry, weight
    return united, small_groups.unite(weight, geometry.groups, united.groups)


def _forward(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    residual: Array | None,
    relu: bool,
    *,
    wants_moments: bool,
) -> tuple[Array, Array]:
    """Give the result (N, P, Q, K), and the moments of its blocks if they are wanted."""
    batch, outputs, height, width = geometry.output_shape
    out = np.empty((batch, height, width, outputs), x.dtype)
    x = kernel_input(x)
    packed: Any = weight[0] if isinstance(weight, tuple) else None  # the seam's PackedConv2d
    if packed is None:
        geometry, weight = _united(x, kernel_input(weight), geometry)
    elif packed.apart is not None:
        if np.isfinite(x).all():
            geometry = small_groups.united(geometry, x.dtype)
        else:
            packed = packed.apart
    algorithm = packed.algorithm if packed else _algorithm(geometry, x.dtype)
    blocks = algorithm.block_count(geometry, x.itemsize)
    moments = epilogue.empty_moments(blocks, outputs if wants_moments else 0, x.dtype)
    if batch:
        finish = epilogue.Finish(
            epilogue.absent(1, x.dtype)
            if bias is None
            else np.require(bias, requirements=["C", "W"]),
            epilogue.absent(4, x.dtype) if residual is None else kernel_input(residual),
            relu,
            moments,
        )
        data = None
        if packed is not None:
            data, weight = packed.data, epilogue.absent(4, x.dtype)
        algorithm.convolve(x, weight, data, out, geometry, finish)
    return out, moments
