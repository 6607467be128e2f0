"""Elementwise operations: arithmetic, rounding, powers, exponentials, trigonometry, selection."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module, on_device_of
from gradengine.dtypes import (
    bool_,
    float32,
    int64,
    is_floating_point,
    narrowed,
    result_type,
    widened,
)
from gradengine.elementwise import conform, elementwise
from gradengine.operation import array_of, by_kernel, cast, operation, sum_to_shape
from gradengine.ops.conversion import kept_for_backward
from gradengine.precision import raised
from gradengine.tape import Variable

# ---- arithmetic ----------------------------------------------------------------------------------


@elementwise(kernel=True)
def add(x, y):
    """Return x + y."""
    return x + y


@elementwise(kernel=True)
def sub(x, y):
    """Return x - y. Raises TypeError for two bools: use logical_xor or ^."""
    return x - y


@elementwise(label="RsubBackward1", kernel=True)
def rsub(x, y):
    """Return y - x."""
    return y - x


@elementwise(kernel=True)
def mul(x, y):
    """Return x * y."""
    return x * y


@elementwise(floating=True, kernel=True)
def div(x, y):
    """Return x / y; integers are divided as the default float."""
    return x / y


@elementwise
def floor_divide(x, y):
    """Return the floor of x / y, whose derivative is 0. RuntimeError for integers by 0, on the CPU."""
    return _divided("floor_divide", operator.floordiv, x, y)


@elementwise
def remainder(x, y):
    """Return x - y * floor(x / y), which has y's sign. RuntimeError for integers by 0, on the CPU."""
    return _divided("remainder", operator.mod, x, y)


