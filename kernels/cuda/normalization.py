"""Batch normalization over the pixels of all images, (N, H, W, C) -> (N * H * W, C)."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.windows import sum_dtype
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc


def batch_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    array = to_nhwc(x)
    pixels = array.reshape(-1, array.shape[3]).astype(sum_dtype(x.dtype), copy=False)
    count = max(len(pixels), 1)
    # sums about one of the values (0 of none) keep their digits however far the mean is from zero
    origin = pixels[:1].sum(axis=0)
    shifted = pixels - origin
    offset = shifted.sum(axis=0) / count
    shifted -= offset
    variance = (shifted * shifted).sum(axis=0) / count
    out = shifted / array_module(x).sqrt(variance + eps)
    if weight is not None:
        out *= weight
    if bias is not None:
        out += bias
    out = out.reshape(array.shape).astype(x.dtype, copy=False)
    return from_nhwc(out), (origin + offset).astype(x.dtype), variance.astype(x.dtype)


def batch_norm_grad(
    grad: Array, x: Array, weight: Array | None, mean: Array, inv_std: Array
) -> tuple[Array, Array, Array]:
    array = to_nhwc(x)
    dtype = sum_dtype(x.dtype)
    grads = to_nhwc(grad).reshape(-1, array.shape[3]).astype(dtype, copy=False)
    normal = array.reshape(-1, array.shape[3]).astype(dtype) - mean
    normal *= inv_std
    count = max(len(grads), 1)
    grad_bias = grads.sum(axis=0)
    grad_weight = (grads * normal).sum(axis=0)
    scale = inv_std if weight is None else inv_std * weight
    # grad_x = scale * (grad - mean(grad) - x_hat * mean(grad * x_hat))
    normal *= grad_weight / count
    out = (grads - grad_bias / count - normal) * scale
    out = out.reshape(array.shape).astype(x.dtype, copy=False)
    return from_nhwc(out), grad_weight.astype(x.dtype), grad_bias.astype(x.dtype)


def scale_shift(x: Array, scale: Array, shift: Array) -> Array:
    out = to_nhwc(x) * scale
    out += shift
    return from_nhwc(out)
