"""Normalization: by statistics of the batch, running statistics, or those of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module, check_same_device
from gradengine.dtypes import float32, is_floating_point, narrowed, sum_dtype
from gradengine.grad_mode import grad_mode
from gradengine.kernels.geometry import Pool2dGeometry
from gradengine.operation import array_of, cast, operation, sum_to_shape
from gradengine.ops.elementwise import rsqrt, where
from gradengine.ops.pooling import max_pool2d_scatter
from gradengine.ops.reduction import mean, sum
from gradengine.ops.shape import reshape
from gradengine.precision import raised
from gradengine.tape import Variable, note_writes

# ---- batch normalization -------------------------------------------------------------------------


class _Running(NamedTuple):
    """Arrays that a batch moves in place, and by which share of it; any of them may be None."""

    mean: Any
    var: Any
    momentum: float
    batches: Any  # int64 (1,)


def _by_batch(x, weight, bias, residual, relu, eps, moments, running):
    """Normalize by the batch's own statistics and move the running ones, in place, towards them."""
    arguments = (relu, eps, moments, *running)
    if x.ndim == 4:
        return kernels.batch_norm_act(x, weight, bias, residual, *arguments)
    residual = None if residual is None else _images(residual)
    out, *kept = kernels.batch_norm_act(_images(x), weight, bias, residual, *arguments)
    return out.reshape(x.shape), *kept


@operation(label="NativeBatchNormBackward0", keeps=("mean", "inv_std", "passed"))
def _batch_norm(x, weight, bias, residual, *, eps, moments, running):
    return _by_batch(x, weight, bias, residual, False, eps, moments, running)


@operation(label="BatchNormReluBackward0", keeps=("mean", "inv_std", "passed"))
def _batch_norm_relu(x, weight, bias, residual, *, eps, moments, running):
    return _by_batch(x, weight, bias, residual, True, eps, moments, running)


def _batch_norm_grad(
    grad: Any, wanted: Any, x: Any, weight: Any, mean: Any, inv_std: Any, eps: float
) -> Any:
    return _grad_by_batch(grad, wanted, x, None, None, weight, mean, inv_std, eps)


def _batch_norm_relu_grad(
    grad: Any,
    wanted: Any,
    x: Any,
    out: Any,
    passed: Any,
    weight: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
) -> Any:
    return _grad_by_batch(grad, wanted, x, out, passed, weight, mean, inv_std, eps)


def _grad_by_batch(
    grad: Any,
    wanted: Any,
    x: Any,
    out: Any,
    passed: Any,
    weight: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
) -> Any:
    """Return the gradients by x, weight, bias and residual; `out` is None but behind a relu."""
    if not isinstance(grad, Variable):
        relu = out is not None
        images = _images(out) if relu else None
        grads = kernels.batch_norm_act_grad(
            *(_images(grad), _images(x), images, passed, weight, mean, inv_std, relu, wanted[3])
        )
        if x.ndim == 4:
            return grads
        by_residual = None if grads[3] is None else grads[3].reshape(x.shape)
        return grads[0].reshape(x.shape), *grads[1:3], by_residual
    grads = _recorded_grad_by_batch(_behind_relu(grad, out), x, weight, inv_std, eps)
    return *grads, _behind_relu(grad, out)


def _recorded_grad_by_batch(grad: Any, x: Any, weight: Any, inv_std: Any, eps: float) -> Any:
    """Return the gradients by x, weight and bias in operations, of `grad` in front of any relu."""
    dtype, vector_dtype = x.dtype, inv_std.dtype if weight is None else weight.dtype
    grad, x = _widened(grad, inv_std), _widened(x, inv_std)
    axes = _channel_axes(x)
    weighted = grad if weight is None else grad * _by_channel(weight, x.ndim)
    normal, inv_std = _standardize(x, axes, eps)
    grad_x = _standardize_grad(weighted, normal, inv_std, axes)
    by_weight, by_bias = sum(grad * normal, dim=axes), sum(grad, dim=axes)
    return _as(grad_x, dtype), _as(by_weight, vector_dtype), _as(by_bias, vector_dtype)


def _widened(x: Any, vector: Any) -> Any:
    """Return x in the dtype of a vector that belongs to it: 16 bits may have one of float32."""
    return _as(x, vector.dtype) if vector.dtype.itemsize > x.dtype.itemsize else x


