"""Losses: how far a prediction is from its target, as one number or one for each element."""

from __future__ import annotations

import builtins
import warnings
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module, check_same_device, on_device_of
from gradengine.dtypes import is_floating_point, narrowed, sum_dtype
from gradengine.elementwise import elementwise
from gradengine.operation import array_of, operation
from gradengine.ops.activation import hardtanh, log_softmax, logsigmoid, softmax
from gradengine.ops.conversion import kept_for_backward, to_dtype
from gradengine.ops.elementwise import abs, square, where
from gradengine.ops.reduction import mean, sum
from gradengine.ops.shape import reshape, unsqueeze
from gradengine.precision import raised
from gradengine.tape import Variable

# ---- classes -------------------------------------------------------------------------------------


@operation(label="NllLossBackward0")
def _nll_loss(x, *, target, scale, divisor):
    """Return -x[target] * scale along the class axis; with a divisor, their sum divided by it."""
    xp = array_module(x)
    axis = min(1, x.ndim - 1)
    picked = xp.take_along_axis(x, xp.expand_dims(target, axis), axis=axis).squeeze(axis)
    with np.errstate(invalid="ignore"):  # -inf * 0 of a score that is not used, 0 / 0 where none is
        loss = narrowed(xp.where(scale != 0, picked * -scale, xp.zeros((), x.dtype)), x.dtype)
        return loss if divisor is None else _over(loss, divisor)


def _over(loss: Any, divisor: Any) -> Any:
    """Return the sum of an array divided by a number, in the array's dtype."""
    return narrowed(loss.sum(dtype=sum_dtype(loss.dtype)) / divisor, loss.dtype)


