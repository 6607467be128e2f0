"""Initial values: fill a tensor in place from the process's random stream, and return it."""

from __future__ import annotations

import math
from typing import Any

from gradengine.devices import on_device_of
from gradengine.grad_mode import no_grad
from gradengine.ops import random
from gradengine.tensor import Tensor

_GAINS = {
    "linear": 1.0,
    "conv1d": 1.0,
    "conv2d": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Return the factor that keeps the variance through `nonlinearity`.

    `param` is leaky_relu's slope. Raises ValueError for one that is not known.
    """
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2 / (1 + slope**2))
    if nonlinearity not in _GAINS:
        raise ValueError(
            f"calculate_gain: nonlinearity must be leaky_relu or one of {', '.join(_GAINS)}; "
            f"got nonlinearity={nonlinearity!r}"
        )
    return _GAINS[nonlinearity]


def fans(tensor: Tensor) -> tuple[int, int]:
    """Return (fan in, fan out) of a weight (out, in, ...): how many inputs and outputs a unit has.

    Raises ValueError for fewer than two dimensions.
    """
    if tensor.ndim < 2:
        raise ValueError(
            "fans: fan in and fan out need fewer than 2 dimensions "
            f"(ndim >= 2); got shape={tensor.shape}"
        )
    receptive = math.prod(tensor.shape[2:])
    return tensor.shape[1] * receptive, tensor.shape[0] * receptive


def _fill(tensor: Tensor, value: Any) -> Tensor:
    with no_grad():
        return tensor.copy_(value)


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill with `val`."""
    return _fill(tensor, val)


def ones_(tensor: Tensor) -> Tensor:
    """Fill with 1."""
    return _fill(tensor, 1)


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with 0."""
    return _fill(tensor, 0)


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Fill with numbers drawn evenly from [a, b)."""
    with no_grad():
        return tensor.uniform_(a, b)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill from the normal distribution."""
    with no_grad():
        return tensor.normal_(mean, std)


def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Tensor:
    """Fill from the normal distribution, cut off outside [a, b].

    Raises ValueError if [a, b] lies more than two standard deviations from the mean.
    """
    if not a - 2 * std <= mean <= b + 2 * std or a >= b:
        raise ValueError(
            "trunc_normal_: mean must be within two standard deviations of [a, b] and a < b; "
            f"got mean={mean}, std={std}, a={a}, b={b}"
        )
    normal_(tensor, mean, std)
    values = tensor.array
    with on_device_of(values):
        outside = (values < a) | (values > b)
        while outside.any():  # waits for the GPU
            again = random.normal((int(outside.sum()),), tensor.dtype, tensor.device)
            values[outside] = again * std + mean
            outside = (values < a) | (values > b)
    return tensor


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill evenly with variance 2 gain^2 / (fan in + fan out). Glorot and Bengio, AISTATS 2010."""
    bound = gain * math.sqrt(6 / sum(fans(tensor)))
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill normally with variance 2 gain^2 / (fan in + fan out): see `xavier_uniform_`."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(fans(tensor))))


def kaiming_uniform_(
    tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """Fill evenly with variance gain^2 / fan; `a` is leaky_relu's slope.

    `mode` is "fan_in", which keeps the variance of activations, or "fan_out", that of gradients.
    He et al., arXiv:1502.01852.
    """
    bound = math.sqrt(3) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(
    tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """Fill normally with variance gain^2 / fan: see `kaiming_uniform_`."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"kaiming: mode must be 'fan_in' or 'fan_out'; got mode={mode!r}")
    fan = fans(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan) if fan else 0.0


def reset_linear_(weight: Tensor, bias: Tensor | None) -> None:
    """Fill weight and bias evenly within 1 / sqrt(fan in) of 0, as linear and conv layers start."""
    kaiming_uniform_(weight, a=math.sqrt(5))
    fan_in, _ = fans(weight)
    if bias is not None and fan_in:
        bound = 1 / math.sqrt(fan_in)
        uniform_(bias, -bound, bound)
