"""Batch normalization over the pixels of all images, (N, H, W, C) -> (N * H * W, C)."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.activation import relu_grad
from gradengine.kernels.cuda.windows import sum_dtype
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc


def batch_norm_act(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    relu: bool,
    eps: float,
    moments: tuple[Array, Array] | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.0,
) -> tuple[Array, Array, Array, None]:
    array = to_nhwc(x)
    pixels = array.reshape(-1, array.shape[3]).astype(sum_dtype(x.dtype), copy=False)
    if moments is None:
        mean, var, out = _moments(pixels)
    else:
        mean, var = (moment.astype(pixels.dtype) for moment in moments)
        out = pixels - mean
    inv_std = 1 / array_module(x).sqrt(var + eps)
    out *= inv_std
    if weight is not None:
        out *= weight
    if bias is not None:
        out += bias
    out = _add_and_clip(out.reshape(array.shape), residual, relu)
    out = out.astype(x.dtype, copy=False)
    count = len(pixels)
    if count:
        _move(running_mean, mean, momentum)
        _move(running_var, var * (count / max(count - 1, 1)), momentum)
    return from_nhwc(out), mean, inv_std, None


def _move(running: Array | None, found: Array, momentum: float) -> None:
    if running is not None:
        running *= 1 - momentum
        running += (momentum * found).astype(running.dtype)


def _moments(pixels: Array) -> tuple[Array, Array, Array]:
    """Give each channel's mean, biased variance (0 and 0 of no pixels) and pixels - mean."""
    count = max(len(pixels), 1)
    # sums about one of the values (0 of none) keep their digits however far the mean is from zero
    origin = pixels[:1].sum(axis=0)
    shifted = pixels - origin
    offset = shifted.sum(axis=0) / count
    shifted -= offset
    return origin + offset, (shifted * shifted).sum(axis=0) / count, shifted


def _add_and_clip(out: Array, residual: Array | None, relu: bool) -> Array:
    if residual is not None:
        out += residual.transpose(0, 2, 3, 1)
    if relu:
        array_module(out).maximum(out, 0, out=out)
    return out


def batch_norm_act_grad(
    grad: Array,
    x: Array,
    out: Array | None,
    passed: None,
    weight: Array | None,
    mean: Array,
    inv_std: Array,
    relu: bool,
    wants_residual: bool,
) -> tuple[Array, Array, Array, Array | None]:
    array = to_nhwc(x)
    dtype = sum_dtype(x.dtype)
    behind_relu = grad if out is None or not relu else relu_grad(grad, out)
    grads = to_nhwc(behind_relu).reshape(-1, array.shape[3]).astype(dtype, copy=False)
    normal = array.reshape(-1, array.shape[3]).astype(dtype) - mean
    normal *= inv_std
    count = max(len(grads), 1)
    grad_bias = grads.sum(axis=0)
    grad_weight = (grads * normal).sum(axis=0)
    scale = inv_std if weight is None else inv_std * weight
    # grad_x = scale * (g - mean(g) - x_hat * mean(g * x_hat)) for g = grad behind relu
    normal *= grad_weight / count
    by_x = (grads - grad_bias / count - normal) * scale
    by_x = by_x.reshape(array.shape).astype(x.dtype, copy=False)
    vector_dtype = mean.dtype if weight is None else weight.dtype
    sums = grad_weight.astype(vector_dtype), grad_bias.astype(vector_dtype)
    return from_nhwc(by_x), *sums, from_nhwc(to_nhwc(behind_relu)) if wants_residual else None


def scale_shift(x: Array, scale: Array, shift: Array, residual: Array | None, relu: bool) -> Array:
    out = to_nhwc(x) * scale
    out += shift
    return from_nhwc(_add_and_clip(out, residual, relu))
