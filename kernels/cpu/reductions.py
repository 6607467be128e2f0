"""What one number is made of a row in cache: in vectors, and alike on any number of threads."""

from __future__ import annotations

import numpy as np
from numba import float32
from numba.extending import overload

from gradengine.kernels.cpu.launch import summing_part

# Terms that are added in the row's own dtype before float64 takes them up: in the lanes of vectors so
# few keep float32's digits.
TERMS = 1024


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
    for start in range(0, len(values), TERMS):
        piece, part = values[start : start + TERMS], values.dtype.type(0)
        for i in range(len(piece)):
            part += piece[i]
        total += part
    return total


@summing_part
def sum_of_products(values, others):
    total = 0.0
    for start in range(0, len(values), TERMS):
        piece, factors = values[start : start + TERMS], others[start : start + TERMS]
        part = values.dtype.type(0)
        for i in range(len(piece)):
            part += piece[i] * factors[i]
        total += part
    return total


@summing_part
def sum_of_squares(values, center):
    """Sum the squared distances from a number."""
    total = 0.0
    for start in range(0, len(values), TERMS):
        piece, part = values[start : start + TERMS], values.dtype.type(0)
        for i in range(len(piece)):
            distance = piece[i] - center
            part += distance * distance
        total += part
    return total