def _divided(name: str, divide: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    """Divide, and refuse integers by 0, which NumPy only warns of; a GPU does not even know."""
    if is_floating_point((x if hasattr(x, "dtype") else y).dtype):
        return divide(x, y)
    with np.errstate(divide="raise"):
        try:
            return divide(x, y)
        except FloatingPointError:
            raise RuntimeError(f"{name}: integers cannot be divided by 0 (y != 0)") from None


@elementwise
def neg(x):
    """Return -x. Raises TypeError for bool: use ~x."""
    return -x


@elementwise
def abs(x):
    """Return |x|; the derivative at 0 is 0, and at nan nan."""
    return builtins.abs(x)


@elementwise
def sign(x):
    """Return -1, 0 or 1 by the sign of x, and nan for nan."""
    return x.copy() if x.dtype == bool_ else array_module(x).sign(x)


def scaled_add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    """Return x + alpha * y. Raises TypeError for a fractional alpha beside integers."""
    return add(x, _scaled("add", x, y, alpha))


def scaled_sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    """Return x - alpha * y. Raises TypeError for two bools (use logical_xor or ^), and as `add` does."""
    return sub(x, _scaled("sub", x, y, alpha))


def _scaled(name: str, x: Any, y: Any, alpha: float) -> Any:
    """Return alpha * y. Raises TypeError if that would make a sum of integers one of floats."""
    if alpha == 1:
        return y
    if isinstance(alpha, float) and not is_floating_point(result_type(x, y)):
        raise TypeError(
            f"{name}: alpha must be an integer beside integers (isinstance(alpha, int)); got alpha={alpha}"
        )
    return alpha * y


def quotient_of(x: Any, number: Any) -> Any:
    """Return number / x: what Python calls for a number on the left."""
    if autocast_mode.dtype is not None:
        x = raised(x)
    return div(number, x)


def rounded_div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    """Return x / y; integers are divided as the default float, unless the quotient is rounded.

    rounding_mode is None, "floor" (`floor_divide`) or "trunc" (towards 0, in the inputs' dtype).
    Raises ValueError for any other.
    """
    if rounding_mode is None:
        return div(x, y)
    if rounding_mode == "floor":
        return floor_divide(x, y)
    if rounding_mode != "trunc":
        raise ValueError(
            "div: rounding_mode must be None, 'floor' or 'trunc'; "
            f"got rounding_mode={rounding_mode!r}"
        )
    return _trunc_divide(x, y)


@elementwise
def _trunc_divide(x, y):
    array = x if hasattr(x, "dtype") else y
    xp = array_module(array)
    # Without the remainder the division is exact, also for integers that no float holds.
    if is_floating_point(array.dtype):
        return xp.trunc(x / y)
    return _divided("div", lambda x, y: (x - xp.fmod(x, y)) // y, x, y)


add.pullbacks(x=lambda grad: grad, y=lambda grad: grad)
sub.pullbacks(x=lambda grad: grad, y=lambda grad: -grad)
rsub.pullbacks(x=lambda grad: -grad, y=lambda grad: grad)
mul.pullbacks(
    x=by_kernel("mul", lambda grad, y: grad * y), y=by_kernel("mul", lambda grad, x: grad * x)
)
div.pullbacks(
    x=by_kernel("div", lambda grad, y: grad / y), y=lambda grad, x, y: -grad * (x / y) / y
)
floor_divide.pullbacks(x=lambda grad: grad * 0, y=lambda grad: grad * 0)
_trunc_divide.pullbacks(x=lambda grad: grad * 0, y=lambda grad: grad * 0)
remainder.pullbacks(x=lambda grad: grad, y=lambda grad, x, y: -grad * floor(x / y))
neg.pullbacks(x=lambda grad: -grad)
abs.pullbacks(x=lambda grad, x: grad * sign(x))
sign.pullbacks(x=lambda grad: grad * 0)


# ---- rounding ------------------------------------------------------------------------------------


@elementwise
def floor(x):
    """Return the largest integer not above x, in x's dtype."""
    return array_module(x).floor(x)


@elementwise
def ceil(x):
    """Return the smallest integer not below x, in x's dtype."""
    return array_module(x).ceil(x)


@elementwise(label="RoundBackward0")
def _round(x):
    return x.copy() if x.dtype.kind in "iu" else array_module(x).rint(x)


def round(x: Any, *, decimals: int = 0) -> Any:
    """Return x rounded to the nearest multiple of 10 ** -decimals, halves to even."""
    if decimals == 0:
        return _round(x)
    scale = 10.0 ** builtins.abs(decimals)
    return _round(x * scale) / scale if decimals > 0 else _round(x / scale) * scale


@elementwise
def trunc(x):
    """Return x without its fraction."""
    return array_module(x).trunc(x)


floor.pullbacks(x=lambda grad: grad * 0)
ceil.pullbacks(x=lambda grad: grad * 0)
_round.pullbacks(x=lambda grad: grad * 0)
trunc.pullbacks(x=lambda grad: grad * 0)


# ---- powers --------------------------------------------------------------------------------------


@operation(label="PowBackward0")
def _pow_number(x, *, exponent):
    # CuPy makes bfloat16 to the power of 0.5, 2.0 or -1.0 float64.
    return narrowed(widened(x) ** exponent, x.dtype)


@elementwise(label="PowBackward1")
def _pow(x, y):
    return x**y


def _power_times(grad: Any, x: Any, exponent: float) -> Any:
    # The exponent multiplies last, so that the derivative of x**3 is 3 * x**2 to the last bit.
    if exponent == 0:
        return grad * 0
    return grad * (exponent * _pow_number(x, exponent=exponent - 1))


def _power_by_exponent(grad: Any, x: Any, y: Any, out: Any) -> Any:
    at_zero = x == 0
    if hasattr(at_zero, "dtype"):
        return grad * where(at_zero & (y >= 0), 0.0, out * _log_of(x))
    # 0 to a negative power is infinite, and so is its slope.
    return grad * (where(y >= 0, 0.0, -out) if at_zero else out * _log_of(x))


_pow_number.pullbacks(x=_power_times)
_pow.pullbacks(
    x=lambda grad, x, y: grad * where(y == 0, 0.0, y * _pow(x, y - 1)),
    y=_power_by_exponent,
)


def _log_of(base: Any) -> Any:
    if hasattr(base, "dtype"):
        return log(base)
    if base <= 0:
        return -math.inf if base == 0 else math.nan
    return math.log(base)


def pow(x: Any, exponent: Any) -> Any:
    """Return x ** exponent, elementwise; either may be a number. The gradient by 0's exponent is 0."""
    if autocast_mode.dtype is not None:
        x, exponent = raised(x), raised(exponent)
    number = isinstance(exponent, (int, float))
    if number and hasattr(x, "dtype") and (isinstance(exponent, int) or is_floating_point(x.dtype)):
        exponent = int(exponent) if isinstance(exponent, bool) else exponent
        x = cast(x, dtype=int64) if x.dtype == bool_ else x
        if x.dtype.kind in "iu" and exponent < 0:
            raise RuntimeError(
                "pow: integers to negative integer powers are not allowed; convert to a float dtype"
            )
        return _pow_number(x, exponent=exponent)
    return _pow(x, exponent)


@elementwise(floating=True)
def sqrt(x):
    """Return the square root of x; nan for negative x."""
    return array_module(x).sqrt(x)


@elementwise(floating=True, needs_range=True)
def rsqrt(x):
    """Return 1 / sqrt(x)."""
    return 1 / array_module(x).sqrt(x)


@elementwise(floating=True, needs_range=True)
def reciprocal(x):
    """Return 1 / x."""
    return 1 / x


@elementwise(needs_range=True, kernel=True)
def square(x):
    """Return x * x."""
    return x * x


sqrt.pullbacks(x=lambda grad, out: grad / (2 * out))
rsqrt.pullbacks(x=lambda grad, out: grad * (-0.5 * (out * out * out)))
reciprocal.pullbacks(x=lambda grad, out: -grad * (out * out))
square.pullbacks(x=by_kernel("square_grad", lambda grad, x: grad * (2 * x)))


# ---- exponentials --------------------------------------------------------------------------------


@elementwise(floating=True, needs_range=True, kernel=True)
def exp(x):
    """Return e ** x."""
    return array_module(x).exp(x)


@elementwise(floating=True, needs_range=True)
def expm1(x):
    """Return e ** x - 1, accurate near 0."""
    return array_module(x).expm1(x)


@elementwise(floating=True, needs_range=True)
def log(x):
    """Return the natural logarithm of x."""
    return array_module(x).log(x)


@elementwise(floating=True, needs_range=True)
def log2(x):
    """Return the logarithm of x to base 2."""
    return array_module(x).log2(x)


@elementwise(floating=True, needs_range=True)
def log10(x):
    """Return the logarithm of x to base 10."""
    return array_module(x).log10(x)


@elementwise(floating=True, needs_range=True)
def log1p(x):
    """Return log(1 + x), accurate near 0."""
    return array_module(x).log1p(x)


@elementwise(floating=True, kernel=True)
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without overflow."""
    xp = array_module(x)
    decay = xp.exp(-builtins.abs(x))
    return xp.where(x >= 0, xp.ones_like(x), decay) / (1 + decay)


@elementwise(floating=True)
def erf(x):
    """Return the error function, 2 / sqrt(pi) times the integral of exp(-t**2) from 0 to x."""
    if kernels.has_kernels(x):
        return kernels.erf(x)
    return kernels.erf(x.astype(float32)).astype(x.dtype)  # 16-bit floats on the CPU


exp.pullbacks(x=by_kernel("mul", lambda grad, out: grad * out))
expm1.pullbacks(x=lambda grad, out: grad * (out + 1))
log.pullbacks(x=by_kernel("div", lambda grad, x: grad / x))
log2.pullbacks(x=lambda grad, x: grad / (x * math.log(2)))
log10.pullbacks(x=lambda grad, x: grad / (x * math.log(10)))
log1p.pullbacks(x=lambda grad, x: grad / (x + 1))
sigmoid.pullbacks(x=by_kernel("sigmoid_grad", lambda grad, out: grad * (out - out * out)))
erf.pullbacks(x=lambda grad, x: grad * (2 / math.sqrt(math.pi) * exp(-(x * x))))


# ---- trigonometry --------------------------------------------------------------------------------


@elementwise(floating=True)
def sin(x):
    """Return the sine of x, in radians."""
    return array_module(x).sin(x)


@elementwise(floating=True)
def cos(x):
    """Return the cosine of x, in radians."""
    return array_module(x).cos(x)


@elementwise(floating=True, needs_range=True)
def tan(x):
    """Return the tangent of x, in radians."""
    return array_module(x).tan(x)


@elementwise(floating=True, kernel=True)
def tanh(x):
    """Return the hyperbolic tangent of x."""
    return array_module(x).tanh(x)


sin.pullbacks(x=lambda grad, x: grad * cos(x))
cos.pullbacks(x=lambda grad, x: -grad * sin(x))
tan.pullbacks(x=lambda grad, out: grad * (1 + out * out))
tanh.pullbacks(x=by_kernel("tanh_grad", lambda grad, out: grad - grad * out * out))


# ---- selection -----------------------------------------------------------------------------------


@elementwise
def maximum(x, y):
    """Return the larger of x and y; nan where either is nan. Ties share the gradient equally."""
    return _extreme("maximum", x, y)


@elementwise
def minimum(x, y):
    """Return the smaller of x and y; nan where either is nan. Ties share the gradient equally."""
    return _extreme("minimum", x, y)


def _extreme(name: str, x: Any, y: Any) -> Any:
    array = x if hasattr(x, "dtype") else y
    return getattr(array_module(array), name)(x, y)


def _half_of_ties(grad: Any, loses: Any, ties: Any) -> Any:
    # Beside a nan neither loses, and both get the gradient, as in PyTorch.
    return where(ties, grad * 0.5, where(loses, 0.0, grad))


maximum.pullbacks(
    x=lambda grad, x, y: _half_of_ties(grad, x < y, x == y),
    y=lambda grad, x, y: _half_of_ties(grad, y < x, x == y),
)
minimum.pullbacks(
    x=lambda grad, x, y: _half_of_ties(grad, x > y, x == y),
    y=lambda grad, x, y: _half_of_ties(grad, y > x, x == y),
)


@operation(label="WhereBackward0")
def _where(x, y, *, condition):
    # CuPy's where makes bfloat16 float32.
    return narrowed(array_module(condition).where(condition, x, y), x.dtype)


_where.pullbacks(
    x=lambda grad, x_shape, condition: sum_to_shape(_select(condition, grad, 0.0), shape=x_shape),
    y=lambda grad, y_shape, condition: sum_to_shape(_select(condition, 0.0, grad), shape=y_shape),
)


def _select(condition: Any, x: Any, y: Any) -> Any:
    """Choose between arrays of one dtype, or an array and a number, which becomes an array of that dtype."""
    array = array_of(x if hasattr(x, "dtype") else y)
    xp = array_module(array)
    with on_device_of(array):
        x, y = (v if hasattr(v, "dtype") else xp.full((), v, array.dtype) for v in (x, y))
    try:
        return _where(x, y, condition=array_of(condition))
    except ValueError:
        raise ValueError(
            "where: condition and both branches must broadcast together; got condition.shape="
            f"{tuple(condition.shape)}, x.shape={tuple(x.shape)}, y.shape={tuple(y.shape)}"
        ) from None


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    """Return x where `condition` (bool) holds and y elsewhere, broadcast together.

    Without x and y, return the int64 places where it holds: one 1-D tensor for each dim.
    The branch not chosen gets a zero gradient; where its own derivative is infinite, 0 * inf still makes
    nan: choose safe inputs first. Raises TypeError for a condition that is not bool.
    """
    if x is None and y is None:
        array = array_of(condition)
        return tuple(
            map(Variable.Result, array_module(array).nonzero(array.reshape(array.shape or 1)))
        )
    if getattr(condition, "dtype", None) != bool_:
        kind = getattr(condition, "dtype", type(condition).__name__)
        raise TypeError(
            f"where: condition must be a bool tensor (condition.dtype == bool); got {kind}"
        )
    if not hasattr(x, "dtype") and not hasattr(y, "dtype"):
        x = Variable.Result(array_module(array_of(condition)).full((), x, result_type(x, y)))
    return _select(kept_for_backward(condition, x, y), *conform("where", x, y))


@operation(label="ClampBackward1")
def _clamp(x, *, min, max):
    return narrowed(array_module(x).clip(widened(x), min, max), x.dtype)


_clamp.pullbacks(x=lambda grad, x, min, max: where(_within(x, min, max), grad, 0.0))


def _within(x: Any, min: Any, max: Any) -> Any:
    if max is None:
        return x >= min
    return x <= max if min is None else (x >= min) & (x <= max)


def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    """Return x confined to [min, max]; numbers or tensors, either may be None. max wins where min > max.

    The derivative is 1 within and at the bounds. Raises ValueError if both are None.
    """
    if min is None and max is None:
        raise ValueError("clamp: at least one of min and max must be given; got min=None, max=None")
    for bound in (min, max):
        if bound is not None:
            x, _ = conform("clamp", x, bound)
    if not hasattr(min, "dtype") and not hasattr(max, "dtype"):
        return _clamp(x, min=_representable(min, x.dtype), max=_representable(max, x.dtype))
    # A bound that is nan makes nan.
    if min is not None:
        x = where((x < min) | (min != min), min, x)
    return x if max is None else where((x > max) | (max != max), max, x)


def _representable(bound: Any, dtype: Any) -> Any:
    """Return the bound, and if integers of `dtype` do not reach it the last one that they do."""
    if bound is None or dtype.kind not in "iu":
        return bound
    return np.clip(bound, np.iinfo(dtype).min, np.iinfo(dtype).max).item()