@operation(label="NllLossBackwardBackward0")
def _nll_loss_grad(grad, *, target, scale, divisor, shape):
    """Spread grad over zeros of `shape`, the adjoint of `_nll_loss`."""
    xp = array_module(grad)
    axis = min(1, len(shape) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weighted = grad * -scale if divisor is None else grad / divisor * -scale
    weighted = xp.where(scale != 0, weighted, xp.zeros((), grad.dtype)).astype(
        grad.dtype, copy=False
    )
    out = xp.zeros(shape, grad.dtype)
    xp.put_along_axis(out, xp.expand_dims(target, axis), xp.expand_dims(weighted, axis), axis)
    return out


_nll_loss.pullbacks(
    x=lambda grad, x_shape, target, scale, divisor: _nll_loss_grad(
        grad, target=target, scale=scale, divisor=divisor, shape=x_shape
    )
)
_nll_loss_grad.pullbacks(
    grad=lambda x, target, scale, divisor: _nll_loss(x, target=target, scale=scale, divisor=divisor)
)


@operation(label="NllLossBackward0", keeps=("shifts",))
def _softmax_nll_loss(x, *, target, scale, divisor):
    """Return `_nll_loss` of x's log_softmax along the class axis, which is made nowhere."""
    xp = array_module(x)
    losses, shifts = kernels.softmax_cross_entropy(_rows(x), target.reshape(-1))
    with np.errstate(invalid="ignore"):
        loss = losses.reshape(target.shape) * scale
        loss = narrowed(xp.where(scale != 0, loss, xp.zeros((), x.dtype)), x.dtype)
        return loss if divisor is None else _over(loss, divisor), shifts


def _softmax_nll_loss_grad(
    grad: Any, x: Any, shifts: Any, target: Any, scale: Any, divisor: Any
) -> Any:
    # (softmax(x) - onehot(target)) * weighted, which is minus nll_loss's gradient summed up
    with np.errstate(divide="ignore", invalid="ignore"):
        weighted = grad * scale if divisor is None else grad / divisor * scale
    axis = min(1, x.ndim - 1)
    xp = array_module(scale)
    if isinstance(grad, Variable):
        weighted = where(scale != 0, weighted, 0.0)
        shape = (1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1)
        hits = xp.arange(x.shape[axis]).reshape(shape) == xp.expand_dims(target, axis)
        return (softmax(x, axis) - hits.astype(scale.dtype)) * unsqueeze(weighted, axis)
    weighted = (
        xp.where(scale != 0, weighted, xp.zeros((), x.dtype))
        .reshape(-1)
        .astype(x.dtype, copy=False)
    )
    found = kernels.softmax_cross_entropy_grad(weighted, _rows(x), target.reshape(-1), shifts)
    if x.ndim == 2:
        return found
    return xp.moveaxis(found.reshape(*target.shape, x.shape[axis]), target.ndim, axis)


def _rows(x: Any) -> Any:
    """Return an array of scores (N, C), (C,) or (N, C, ...) with classes last, as (rows, C)."""
    if x.ndim == 2:
        return x
    axis = min(1, x.ndim - 1)
    return array_module(x).moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


_softmax_nll_loss.pullbacks(x=_softmax_nll_loss_grad)


def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Any:
    """Return -input[target], for log-probabilities input (N, C), (C,) or (N, C, ...).

    target holds class numbers in input's shape without C. weight (C,) weighs by class; targets
    equal to ignore_index count for nothing. reduction "mean" divides the sum by the sum of weights
    counted (nan if there are none), "sum" does not, "none" gives target's shape.
    Raises IndexError for a target that is no class (on CUDA its loss is nan: a check would wait for
    the GPU), ValueError if the shapes do not fit, TypeError unless input is floating point and
    target integer.
    """
    if autocast_mode.dtype is not None:
        input, weight = raised(input), raised(weight)
    target, scale = _class_scale("nll_loss", input, target, weight, ignore_index)
    return _nll_loss(
        input, target=target, scale=scale, divisor=_divisor("nll_loss", scale, reduction)
    )


def _divisor(name: str, scale: Any, reduction: str) -> Any:
    _check_reduction(name, reduction)
    if reduction == "none":
        return None
    return scale.sum(dtype=sum_dtype(scale.dtype)) if reduction == "mean" else 1


def _class_scale(
    name: str, input: Any, target: Any, weight: Any, ignore_index: int
) -> tuple[Any, Any]:
    """Return target, with class 0 where ignored, and its elements' weights."""
    if getattr(weight, "requires_grad", False):
        raise RuntimeError(
            f"{name}: weight has no derivative, so it must not require grad; pass weight.detach()"
        )
    target, weight = array_of(target), array_of(weight)
    _check_classes(name, input, target, weight)
    classes = input.shape[min(1, input.ndim - 1)]
    if type(target) is np.ndarray:
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if wrong.any():
            raise IndexError(
                f"{name}: Target {target[wrong].flat[0]} is out of bounds (0 <= target < classes); "
                f"got input.shape={tuple(input.shape)}"
            )
    with on_device_of(target):
        return kernels.class_scale(target, weight, ignore_index, classes, input.dtype)


def _check_classes(name: str, input: Any, target: Any, weight: Any) -> None:
    check_same_device(name, *[x for x in (array_of(input), target, weight) if x is not None])
    if not is_floating_point(input.dtype) or target.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: input must be floating point and target integer class numbers; "
            f"got input.dtype={input.dtype}, target.dtype={target.dtype}"
        )
    if weight is not None and weight.dtype != input.dtype:
        raise TypeError(
            f"{name}: weight must have input's dtype (weight.dtype == input.dtype); "
            f"got input.dtype={input.dtype}, weight.dtype={weight.dtype}"
        )
    shape = tuple(input.shape)
    if not shape or target.shape != (shape[:1] if len(shape) > 1 else ()) + shape[2:]:
        raise ValueError(
            f"{name}: target must have input's shape without the classes "
            "(target.shape == input.shape[:1] + input.shape[2:]); "
            f"got input.shape={shape}, target.shape={target.shape}"
        )
    if weight is not None and weight.shape != shape[:2][-1:]:
        raise ValueError(
            f"{name}: weight must have one element for each class (weight.shape == (classes,)); "
            f"got input.shape={shape}, weight.shape={weight.shape}"
        )


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Return the cross entropy of softmax(input) and target, for (N, C), (C,) or (N, C, ...).

    target holds class numbers as in `nll_loss`, with its weight, ignore_index, reduction, errors;
    or probabilities, floating point in input's shape ("mean" is then over all but C).
    label_smoothing is the share of each target that is spread evenly over the classes. Class
    numbers without smoothing make one node, NllLossBackward0, which softmax is a part of, unless a
    pixel's scores lie apart in memory.
    Raises ValueError unless 0 <= label_smoothing <= 1.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            "cross_entropy: label_smoothing must be a share (0 <= label_smoothing <= 1); "
            f"got label_smoothing={label_smoothing}"
        )
    _check_reduction("cross_entropy", reduction)
    if autocast_mode.dtype is not None:
        input, target, weight = raised(input), raised(target), raised(weight)
    axis = min(1, input.ndim - 1)
    probabilities = is_floating_point(target.dtype)
    fused = not probabilities and label_smoothing == 0 and _has_kernel(input)
    scores = input if fused else log_softmax(input, axis)
    if probabilities:
        return _soft_cross_entropy(scores, target, weight, reduction, label_smoothing)
    ignored = array_of(target) == ignore_index if label_smoothing else None
    target, scale = _class_scale("cross_entropy", scores, target, weight, ignore_index)
    divisor = _divisor("cross_entropy", scale, reduction)
    apply = _softmax_nll_loss if fused else _nll_loss
    loss = apply(scores, target=target, scale=scale, divisor=divisor)
    if label_smoothing == 0:
        return loss
    even = where(ignored, 0.0, -sum(_weighed(scores, weight), dim=axis))
    if divisor is not None:
        even = to_dtype(sum(even) / divisor, scores.dtype)  # of 16-bit scores divisor is float32
    return loss * (1 - label_smoothing) + even * (label_smoothing / scores.shape[axis])


