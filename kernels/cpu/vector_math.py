"""Functions for compiled code, in vectors, which calls of the C library are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, float64
from numba.extending import overload

from gradengine.kernels.cpu.launch import kernel_part


def exponential(x):
    """Give exp(x) in x's dtype, in vectors and within 2 units in the last place.

    Where exp(x) would be no normal number it is 0, or what the largest x of the others has.
    """
    return math.exp(x)


def full_exponential(x):
    """Give `exponential` also where it is no normal number: 0, subnormal or infinite."""
    return math.exp(x)


def exponential_minus_1(x):
    """Give exp(x) - 1 for x that is not positive, within 3 units in the last place."""
    return math.expm1(x)


def normal(x):
    """Give the standard normal distribution's function at x, and its density.

    In float32 the function is within 4 units in the last place for x > -1, within 16 for x > -5.
    """
    return 0.5 * math.erfc(-x * math.sqrt(0.5)), math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _compiled(function: Callable[..., Any]) -> Any:
    """Say what compiled code has in place of a function, with multiply-adds where there are any."""
    return overload(function, jit_options={"fastmath": {"contract"}})


@_compiled(exponential)
def _exponential(x):
    zero, lowest, highest = _LIMITS[x]  # for 2^n to be a normal number

    def formula(x):
        rest, n = _reduced(highest if x > highest else x)
        return zero if x < lowest else (rest + type(x)(1)) * _power_of_2(n, x)

    return formula


@_compiled(full_exponential)
def _full_exponential(x):
    lowest, highest = _FULL_LIMITS[x]

    def formula(x):
        clipped = highest if x > highest else x
        rest, n = _reduced(lowest if x < lowest else clipped)
        half = n >> 1  # neither half is beyond the normal numbers
        return (rest + type(x)(1)) * _power_of_2(half, x) * _power_of_2(n - half, x)

    return formula


@_compiled(exponential_minus_1)
def _exponential_minus_1(x):
    _, lowest, _ = _LIMITS[x]

    def formula(x):
        rest, n = _reduced(lowest if x < lowest else x)
        power = _power_of_2(n, x)
        return rest * power + (power - type(x)(1))

    return formula


_LIMITS = {
    float32: (np.float32(0), np.float32(-87.33654), np.float32(88.02969)),
    float64: (0.0, -708.3964185322641, 709.4361393031039),
}
# where the result is 0 or infinite for sure
_FULL_LIMITS = {
    float32: (np.float32(-105), np.float32(89)),
    float64: (-746.0, 710.0),
}


def _reduced(x) -> Any:
    """Give exp(r) - 1 and n, for x = n * log(2) + r with |r| <= log(2) / 2, as in Cephes."""
    raise NotImplementedError


@_compiled(_reduced)
def _reduced_of(x):
    return _reduced32 if x == float32 else _reduced64


# Added to what has no digits left for fractions, x / log(2) is rounded to n, which then is that sum's
# lowest bits.


def _reduced32(x):
    rounded = x * np.float32(1.44269504088896341) + np.float32(1.5 * 2**23)
    n = rounded - np.float32(1.5 * 2**23)
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r
    return p, np.int32(np.float32(rounded).view(np.int32) - np.int32(0x4B400000))


def _reduced64(x):
    rounded = x * 1.4426950408889634 + 1.5 * 2**52
    n = rounded - 1.5 * 2**52
    r = x - n * 6.93145751953125e-1
    r = r - n * 1.42860682030941723212e-6
    square = r * r
    p = 1.26177193074810590878e-4
    p = p * square + 3.02994407707441961300e-2
    p = (p * square + 9.99999999999999999910e-1) * r
    q = 3.00198505138664455042e-6
    q = q * square + 2.52448340349684104192e-3
    q = q * square + 2.27265548208155028766e-1
    q = q * square + 2.00000000000000000009
    rest = np.divide(p, q - p) * 2.0
    return rest, np.int64(np.float64(rounded).view(np.int64) - np.int64(0x4338000000000000))


def _power_of_2(n, like) -> Any:
    """Give 2^n in the dtype of `like`, a normal number."""
    raise NotImplementedError


@_compiled(_power_of_2)
def _power_of_2_of(n, like):
    if like == float32:
        return lambda n, like: np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
    return lambda n, like: np.int64((n + np.int64(1023)) << np.int64(52)).view(np.float64)


@_compiled(normal)
def _normal(x):
    return _normal32 if x == float32 else _normal64


def _normal32(x):
    """Give what lies beyond |x| as exp(-x^2 / 2) times a polynomial of 1 / (1 + 0.35 |x|).

    Its coefficients make the largest relative error smallest, 3.2e-8 up to |x| = 14 (Lawson's
    algorithm).
    """
    size = abs(x)
    power = exponential(np.float32(-0.5) * size * size)
    t = np.divide(np.float32(1), np.float32(1) + np.float32(0.35) * size)
    p = np.float32(-0.029141513630747795)
    p = p * t + np.float32(0.14394982159137726)
    p = p * t + np.float32(-0.25566816329956055)
    p = p * t + np.float32(0.15912039577960968)
    p = p * t + np.float32(-0.02307197079062462)
    p = p * t + np.float32(0.10549157112836838)
    p = p * t + np.float32(0.11983714252710342)
    p = p * t + np.float32(0.13986125588417053)
    p = p * t + np.float32(0.13962143659591675)
    beyond = p * t * power
    density = np.float32(0.3989422804014327) * power
    return (beyond if x < np.float32(0) else np.float32(1) - beyond), density


def _normal64(x):
    return 0.5 * math.erfc(-x * 0.7071067811865476), 0.3989422804014327 * exponential(-0.5 * x * x)


# erf, in float32 only: near 0 by a polynomial, further out as 1 - exp of one (N. Juffa's minimax
# coefficients), within 2 units in the last place. They are two functions since a loop that has both
# would not become vectors.
NEAR = np.float32(0.927734375)


@kernel_part
def erf_near(x):
    """Give erf(x) of float32 where |x| <= NEAR."""
    square = x * x
    p = np.float32(-5.96761703e-4)
    p = p * square + np.float32(4.99119423e-3)
    p = p * square + np.float32(-2.67681349e-2)
    p = p * square + np.float32(1.12819925e-1)
    p = p * square + np.float32(-3.76125336e-1)
    p = p * square + np.float32(1.28379166e-1)
    return p * x + x


@kernel_part
def erf_far(size):
    """Give erf of a float32 that is larger than NEAR."""
    square = size * size
    r = np.float32(-1.72853470e-5) * size + np.float32(3.83197126e-4)
    r = r * square + (np.float32(-3.88396438e-3) * size + np.float32(2.42546219e-2))
    r = r * size + np.float32(-1.06777877e-1)
    r = r * size + np.float32(-6.34846687e-1)
    r = r * size + np.float32(-1.28717512e-1)
    return np.float32(1) - exponential(r * size - size)
