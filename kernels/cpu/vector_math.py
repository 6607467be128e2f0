"""Functions for compiled code, in vectors, which calls of the C library are not."""

from __future__ import annotations

import math

import numpy as np
from numba import float32
from numba.extending import overload

from gradengine.kernels.cpu.launch import kernel_part


def exponential(x):
    """Give exp(x) in x's dtype, in vectors and within 2 units in the last place.

    Where exp(x) would be no normal number it is 0, or what the largest x of the others has.
    """
    return math.exp(x)


@overload(exponential, jit_options={"fastmath": {"contract"}})  # multiply-adds, where there are any
def _exponential(x):
    return _exponential32 if x == float32 else _exponential64


# exp(x) = 2^n * exp(r) with |r| <= log(2) / 2, exp(r) as in Cephes. Added to what has no digits left
# for fractions, x / log(2) is rounded to n, which then is that sum's lowest bits.


def _exponential32(x):
    lowest, highest = np.float32(-87.33654), np.float32(88.02969)  # for 2^n to be a normal number
    clipped = highest if x > highest else x
    rounded = clipped * np.float32(1.44269504088896341) + np.float32(1.5 * 2**23)
    n = rounded - np.float32(1.5 * 2**23)
    r = clipped - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    bits = np.float32(rounded).view(np.int32) + np.int32(127)
    power = np.int32(bits << np.int32(23)).view(np.float32)
    return np.float32(0) if x < lowest else p * power


def _exponential64(x):
    lowest, highest = -708.3964185322641, 709.4361393031039
    clipped = highest if x > highest else x
    rounded = clipped * 1.4426950408889634 + 1.5 * 2**52
    n = rounded - 1.5 * 2**52
    r = clipped - n * 6.93145751953125e-1
    r = r - n * 1.42860682030941723212e-6
    square = r * r
    p = 1.26177193074810590878e-4
    p = p * square + 3.02994407707441961300e-2
    p = (p * square + 9.99999999999999999910e-1) * r
    q = 3.00198505138664455042e-6
    q = q * square + 2.52448340349684104192e-3
    q = q * square + 2.27265548208155028766e-1
    q = q * square + 2.00000000000000000009
    bits = np.float64(rounded).view(np.int64) + np.int64(1023)
    power = np.int64(bits << np.int64(52)).view(np.float64)
    return 0.0 if x < lowest else (1.0 + np.divide(p, q - p) * 2.0) * power


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
