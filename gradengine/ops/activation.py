"""Activations: rectifiers and their smooth relatives, softmax, dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module
from gradengine.dtypes import bool_, is_floating_point, narrowed, sum_dtype
from gradengine.elementwise import elementwise
from gradengine.operation import array_of, by_kernel, operation
from gradengine.ops import random
from gradengine.ops.dims import normalized_dim
from gradengine.ops.elementwise import clamp, erf, exp, sigmoid, tanh, where
from gradengine.ops.reduction import sum
from gradengine.precision import raised
from gradengine.tape import Variable

# ---- rectifiers ----------------------------------------------------------------------------------


@elementwise(kernel=True)
def relu(x):
    """Return max(x, 0); nan stays nan. The derivative at 0 is 0."""
    return array_module(x).maximum(x, 0)


@elementwise(label="ThresholdBackward0")
def _relu_grad(grad, *, gate):
    return kernels.relu_grad(grad, gate)


relu.pullbacks(x=lambda grad, out: _relu_grad(grad, gate=array_of(out)))
_relu_grad.pullbacks(grad=lambda grad, gate: _relu_grad(grad, gate=gate))


@elementwise(floating=True)
def _hardtanh(x, *, min, max):
    return array_module(x).clip(x, min, max)


_hardtanh.pullbacks(x=lambda grad, x, min, max: where((x <= min) | (x >= max), 0.0, grad))


def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """Return x confined to [min_val, max_val]; the derivative at the bounds is 0, unlike `clamp`'s.

    Integers take the bounds without their fractions. Raises ValueError unless min_val <= max_val,
    TypeError for bools.
    """
    if not min_val <= max_val:
        raise ValueError(
            "hardtanh: bounds must be in order (min_val <= max_val); "
            f"got min_val={min_val}, max_val={max_val}"
        )
    if x.dtype == bool_:
        raise TypeError("hardtanh: not defined for bools (x.dtype != bool); got x.dtype=bool")
    if not is_floating_point(x.dtype):
        return clamp(x, math.trunc(min_val), math.trunc(max_val))
    return _hardtanh(x, min=min_val, max=max_val)


def relu6(x: Any) -> Any:
    """Return min(max(x, 0), 6); the derivative at 0 and at 6 is 0."""
    return hardtanh(x, 0.0, 6.0)


@elementwise(floating=True, label="LeakyReluBackward0")
def _leaky_relu(x, *, slope):
    return array_module(x).where(x > 0, x, x * slope)


_leaky_relu.pullbacks(x=lambda grad, x, slope: where(x > 0, grad, grad * slope))


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    """Return x where it is positive and negative_slope * x elsewhere, and so its derivative."""
    return _leaky_relu(x, slope=negative_slope)


# ---- smooth relatives ----------------------------------------------------------------------------


@elementwise(floating=True, label="EluBackward0")
def _elu(x, *, alpha):
    xp = array_module(x)
    return xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0)))


def _elu_grad(grad: Any, x: Any, alpha: float) -> Any:
    negative = where(x > 0, 0.0, x)  # exp of a large x would overflow, and inf * 0 is nan
    return where(x > 0, grad, grad * (alpha * exp(negative)))


_elu.pullbacks(x=_elu_grad)


def elu(x: Any, alpha: float = 1.0) -> Any:
    """Return x where it is positive and alpha * (exp(x) - 1) elsewhere."""
    return _elu(x, alpha=alpha)


@elementwise(floating=True, label="GeluBackward0", kernel=True)
def _gelu(x):
    return x * (0.5 * (1 + erf.operation.forward(x * math.sqrt(0.5))))


@elementwise(floating=True, label="GeluBackward0", kernel=True)
def _gelu_tanh(x):
    return 0.5 * x * (1 + array_module(x).tanh(_gelu_inner(x)))


def _gelu_inner(x: Any) -> Any:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))


def _gelu_grad(grad: Any, x: Any) -> Any:
    below = 0.5 * (
        1 + erf(x * math.sqrt(0.5))
    )  # the normal distribution's function, then its density
    return grad * (below + x * (exp(-0.5 * (x * x)) / math.sqrt(2 * math.pi)))


def _gelu_tanh_grad(grad: Any, x: Any) -> Any:
    curve = tanh(_gelu_inner(x))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * (x * x))
    return grad * (0.5 * (1 + curve) + 0.5 * x * ((1 - curve * curve) * slope))


_gelu.pullbacks(x=by_kernel("gelu_grad", _gelu_grad))
_gelu_tanh.pullbacks(x=by_kernel("gelu_tanh_grad", _gelu_tanh_grad))


def gelu(x: Any, approximate: str = "none") -> Any:
    """Return x times the normal distribution function at x: exact, or approximated by "tanh".

    Raises ValueError unless approximate is "none" or "tanh". See arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu: approximate must be 'none' or 'tanh'; got approximate={approximate!r}"
        )
    return _gelu(x) if approximate == "none" else _gelu_tanh(x)


@elementwise(floating=True, kernel=True)
def silu(x):
    """Return x * sigmoid(x)."""
    return x * sigmoid.operation.forward(x)


def _silu_grad(grad: Any, x: Any) -> Any:
    share = sigmoid(x)
    return grad * (share * (1 + x * (1 - share)))


silu.pullbacks(x=by_kernel("silu_grad", _silu_grad))


@elementwise(floating=True, needs_range=True, label="SoftplusBackward0")
def _softplus(x, *, beta, threshold):
    xp = array_module(x)
    scaled = x * beta
    curved = xp.log1p(xp.exp(xp.minimum(scaled, threshold))) / beta
    return xp.where(scaled > threshold, x, curved)


