"""Reductions: sums, means, extremes, products, norms, and sums along a dim.

`dim` is an int, a tuple of ints, or None for all dims; `keepdim` keeps reduced dims with size 1.
"""

from __future__ import annotations

import builtins
import math
import warnings
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module
from gradengine.dtypes import get_default_dtype, is_floating_point, narrowed, sum_dtype, widened
from gradengine.operation import cast, operation
from gradengine.ops.conversion import to_dtype
from gradengine.ops.dims import normalized_dim, normalized_dims, numpy_spelled
from gradengine.ops.elementwise import exp, maximum, minimum, pow, sign, where
from gradengine.ops.indexing import ValuesIndices, pick_along
from gradengine.ops.joining import slices, stack
from gradengine.ops.padding import pad
from gradengine.ops.shape import flip, permute, reshape, unsqueeze
from gradengine.precision import raised

# ---- dims ----------------------------------------------------------------------------------------

Dims = tuple[int, ...] | None  # counted from the front; None: all


def _reduced_dims(name: str, dim: Any, ndim: int) -> Dims:
    return None if dim is None else normalized_dims(name, dim, ndim) or None


def _count(shape: tuple[int, ...], dim: Dims) -> int:
    """Return how many elements each reduction is over."""
    return math.prod(shape if dim is None else [shape[one] for one in dim])


def _kept_shape(shape: tuple[int, ...], dim: Dims) -> tuple[int, ...]:
    """Return the shape with the reduced dims as 1."""
    if dim is None:
        return (1,) * len(shape)
    return tuple([1 if axis in dim else size for axis, size in enumerate(shape)])


def _check_float(name: str, x: Any) -> None:
    if not is_floating_point(x.dtype):
        raise TypeError(
            f"{name}: x must have a floating point dtype (x.is_floating_point()); "
            f"got x.dtype={x.dtype}, convert it with x.float()"
        )


def _check_not_empty(name: str, x: Any, dim: Dims) -> None:
    if _count(x.shape, dim) == 0:
        raise ValueError(
            f"{name}: the reduced dims must have non-zero size; "
            f"got dim={dim}, x.shape={tuple(x.shape)}"
        )


# ---- sums and means ------------------------------------------------------------------------------


def _total(x: Any, dim: Dims, keepdim: bool) -> Any:
    """Return the sum of an array over dims: of 16 bits in float32, else in its dtype."""
    total = None
    if x.size >= kernels.PARALLEL_SIZE:
        total = kernels.sum_over(x, range(x.ndim) if dim is None else dim)
    if total is None:
        return x.sum(axis=dim, keepdims=keepdim, dtype=sum_dtype(x.dtype))
    return total.reshape(_kept_shape(x.shape, dim)) if keepdim else total


@operation(label=lambda dim, keepdim: "SumBackward0" if dim is None else "SumBackward1")
def _sum(x, *, dim, keepdim):
    return narrowed(_total(x, dim, keepdim), x.dtype)


@operation(label="ExpandBackward0")
def _unreduce(x, *, dim, shape):
    """Expand what was reduced over `dim`, with these dims kept or not, to `shape` again."""
    return array_module(x).broadcast_to(x.reshape(_kept_shape(shape, dim)), shape)


_sum.pullbacks(x=lambda grad, x_shape, dim: _unreduce(grad, dim=dim, shape=x_shape))
_unreduce.pullbacks(
    x=lambda grad, x_shape, dim: reshape(_sum(grad, dim=dim, keepdim=False), x_shape)
)