def _as(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else cast(x, dtype=dtype)


def _behind_relu(grad: Any, out: Any) -> Any:
    """Return the gradient in front of a relu whose result is `out`, or of none."""
    if out is None:
        return grad
    if isinstance(grad, Variable):
        return where(array_of(out) == 0, 0.0, grad)
    return kernels.relu_grad(grad, out)


_batch_norm.joint_pullback(_batch_norm_grad)
_batch_norm_relu.joint_pullback(_batch_norm_relu_grad)


@operation(label="BatchNormReluMaxPoolBackward0", keeps=("mean", "inv_std", "winners", "peaks"))
def _batch_norm_relu_max_pool(x, weight, bias, *, eps, moments, running, geometry):
    return kernels.batch_norm_relu_max_pool(x, weight, bias, eps, geometry, moments, *running)


def _batch_norm_relu_max_pool_grad(
    grad: Any,
    wanted: Any,
    x: Any,
    out: Any,
    winners: Any,
    peaks: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    geometry: Any,
) -> Any:
    if not isinstance(grad, Variable):
        return kernels.batch_norm_relu_max_pool_grad(
            grad, x, out, winners, peaks, weight, bias, mean, inv_std, geometry
        )
    positions = kernels.winning_positions(winners, geometry)
    grad = max_pool2d_scatter(_behind_relu(grad, out), indices=positions, geometry=geometry)
    return _recorded_grad_by_batch(grad, x, weight, inv_std, eps)


_batch_norm_relu_max_pool.joint_pullback(_batch_norm_relu_max_pool_grad)


@operation(label="NativeBatchNormBackward0")
def _scale_channels(x, weight, bias, residual, *, mean, inv_std):
    return _by_statistics(x, weight, bias, residual, mean, inv_std, relu=False)


@operation(label="BatchNormReluBackward0")
def _scale_channels_relu(x, weight, bias, residual, *, mean, inv_std):
    return _by_statistics(x, weight, bias, residual, mean, inv_std, relu=True)


def _by_statistics(
    x: Any, weight: Any, bias: Any, residual: Any, mean: Any, inv_std: Any, relu: bool
) -> Any:
    """Normalize by given statistics: one multiply-add for each pixel."""
    scale = inv_std if weight is None else weight * inv_std
    shift = -mean * scale if bias is None else bias - mean * scale
    residual = None if residual is None else _images(residual)
    return kernels.scale_shift(_images(x), scale, shift, residual, relu).reshape(x.shape)


def _scale_channels_grad(grad: Any, weight: Any, inv_std: Any) -> Any:
    scale = inv_std if weight is None else weight * inv_std
    return _as(_widened(grad, scale) * _by_channel(scale, grad.ndim), grad.dtype)


def _scale_channels_grad_weight(grad: Any, x: Any, mean: Any, inv_std: Any) -> Any:
    centred = _widened(x, mean) - _by_channel(mean, x.ndim)
    return _as(sum(_widened(grad, mean) * centred, dim=_channel_axes(x)) * inv_std, mean.dtype)


def _scale_channels_grad_bias(grad: Any, mean: Any) -> Any:
    return sum(_widened(grad, mean), dim=_channel_axes(grad))


_scale_channels.pullbacks(
    x=_scale_channels_grad,
    weight=_scale_channels_grad_weight,
    bias=_scale_channels_grad_bias,
    residual=lambda grad: grad,
)


# One function for each input: frozen parameters then keep nothing, at the price of passing relu anew.
_scale_channels_relu.pullbacks(
    x=lambda grad, out, weight, inv_std: _scale_channels_grad(
        _behind_relu(grad, out), weight, inv_std
    ),
    weight=lambda grad, out, x, mean, inv_std: _scale_channels_grad_weight(
        _behind_relu(grad, out), x, mean, inv_std
    ),
    bias=lambda grad, out, mean: _scale_channels_grad_bias(_behind_relu(grad, out), mean),
    residual=_behind_relu,
)


def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Return (x - mean) / sqrt(var + eps) * weight + bias by channel: x (N, C, ...), vectors (C,).

    Training takes mean and biased variance from the batch, and moves the running statistics, which
    may be None, in place: r = (1 - momentum) * r + momentum * batch, with unbiased variance.
    Otherwise the running statistics are taken. Ioffe and Szegedy, arXiv:1502.03167.
    Raises ValueError if shapes do not fit, running statistics are missing, or training meets one
    value per channel; TypeError unless all have one dtype, float32 or float64, on CUDA also float16
    or bfloat16, beside which vectors may be float32.
    """
    return batch_norm_act(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training=training,
        momentum=momentum,
        eps=eps,
    )


def batch_norm_act(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    relu: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    moments: tuple[Any, Any] | None = None,
    pool: Pool2dGeometry | None = None,
    num_batches_tracked: Any = None,
) -> Any:
    """Return batch_norm of x, plus `residual` shaped like x, with `relu` at least 0, in one pass.

    moments are x's mean and biased variance by channel, float64 arrays (C,), where training has no
    need to compute them; gradients count that they depend on x. With `pool`, in training with relu
    and without residual, max_pool2d of that is returned. num_batches_tracked, int64 of no axes,
    grows by one in training. Raises what `batch_norm` does.
    """
    array = array_of(x)
    _check_batch_norm(array, running_mean, running_var, training)
    _check_vectors(array, running_mean, running_var, weight, bias)
    _check_residual(x, residual)
    inputs = (x, weight, bias, residual)
    if not training:
        mean, var = array_of(running_mean), array_of(running_var)
        var = var.astype(sum_dtype(var.dtype), copy=False)
        inv_std = 1 / array_module(var).sqrt(var + eps)
        # A copy of the mean: training may move the running one before backward asks for it.
        apply = _scale_channels_relu if relu else _scale_channels
        return apply(*inputs, mean=mean.copy(), inv_std=inv_std)
    moved = (running_mean, running_var, num_batches_tracked)
    if grad_mode.recomputing:  # a checkpoint's second call: the first has moved them
        moved = (None, None, None)
    mean, var, batches = (array_of(one) for one in moved)
    running = _Running(mean, var, momentum, None if batches is None else batches.reshape(1))
    options: dict[str, Any] = {"eps": eps, "moments": moments, "running": running}
    if pool is not None:
        out = _batch_norm_relu_max_pool(x, weight, bias, geometry=pool, **options)
    else:
        out = (_batch_norm_relu if relu else _batch_norm)(*inputs, **options)
    note_writes(one for one in moved if isinstance(one, Variable))
    return out


def _check_residual(x: Any, residual: Any) -> None:
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            "batch_norm_act: residual must have x's shape and dtype (residual.shape == x.shape); "
            f"got x.shape={tuple(x.shape)}, x.dtype={x.dtype}, "
            f"residual.shape={tuple(residual.shape)}, residual.dtype={residual.dtype}"
        )
    check_same_device("batch_norm_act", array_of(x), array_of(residual))


def _check_batch_norm(x: Any, running_mean: Any, running_var: Any, training: bool) -> None:
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"batch_norm: x must have channels (x.ndim >= 2); got x.shape={shape}")
    if training:
        if shape[0] == 1 and math.prod(shape[2:]) == 1:
            raise ValueError(
                "batch_norm: Expected more than 1 value per channel when training, "
                f"got input size {shape}"
            )
        return
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is None:
            raise ValueError(f"batch_norm: {name} must be given unless training; got {name}=None")


_VECTORS = ("running_mean", "running_var", "weight", "bias")


def _check_vectors(x: Any, *vectors: Any) -> None:
    """Check the vectors that belong to an array x: those of _VECTORS, in this order, or None."""
    shape, dtype = x.shape[1:2], x.dtype
    given = []
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is None:
            continue
        vector = array_of(vector)
        given.append(vector)
        if vector.shape != shape:
            raise ValueError(
                f"batch_norm: {name} must have one element for each channel "
                f"({name}.shape == x.shape[1:2]); got x.shape={tuple(x.shape)}, "
                f"{name}.shape={tuple(vector.shape)}"
            )
        if vector.dtype != dtype and not (dtype.itemsize == 2 and vector.dtype == float32):
            raise TypeError(
                f"batch_norm: {name} must have x's dtype ({name}.dtype == x.dtype); "
                f"got x.dtype={dtype}, {name}.dtype={vector.dtype}"
            )
    check_same_device("batch_norm", x, *given)


def _images(x: Any) -> Any:
    """Return the array x (N, C, ...) as (N, C, pixels, 1), which the kernels take."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)


def _channel_axes(x: Any) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _by_channel(vector: Any, ndim: int) -> Any:
    """Return a vector (C,) in a shape that broadcasts along axis 1 of `ndim` axes."""
    return reshape(vector, (1, vector.shape[0], *(1,) * (ndim - 2)))


# ---- statistics in operations --------------------------------------------------------------------


def _standardize(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any]:
    """Return x with mean 0 and variance 1 over `axes`, and 1 / its standard deviation."""
    centred = x - mean(x, dim=axes, keepdim=True)
    inv_std = rsqrt(mean(centred * centred, dim=axes, keepdim=True) + eps)
    return centred * inv_std, inv_std


def _standardize_grad(grad: Any, normal: Any, inv_std: Any, axes: tuple[int, ...]) -> Any:
    # y = (x - mean) * inv_std has dx = inv_std * (dy - mean(dy) - y * mean(dy * y)).
    along = mean(grad * normal, dim=axes, keepdim=True)
    return inv_std * (grad - mean(grad, dim=axes, keepdim=True) - normal * along)


# ---- layer normalization -------------------------------------------------------------------------


@operation(label="NativeLayerNormBackward0", keeps=("mean", "inv_std"))
def _layer_norm(x, weight, bias, *, axes, eps):
    if kernels.has_row_kernels(x):
        out, *kept = kernels.layer_norm(_as_rows(x, axes), _flat(weight), _flat(bias), eps)
        shape = (*x.shape[: axes[0]], *(1,) * len(axes))
        return out.reshape(x.shape), *(vector.reshape(shape) for vector in kept)
    wide = x.astype(sum_dtype(x.dtype), copy=False)
    mean = wide.mean(axis=axes, keepdims=True)
    out = wide - mean
    inv_std = 1 / array_module(x).sqrt((out * out).mean(axis=axes, keepdims=True) + eps)
    out *= inv_std
    if weight is not None:
        out *= weight
    if bias is not None:
        out += bias
    return narrowed(out, x.dtype), mean, inv_std


def _layer_norm_parts(x: Any, mean: Any, inv_std: Any, axes: tuple[int, ...], eps: float) -> Any:
    """Return normalized x and 1 / standard deviation: from what forward kept, or recorded anew."""
    if isinstance(x, Variable):
        return _standardize(x, axes, eps)
    return (x - mean) * inv_std, inv_std


def _layer_norm_grad(
    grad: Any,
    wanted: Any,
    x: Any,
    weight: Any,
    mean: Any,
    inv_std: Any,
    axes: tuple[int, ...],
    eps: float,
) -> Any:
    """Return the gradients by x, weight and bias."""
    shape = x.shape[axes[0] :]
    if not isinstance(grad, Variable) and kernels.has_row_kernels(x):
        vectors = _flat(weight), _flat(mean), _flat(inv_std)
        rows, wants_vectors = (_as_rows(grad, axes), _as_rows(x, axes)), wanted[1] or wanted[2]
        by_x, *others = kernels.layer_norm_grad(*rows, *vectors, wants_vectors)
        return by_x.reshape(x.shape), *(None if v is None else v.reshape(shape) for v in others)
    normal, inv_std = _layer_norm_parts(x, mean, inv_std, axes, eps)
    by_x = by_weight = by_bias = None
    if wanted[0]:
        weighted = grad if weight is None else grad * weight
        by_x = narrowed(_standardize_grad(weighted, normal, inv_std, axes), x.dtype)
    if wanted[1]:
        by_weight = narrowed(sum_to_shape(grad * normal, shape=shape), x.dtype)
    if wanted[2]:
        by_bias = sum_to_shape(grad, shape=shape)
    return by_x, by_weight, by_bias


def _as_rows(x: Any, axes: tuple[int, ...]) -> Any:
    """Return an array (rows, length) of one that is not empty, whose last `axes` make a row."""
    return x.reshape(-1, math.prod(x.shape[axes[0] :]))


def _flat(vector: Any) -> Any:
    return None if vector is None else vector.reshape(-1)


_layer_norm.joint_pullback(_layer_norm_grad)


def layer_norm(
    x: Any,
    normalized_shape: int | Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    """Return x with mean 0 and variance 1 over its last axes, times weight, plus bias.

    normalized_shape is the shape of these axes and of weight and bias, each of which may be None.
    Ba, Kiros and Hinton, arXiv:1607.06450.
    Raises ValueError if the shapes do not fit, TypeError unless all are of one floating dtype.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if autocast_mode.dtype is not None:
        x, weight, bias = raised(x), raised(weight), raised(bias)
    given = {"x": x, "weight": weight, "bias": bias}
    given = {name: value for name, value in given.items() if value is not None}
    if not is_floating_point(x.dtype) or any(value.dtype != x.dtype for value in given.values()):
        got = ", ".join(f"{name}.dtype={value.dtype}" for name, value in given.items())
        raise TypeError(f"layer_norm: all inputs must be of one floating point dtype; got {got}")
    if (
        not shape
        or any(tuple(value.shape[-len(shape) :]) != shape for value in given.values())
        or any(value.ndim != len(shape) for name, value in given.items() if name != "x")
    ):
        got = ", ".join(f"{name}.shape={tuple(value.shape)}" for name, value in given.items())
        raise ValueError(
            "layer_norm: x must end with normalized_shape, and weight and bias have it "
            "(x.shape[-k:] == weight.shape == normalized_shape); "
            f"got {got}, normalized_shape={shape}"
        )
    return _layer_norm(x, weight, bias, axes=tuple(range(-len(shape), 0)), eps=eps)
