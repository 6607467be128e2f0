"""What one number is made of a row in cache: in vectors, and alike on any number of threads.

Sums are of float64, so that long rows of float32 keep their digits.
"""

from __future__ import annotations

import numpy as np
from numba import float32
from numba.extending import overload

from gradengine.kernels.cpu.launch import summing_part


def largest(values):
    """Give the largest of floats, of which there is one at least; with nan among them, any number."""
    return values.max()


@overload(largest)
def _largest(values):
    # A maximum of floats becomes no vectors, since nan makes it depend on the order, but one of
    # integers does: the bits of floats have the floats' order, with negative ones turned round.
    single = values.dtype == float32
    number, integer = (np.float32, np.int32) if single else (np.float64, np.int64)
    sign = integer(31 if single else 63)
    least, turned = np.iinfo(integer).min, integer(np.iinfo(integer).max)

    def largest_by_bits(values):
        bits = values.view(integer)
        most = integer(least)
        for i in range(len(bits)):
            ordered = integer(bits[i] ^ ((bits[i] >> sign) & turned))
            most = ordered if ordered > most else most
        return integer(most ^ ((most >> sign) & turned)).view(number)

    return largest_by_bits


@summing_part
def sum_of(values):
    total = 0.0
    for i in range(len(values)):
        total += values[i]
    return total


@summing_part
def sum_of_products(values, others):
    total = 0.0
    for i in range(len(values)):
        total += values[i] * others[i]
    return total


@summing_part
def sum_of_squares(values, center):
    """Sum the squared distances from a number."""
    total = 0.0
    for i in range(len(values)):
        distance = values[i] - center
        total += distance * distance
    return total