_softplus.pullbacks(
    x=lambda grad, x, beta, threshold: where(x * beta > threshold, grad, grad * sigmoid(x * beta))
)


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """Return log(1 + exp(beta * x)) / beta, and x itself where beta * x > threshold."""
    return _softplus(x, beta=beta, threshold=threshold)


@elementwise(floating=True, label="LogSigmoidBackward0")
def logsigmoid(x):
    """Return log(1 / (1 + exp(-x))), without overflow."""
    xp = array_module(x)
    return xp.minimum(x, 0) - xp.log1p(xp.exp(-abs(x)))


logsigmoid.pullbacks(x=lambda grad, x: grad * sigmoid(-x))


# ---- softmax -------------------------------------------------------------------------------------


@operation(label="SoftmaxBackward0")
def _softmax(x, *, dim):
    if x.ndim == 0:
        return _softmax.operation.forward(x.reshape(1), dim=dim).reshape(())
    if _has_kernel(x, dim):
        return _along_rows(kernels.softmax, dim, x)
    out = array_module(x).exp(_below_maximum(x.astype(sum_dtype(x.dtype), copy=False), dim))
    out /= out.sum(axis=dim, keepdims=True)
    return narrowed(out, x.dtype)


@operation(label="LogSoftmaxBackward0")
def _log_softmax(x, *, dim):
    if x.ndim == 0:
        return _log_softmax.operation.forward(x.reshape(1), dim=dim).reshape(())
    if _has_kernel(x, dim):
        return _along_rows(kernels.log_softmax, dim, x)
    xp = array_module(x)
    out = _below_maximum(x.astype(sum_dtype(x.dtype), copy=False), dim)
    if out.size:  # the sum of nothing is 0, whose logarithm NumPy warns of
        out -= xp.log(xp.exp(out).sum(axis=dim, keepdims=True))
    return narrowed(out, x.dtype)


def _below_maximum(x: Any, dim: int) -> Any:
    """Return x minus its maximum along `dim`, so that exp cannot overflow."""
    if x.size == 0:
        return x.copy()
    with np.errstate(
        invalid="ignore"
    ):  # inf - inf: a row of -inf, or with inf, is nan as in PyTorch
        return x - x.max(axis=dim, keepdims=True)


def _has_kernel(x: Any, dim: int) -> bool:
    """Whether kernels go along `dim` of an array: along rows that lie together in memory."""
    return kernels.has_row_kernels(x) and x.strides[dim] == x.itemsize


def _along_rows(kernel: Any, dim: int, *arrays: Any) -> Any:
    """Give what a kernel of rows makes of arrays whose rows lie along `dim`."""
    if dim == arrays[0].ndim - 1:
        return kernel(*arrays)
    xp = array_module(arrays[0])
    return xp.moveaxis(kernel(*(xp.moveaxis(x, dim, -1) for x in arrays)), -1, dim)


def _softmax_grad(grad: Any, out: Any, dim: int) -> Any:
    if not isinstance(grad, Variable) and _has_kernel(out, dim):
        return _along_rows(kernels.softmax_grad, dim, grad, out)
    weighted = grad * out
    return weighted - out * sum(weighted, dim=dim, keepdim=True)


def _log_softmax_grad(grad: Any, out: Any, dim: int) -> Any:
    if not isinstance(grad, Variable) and _has_kernel(out, dim):
        return _along_rows(kernels.log_softmax_grad, dim, grad, out)
    return grad - exp(out) * sum(grad, dim=dim, keepdim=True)


_softmax.pullbacks(x=_softmax_grad)
_log_softmax.pullbacks(x=_log_softmax_grad)


def softmax(x: Any, dim: int) -> Any:
    """Return exp(x) / sum of exp(x) along `dim`, without overflow; a row of -inf gives nan.

    Raises TypeError unless x is floating point, IndexError if there is no such dim.
    """
    if autocast_mode.dtype is not None:
        x = raised(x)
    return _softmax(x, dim=_checked_dim("softmax", x, dim))


def log_softmax(x: Any, dim: int) -> Any:
    """Return the logarithm of `softmax`, exact also where softmax itself would round to 0.

    Raises TypeError unless x is floating point, IndexError if there is no such dim.
    """
    if autocast_mode.dtype is not None:
        x = raised(x)
    return _log_softmax(x, dim=_checked_dim("log_softmax", x, dim))


def _checked_dim(name: str, x: Any, dim: int) -> int:
    if not is_floating_point(x.dtype):
        raise TypeError(
            f"{name}: x must be floating point (x.is_floating_point()); got x.dtype={x.dtype}"
        )
    return normalized_dim(name, dim, max(x.ndim, 1))  # a number is a row of one


# ---- dropout -------------------------------------------------------------------------------------


@operation(label="MulBackward0")
def _mask_and_scale(x, *, mask, scale):
    out = x * mask
    out *= scale
    return out


_mask_and_scale.pullbacks(x=lambda grad, mask, scale: _mask_and_scale(grad, mask=mask, scale=scale))


def dropout(x: Any, p: float = 0.5, training: bool = True) -> Any:
    """Return x with each element zeroed with probability p and the others divided by 1 - p.

    Returns x itself when not training. Raises ValueError unless 0 <= p <= 1, TypeError unless x is
    floating point. Srivastava et al., JMLR 15 (2014).
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be a probability (0 <= p <= 1); got p={p}")
    if not is_floating_point(x.dtype):
        raise TypeError(
            f"dropout: x must be floating point (x.is_floating_point()); got x.dtype={x.dtype}"
        )
    if not training or p == 0:
        return x
    mask = random.bernoulli_mask(x.shape, 1 - p, like=array_of(x))
    return _mask_and_scale(x, mask=mask, scale=0.0 if p == 1 else 1 / (1 - p))
