"""2-D convolution as matrix products over columns: the input pixels each output pixel reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradengine.devices import array_module
from gradengine.kernels.cuda.windows import pad, padded_shape, sum_dtype, taps, unpad, windows
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradengine.kernels.geometry import Conv2dGeometry

COLUMN_BYTES = 256 << 20


def conv2d(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    weight = weight[0] if isinstance(weight, tuple) else weight
    matrices = _group_matrices(to_nhwc(weight), geometry)
    shape = (geometry.batch, geometry.out_height, geometry.out_width, geometry.out_channels)
    out = array_module(x).empty(shape, x.dtype)
    for group, images, columns in _column_chunks(x, geometry):
        target = _split_groups(out, geometry)[images, :, :, group]
        target[...] = (columns @ matrices[group].T).reshape(target.shape)
    if bias is not None:
        out += bias
    if residual is not None:
        out += to_nhwc(residual)
    if relu:
        array_module(x).maximum(out, 0, out=out)
    return from_nhwc(out)


def conv2d_moments(
    x: Array, weight: Any, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    out = conv2d(x, weight, bias, geometry)
    values = out.astype("float64")
    if not out.size:
        zeros = array_module(x).zeros(out.shape[1])
        return out, zeros, zeros.copy()
    return out, values.mean(axis=(0, 2, 3)), values.var(axis=(0, 2, 3))


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> Array:
    return weight.copy()


def conv2d_grad_input(grad: Array, weight: Array, geometry: Conv2dGeometry) -> Array:
    matrices = _group_matrices(to_nhwc(weight), geometry)
    grads = _split_groups(to_nhwc(grad), geometry)
    padded = array_module(grad).zeros(
        padded_shape(geometry, geometry.in_channels), sum_dtype(grad.dtype)
    )
    channels = geometry.in_channels // geometry.groups
    for images in _image_chunks(geometry, grad.dtype.itemsize):
        for group in range(geometry.groups):
            pixels = grads[images, :, :, group]
            columns = pixels.reshape(-1, pixels.shape[-1]) @ matrices[group]
            kernel = (geometry.kernel_height, geometry.kernel_width)
            columns = columns.reshape(*pixels.shape[:3], *kernel, channels)
            part = padded[images, :, :, group * channels : (group + 1) * channels]
            for r, s, target in taps(part, geometry):
                target[...] += columns[:, :, :, r, s]
    grad_input = unpad(padded, geometry).astype(grad.dtype, copy=False)
    return from_nhwc(array_module(grad).ascontiguousarray(grad_input))


def conv2d_grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    out_channels, channels, kernel_height, kernel_width = geometry.weight_shape
    shape = (out_channels, kernel_height, kernel_width, channels)
    grad_weight = array_module(x).zeros(shape, sum_dtype(x.dtype))
    matrices = _group_matrices(grad_weight, geometry)
    grads = _split_groups(to_nhwc(grad), geometry)
    for group, images, columns in _column_chunks(x, geometry):
        pixels = grads[images, :, :, group]
        matrices[group] += pixels.reshape(-1, pixels.shape[-1]).T @ columns
    return from_nhwc(grad_weight.astype(x.dtype, copy=False))


def _column_chunks(x: Array, geometry: Conv2dGeometry) -> Iterator[tuple[int, slice, Array]]:
    """Give (group, images, columns of their output pixels (pixels, R * S * C / groups))."""
    padded = pad(to_nhwc(x), geometry)
    channels = geometry.in_channels // geometry.groups
    for images in _image_chunks(geometry, x.dtype.itemsize):
        for group in range(geometry.groups):
            part = padded[images, :, :, group * channels : (group + 1) * channels]
            columns = windows(part, geometry)
            length = geometry.kernel_height * geometry.kernel_width * channels
            yield group, images, columns.reshape(-1, length)


def _image_chunks(geometry: Conv2dGeometry, itemsize: int) -> Iterator[slice]:
    """Split the batch so that one group's columns stay within COLUMN_BYTES, at least one image."""
    _, channels, kernel_height, kernel_width = geometry.weight_shape
    pixels = geometry.out_height * geometry.out_width
    image_bytes = pixels * kernel_height * kernel_width * channels * itemsize
    step = max(COLUMN_BYTES // image_bytes, 1)
    for first in range(0, geometry.batch, step):
        yield slice(first, min(first + step, geometry.batch))


def _group_matrices(weight: Array, geometry: Conv2dGeometry) -> Array:
    # (K, R, S, C / groups) -> (groups, K / groups, R * S * C / groups), a view
    return weight.reshape(geometry.groups, geometry.out_channels // geometry.groups, -1)


def _split_groups(out: Array, geometry: Conv2dGeometry) -> Array:
    # (N, P, Q, K) -> (N, P, Q, groups, K / groups), a view
    channels = geometry.out_channels // geometry.groups
    return out.reshape(*out.shape[:3], geometry.groups, channels)