def _has_kernel(input: Any) -> bool:
    array = array_of(input)
    if not is_floating_point(array.dtype) or array.size == 0:
        return False
    if array_module(array) is not np:
        return True
    # Elsewhere in memory the rows would be copied together first, which costs more than is gained.
    together = array.ndim <= 2 or np.moveaxis(array, 1, -1).flags.c_contiguous
    return together and array.dtype in (np.float32, np.float64)


def _soft_cross_entropy(
    scores: Any, target: Any, weight: Any, reduction: str, label_smoothing: float
) -> Any:
    if target.shape != scores.shape:
        raise ValueError(
            "cross_entropy: target probabilities must have input's shape "
            "(target.shape == input.shape); "
            f"got input.shape={tuple(scores.shape)}, target.shape={tuple(target.shape)}"
        )
    axis = min(1, scores.ndim - 1)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / scores.shape[axis]
    return _reduced(-sum(_weighed(scores, weight) * target, dim=axis), reduction)


def _weighed(scores: Any, weight: Any) -> Any:
    """Return scores times the weights of their classes."""
    if weight is None:
        return scores
    weight = kept_for_backward(weight, scores)
    return scores * reshape(weight, (-1, *(1,) * max(0, scores.ndim - 2)))


# ---- numbers -------------------------------------------------------------------------------------


def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """Return the squared difference of input and target.

    reduction is "mean", "sum" or "none" (elementwise), ValueError for any other. Unequal shapes are
    broadcast, with a UserWarning.
    """
    difference = _difference("mse_loss", input, target, reduction)
    return _reduced(square(difference), reduction)


def l1_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """Return |input - target|; shapes, reduction and errors as in `mse_loss`."""
    return _reduced(abs(_difference("l1_loss", input, target, reduction)), reduction)


@elementwise(floating=True)
def _huber(x, *, bound):
    """Return x * x / 2 where |x| <= bound, and bound * (|x| - bound / 2) elsewhere."""
    distance = builtins.abs(x)
    near = array_module(x).minimum(distance, bound)  # of what lies far, the square may overflow
    return near * (distance - 0.5 * near)


_huber.pullbacks(x=lambda grad, x, bound: grad * hardtanh(x, -bound, bound))


def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: float = 1.0) -> Any:
    """Return d * d / (2 * beta) where d = |input - target| < beta, and d - beta / 2 elsewhere.

    Shapes, reduction and errors as in `mse_loss`; ValueError also for a negative beta. With beta 0
    it is `l1_loss`.
    """
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta must not be negative (beta >= 0); got beta={beta}")
    if beta == 0:
        return l1_loss(input, target, reduction)
    distance = _difference("smooth_l1_loss", input, target, reduction)
    return _reduced(_huber(distance, bound=beta) / beta, reduction)


def huber_loss(input: Any, target: Any, reduction: str = "mean", delta: float = 1.0) -> Any:
    """Return d * d / 2 where d = |input - target| <= delta, and delta * (d - delta / 2) elsewhere.

    Shapes, reduction and errors as in `mse_loss`; ValueError also unless delta > 0.
    """
    if delta <= 0:
        raise ValueError(f"huber_loss: delta must be positive (delta > 0); got delta={delta}")
    distance = _difference("huber_loss", input, target, reduction)
    return _reduced(_huber(distance, bound=delta), reduction)


def binary_cross_entropy_with_logits(
    input: Any,
    target: Any,
    weight: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Any:
    """Return the cross entropy of probabilities sigmoid(input) and target, both of one shape.

    weight, broadcast to it, weighs the elements, pos_weight the positive share of each. reduction
    as in `mse_loss`. Raises ValueError if the shapes differ.
    """
    _check_reduction("binary_cross_entropy_with_logits", reduction)
    if input.shape != target.shape:
        raise ValueError(
            "binary_cross_entropy_with_logits: Target size must be the same as input size "
            f"(target.shape == input.shape); got input.shape={tuple(input.shape)}, "
            f"target.shape={tuple(target.shape)}"
        )
    if autocast_mode.dtype is not None:
        input, target = raised(input), raised(target)
        weight, pos_weight = raised(weight), raised(pos_weight)
    positive = logsigmoid(input)
    if pos_weight is not None:
        positive = positive * (1 + (pos_weight - 1) * target)
    loss = (1 - target) * input - positive
    return _reduced(loss if weight is None else loss * weight, reduction)


def _difference(name: str, input: Any, target: Any, reduction: str) -> Any:
    _check_reduction(name, reduction)
    if input.shape != target.shape:
        warnings.warn(
            f"{name}: Using a target size {tuple(target.shape)} that is different to the input "
            f"size {tuple(input.shape)}; they are broadcast, which is seldom what is meant",
            UserWarning,
            stacklevel=3,
        )
    if autocast_mode.dtype is not None:
        input, target = raised(input), raised(target)
    return input - target


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"{name}: reduction must be 'mean', 'sum' or 'none'; got reduction={reduction!r}"
        )


def _reduced(loss: Any, reduction: str) -> Any:
    if reduction == "none":
        return loss
    return mean(loss) if reduction == "mean" else sum(loss)