@numpy_spelled
def sum(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """Return the sum over `dim`, int64 for integers and bools; `dtype` converts x first."""
    if dtype is None:
        if autocast_mode.dtype is not None:
            x = raised(x)
        return _sum(x, dim=_reduced_dims("sum", dim, x.ndim), keepdim=keepdim)
    x = to_dtype(x, dtype)
    return to_dtype(_sum(x, dim=_reduced_dims("sum", dim, x.ndim), keepdim=keepdim), x.dtype)


@operation(label=lambda dim, keepdim: "MeanBackward0" if dim is None else "MeanBackward1")
def _mean(x, *, dim, keepdim):
    total = _total(x, dim, keepdim)
    # The mean of nothing is nan, without NumPy's warning.
    return narrowed(total / (_count(x.shape, dim) or math.nan), x.dtype)


_mean.pullbacks(
    x=lambda grad, x_shape, dim: _unreduce(
        grad / (_count(x_shape, dim) or math.nan), dim=dim, shape=x_shape
    )
)


@numpy_spelled
def mean(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """Return the mean over `dim`; `dtype` converts x first. TypeError unless x is floating."""
    if dtype is not None:
        x = to_dtype(x, dtype)
    _check_float("mean", x)
    return _mean(x, dim=_reduced_dims("mean", dim, x.ndim), keepdim=keepdim)


@operation
def _cumsum(x, *, dim, reverse):
    along = array_module(x).flip(x, dim) if reverse else x
    out = narrowed(widened(along).cumsum(axis=dim, dtype=sum_dtype(x.dtype)), x.dtype)
    return array_module(x).flip(out, dim) if reverse else out


_cumsum.pullbacks(x=lambda grad, dim, reverse: _cumsum(grad, dim=dim, reverse=not reverse))


@numpy_spelled
def cumsum(x: Any, dim: int, dtype: Any = None) -> Any:
    """Return running sums along `dim`, int64 for integers and bools; `dtype` converts x first."""
    if x.ndim == 0:
        return reshape(cumsum(reshape(x, (1,)), dim, dtype), ())
    if dtype is not None:
        x = to_dtype(x, dtype)
    elif autocast_mode.dtype is not None:
        x = raised(x)
    out = _cumsum(x, dim=normalized_dim("cumsum", dim, x.ndim), reverse=False)
    return out if dtype is None else to_dtype(out, dtype)


# ---- variance ------------------------------------------------------------------------------------


def _variance(x: Any, dim: Dims, correction: float, keepdim: bool) -> Any:
    """Return the variance of an array, in the dtype that sums are made in."""
    wide = sum_dtype(x.dtype)
    count = _count(x.shape, dim)
    centre = x.sum(axis=dim, keepdims=True, dtype=wide) / (count or math.nan)
    spread = x - centre
    total = (spread * spread).sum(axis=dim, keepdims=keepdim, dtype=wide)
    with np.errstate(divide="ignore", invalid="ignore"):  # no degrees of freedom: nan or inf
        return total / builtins.max(0, count - correction)


@operation
def _var(x, *, dim, correction, keepdim):
    return _variance(x, dim, correction, keepdim).astype(x.dtype)


@operation
def _std(x, *, dim, correction, keepdim):
    variance = _variance(x, dim, correction, keepdim)
    return array_module(x).sqrt(variance).astype(x.dtype)


def _var_gradient(grad: Any, x: Any, dim: Dims, correction: float) -> Any:
    freedom = _count(x.shape, dim) - correction
    scale = 2 / freedom if freedom > 0 else math.nan
    centred = x - _mean(x, dim=dim, keepdim=True)
    return _unreduce(grad * scale, dim=dim, shape=x.shape) * centred


def _std_gradient(grad: Any, x: Any, out: Any, dim: Dims, correction: float) -> Any:
    # Dividing by infinity where out is 0 makes the gradient 0 there.
    return _var_gradient(grad / (2 * where(out == 0, math.inf, out)), x, dim, correction)


_var.pullbacks(x=_var_gradient)
_std.pullbacks(x=_std_gradient)


def _degrees(name: str, x: Any, dim: Any, unbiased: bool, correction: float | None) -> Any:
    """Return the dims and the correction, after the checks that var and std share."""
    _check_float(name, x)
    if isinstance(dim, bool):  # PyTorch's var(x, unbiased)
        dim, unbiased = None, dim
    dims = _reduced_dims(name, dim, x.ndim)
    correction = int(unbiased) if correction is None else correction
    if correction >= _count(x.shape, dims):
        warnings.warn(
            f"{name}: degrees of freedom is <= 0, the result is nan or inf (correction < count); "
            f"got correction={correction}, count={_count(x.shape, dims)}",
            UserWarning,
            stacklevel=4,
        )
    return dims, correction


@numpy_spelled
def var(
    x: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """Return the variance over `dim`: squared distances from the mean, over count - correction.

    `correction` is 1, or 0 if not `unbiased`, unless it is given; a bool in place of `dim` is `unbiased`.
    Warns where the divisor is not positive. Raises TypeError unless x is floating.
    """
    dims, correction = _degrees("var", x, dim, unbiased, correction)
    return _var(x, dim=dims, correction=correction, keepdim=keepdim)


@numpy_spelled
def std(
    x: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """Return the square root of `var`; its derivative is 0 where the deviation is 0."""
    dims, correction = _degrees("std", x, dim, unbiased, correction)
    return _std(x, dim=dims, correction=correction, keepdim=keepdim)


# ---- extremes ------------------------------------------------------------------------------------


@operation(label=lambda dim, keepdim, label: label)
def _max(x, *, dim, keepdim, label):
    return x.max(axis=dim, keepdims=keepdim)


@operation(label=lambda dim, keepdim, label: label)
def _min(x, *, dim, keepdim, label):
    return x.min(axis=dim, keepdims=keepdim)


def _shared_by_ties(grad: Any, x: Any, out: Any, dim: Dims, keepdim: bool) -> Any:
    # The second test finds the nans that made the result nan; elsewhere there are none.
    winners = (x == _unreduce(out, dim=dim, shape=x.shape)) | (x != x)
    winners = cast(winners, dtype=x.dtype)
    share = grad / _sum(winners, dim=dim, keepdim=keepdim)
    return winners * _unreduce(share, dim=dim, shape=x.shape)


_max.pullbacks(x=_shared_by_ties)
_min.pullbacks(x=_shared_by_ties)


@operation
def _argmax(x, *, dim):
    return widened(x).argmax(axis=dim)


@operation
def _argmin(x, *, dim):
    return widened(x).argmin(axis=dim)


def _extremes(operations: tuple[Any, ...], x: Any, dim: Any, keepdim: bool) -> Any:
    """Do what max and min do; `operations` are for two tensors, for all dims, and for places."""
    pairwise, reduce, locate = operations
    name = pairwise.__name__.removesuffix("imum")
    if hasattr(dim, "dtype"):
        return pairwise(x, dim)
    if dim is None:
        _check_not_empty(name, x, None)
        return reduce(x, dim=None, keepdim=False, label=f"{name.capitalize()}Backward1")
    if x.ndim == 0:
        values, indices = _extremes(operations, reshape(x, (1,)), dim, False)
        return ValuesIndices(values, indices)
    dim = normalized_dim(name, dim, x.ndim)
    _check_not_empty(name, x, (dim,))
    indices = locate(x, dim=dim)
    values = pick_along(x, dim, indices, label=f"{name.capitalize()}Backward0")
    if keepdim:
        values, indices = unsqueeze(values, dim), unsqueeze(indices, dim)
    return ValuesIndices(values, indices)


@numpy_spelled
def max(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the largest element of x; with `dim`, an int, the pair (values, indices) along it.

    Of equal elements the first has the index and the gradient; without `dim` they share it.
    nan counts as largest. `max(x, other)` is `maximum`. Raises ValueError for no elements.
    """
    return _extremes((maximum, _max, _argmax), x, dim, keepdim)


@numpy_spelled
def min(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the smallest element of x; with `dim`, an int, the pair (values, indices) along it.

    Of equal elements the first has the index and the gradient; without `dim` they share it.
    nan counts as smallest. `min(x, other)` is `minimum`. Raises ValueError for no elements.
    """
    return _extremes((minimum, _min, _argmin), x, dim, keepdim)


@numpy_spelled
def amax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the largest elements over `dim`; equal ones share the gradient. ValueError if none."""
    dims = _reduced_dims("amax", dim, x.ndim)
    _check_not_empty("amax", x, dims)
    return _max(x, dim=dims, keepdim=keepdim, label="AmaxBackward0")


@numpy_spelled
def amin(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the smallest elements over `dim`; equal ones share the gradient. ValueError if none."""
    dims = _reduced_dims("amin", dim, x.ndim)
    _check_not_empty("amin", x, dims)
    return _min(x, dim=dims, keepdim=keepdim, label="AminBackward0")


def _place(name: str, locate: Any, x: Any, dim: int | None, keepdim: bool) -> Any:
    dims = None if dim is None else (normalized_dim(name, dim, builtins.max(x.ndim, 1)),)
    dims = dims if x.ndim else None
    _check_not_empty(name, x, dims)
    place = locate(x, dim=None if dims is None else dims[0])
    return reshape(place, _kept_shape(x.shape, dims)) if keepdim else place


@numpy_spelled
def argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """Return the int64 place of the first largest element along `dim`, or in x taken as flat."""
    return _place("argmax", _argmax, x, dim, keepdim)


@numpy_spelled
def argmin(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """Return the int64 place of the first smallest element along `dim`, or in x taken as flat."""
    return _place("argmin", _argmin, x, dim, keepdim)


# ---- truth ---------------------------------------------------------------------------------------


@operation
def _any(x, *, dim, keepdim):
    return x.any(axis=dim, keepdims=keepdim)


@operation
def _all(x, *, dim, keepdim):
    return x.all(axis=dim, keepdims=keepdim)


@operation
def _count_nonzero(x, *, dim):
    return (x != 0).sum(axis=dim, dtype=np.int64)


@numpy_spelled
def any(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return, as bool, whether any element over `dim` is nonzero."""
    return _any(x, dim=_reduced_dims("any", dim, x.ndim), keepdim=keepdim)


@numpy_spelled
def all(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Return, as bool, whether all elements over `dim` are nonzero."""
    return _all(x, dim=_reduced_dims("all", dim, x.ndim), keepdim=keepdim)


@numpy_spelled
def count_nonzero(x: Any, dim: Any = None) -> Any:
    """Return the number of nonzero elements over `dim`, as int64."""
    return _count_nonzero(x, dim=_reduced_dims("count_nonzero", dim, x.ndim))


# ---- products ------------------------------------------------------------------------------------


@operation(label=lambda dim, keepdim: "ProdBackward0" if dim is None else "ProdBackward1")
def _prod(x, *, dim, keepdim):
    return narrowed(x.prod(axis=dim, keepdims=keepdim, dtype=sum_dtype(x.dtype)), x.dtype)


def _prod_gradient(grad: Any, x: Any, dim: Dims) -> Any:
    """Multiply by the product of the other elements, found without division: some may be 0."""
    spread = _unreduce(grad, dim=dim, shape=x.shape)
    count = _count(x.shape, dim)
    if count < 2 or 0 in x.shape:
        return spread
    reduced = tuple(range(x.ndim)) if dim is None else dim
    order = (*(axis for axis in range(x.ndim) if axis not in reduced), *reduced)
    last = permute(x, order)
    others = _product_of_others(reshape(last, (*last.shape[: x.ndim - len(reduced)], count)))
    inverse = tuple(sorted(range(x.ndim), key=order.__getitem__))
    return spread * permute(reshape(others, last.shape), inverse)


def _product_of_others(x: Any) -> Any:
    """Return, for each place of the last dim, the product of the elements at its other places.

    A tree: pairs are multiplied, the products' others found likewise, and each element's others are
    those of its pair times its partner.
    """
    count = x.shape[-1]
    if count == 2:
        return flip(x, -1)
    if count % 2:
        x = pad(x, (0, 1), value=1)
    left = slices(x, index=(..., slice(0, None, 2)), label="SliceBackward0")
    right = slices(x, index=(..., slice(1, None, 2)), label="SliceBackward0")
    others = _product_of_others(left * right)
    both = reshape(stack([others * right, others * left], -1), x.shape)
    return slices(both, index=(..., slice(0, count)), label="SliceBackward0")


_prod.pullbacks(x=_prod_gradient)


@numpy_spelled
def prod(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """Return the product over `dim`, int64 for integers and bools; `dtype` converts x first."""
    if dtype is not None:
        x = to_dtype(x, dtype)
    elif autocast_mode.dtype is not None:
        x = raised(x)
    out = _prod(x, dim=_reduced_dims("prod", dim, x.ndim), keepdim=keepdim)
    return out if dtype is None else to_dtype(out, dtype)


# ---- logsumexp and norms -------------------------------------------------------------------------


@operation
def _logsumexp(x, *, dim, keepdim):
    xp, dtype, x = array_module(x), x.dtype, widened(x)
    with np.errstate(
        divide="ignore", over="ignore"
    ):  # log(0) is -inf, exp(large) beside inf is inf
        if _count(x.shape, dim) == 0:
            return xp.log(x.sum(axis=dim, keepdims=keepdim)).astype(dtype)
        largest = x.max(axis=dim, keepdims=True)
        shift = xp.where(xp.isfinite(largest), largest, 0)
        total = xp.exp(x - shift).sum(axis=dim, keepdims=keepdim, dtype=sum_dtype(x.dtype))
        return (xp.log(total) + shift.reshape(total.shape)).astype(dtype)


def _logsumexp_gradient(grad: Any, x: Any, out: Any, dim: Dims) -> Any:
    # Where all elements are -inf, so is the sum: every share is exp(-inf - 0), not exp(-inf + inf).
    finite = where(out == -math.inf, 0.0, out)
    shares = exp(x - _unreduce(finite, dim=dim, shape=x.shape))
    return shares * _unreduce(grad, dim=dim, shape=x.shape)


_logsumexp.pullbacks(x=_logsumexp_gradient)


@numpy_spelled
def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    """Return log(sum(exp(x))) over `dim` without overflow; -inf where all elements are -inf.

    Integers are converted to the default float.
    """
    if autocast_mode.dtype is not None:
        x = raised(x)
    x = x if is_floating_point(x.dtype) else cast(x, dtype=get_default_dtype())
    return _logsumexp(x, dim=_reduced_dims("logsumexp", dim, x.ndim), keepdim=keepdim)


@operation(label="LinalgVectorNormBackward0")
def _norm(x, *, p, dim, keepdim):
    wide = x.astype(sum_dtype(x.dtype), copy=False)
    if p == 0:
        return (x != 0).sum(axis=dim, keepdims=keepdim).astype(x.dtype)
    if p == 2:
        total = (wide * wide).sum(axis=dim, keepdims=keepdim)
        return array_module(x).sqrt(total).astype(x.dtype)
    with np.errstate(divide="ignore"):  # 0 ** p is inf for negative p
        return ((abs(wide) ** p).sum(axis=dim, keepdims=keepdim) ** (1 / p)).astype(x.dtype)


def _norm_gradient(grad: Any, x: Any, out: Any, p: float, dim: Dims) -> Any:
    """Return x |x|^(p-2) grad / out^(p-1), and 0 where x is 0, or everywhere for p = 0."""
    if p == 0:
        return _unreduce(grad * 0, dim=dim, shape=x.shape)
    if p == 2:
        return x * _unreduce(grad / where(out == 0, math.inf, out), dim=dim, shape=x.shape)
    power = pow(abs(where(x == 0, 1.0, x)), p - 1)
    scale = pow(where(out == 0, 1.0, out) if p > 1 else out, 1 - p)
    return sign(x) * power * _unreduce(grad * scale, dim=dim, shape=x.shape)


_norm.pullbacks(x=_norm_gradient)


@numpy_spelled
def norm(x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the p-norm of the elements over `dim`: (sum |x|^p)^(1/p), for matrices too.

    p is "fro" (2) or a number: inf and -inf give the largest and smallest |x|, 0 counts nonzero
    elements. The derivative at 0 is 0. Raises TypeError unless x is floating.
    """
    if autocast_mode.dtype is not None:
        x = raised(x)
    _check_float("norm", x)
    dims = _reduced_dims("norm", dim, x.ndim)
    if p == "fro":
        p = 2
    if not isinstance(p, int | float):
        raise ValueError(f'norm: p must be a number or "fro"; got p={p!r}')
    if p == math.inf:
        return amax(abs(x), dims, keepdim)
    if p == -math.inf:
        return amin(abs(x), dims, keepdim)
    if p < 0:
        _check_not_empty("norm", x, dims)
    if p == 1:
        return sum(abs(x), dims, keepdim)
    return _norm(x, p=p, dim=dims, keepdim=keepdim)
