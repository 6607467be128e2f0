"""Softmax and its logarithm along rows: each is read from memory once, then stays in cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.layout import kernel_rows
from gradengine.kernels.cpu.reductions import largest, sum_of, sum_of_products
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.vector_math import exponential
from gradengine.kernels.layout import Array

TOGETHER = 2048  # elements of short rows whose powers are one loop


def softmax(x: Array) -> Array:
    return _of_rows(_softmax, x)


def log_softmax(x: Array) -> Array:
    return _of_rows(_log_softmax, x)


def softmax_grad(grad: Array, out: Array) -> Array:
    return _of_rows(_softmax_grad, grad, out)


def log_softmax_grad(grad: Array, out: Array) -> Array:
    return _of_rows(_log_softmax_grad, grad, out)


def _of_rows(kernel: Any, *arrays: Array) -> Array:
    rows = [kernel_rows(array) for array in arrays]
    out = np.empty_like(rows[0])
    kernel(get_num_threads(), *rows, out)
    return out.reshape(arrays[0].shape)


@kernel_part
def _rows_together(x):
    """Give how many of the rows of x (rows, n) stay in cache and make a vector of some length."""
    return max(1, TOGETHER // max(x.shape[1], 1))


@kernel_part
def _powers(x, below, out):
    """Fill below (rows, n) with x minus the maximum of its row, and out with exp of that."""
    for row in range(len(x)):
        values, differences = x[row], below[row]
        peak = largest(values)
        for i in range(len(values)):
            differences[i] = values[i] - peak
    _exponentials(below, out)


@kernel_part
def _exponentials(x, out):
    values, made = x.reshape(x.size), out.reshape(out.size)
    for i in range(len(values)):
        made[i] = exponential(values[i])


@parallel_kernel
def _softmax(worker, workers, x, out):
    together = _rows_together(x)
    below = np.empty((together, x.shape[1]), x.dtype)
    for piece in own_range(worker, workers, (len(x) + together - 1) // together):
        first = piece * together
        given, made = x[first : first + together], out[first : first + together]
        _powers(given, below[: len(given)], made)
        for row in range(len(made)):
            shares = made[row]
            share = x.dtype.type(np.divide(1.0, sum_of(shares)))
            for i in range(len(shares)):
                shares[i] *= share


@parallel_kernel
def _log_softmax(worker, workers, x, out):
    together = _rows_together(x)
    made = np.empty((together, x.shape[1]), x.dtype)
    for piece in own_range(worker, workers, (len(x) + together - 1) // together):
        first = piece * together
        given, below = x[first : first + together], out[first : first + together]
        _powers(given, below, made[: len(given)])
        for row in range(len(below)):
            logs = below[row]
            log_total = x.dtype.type(np.log(sum_of(made[row])))
            for i in range(len(logs)):
                logs[i] -= log_total


@parallel_kernel
def _softmax_grad(worker, workers, grad, out, by_x):
    for row in own_range(worker, workers, len(out)):
        grads, shares, made = grad[row], out[row], by_x[row]
        total = grad.dtype.type(sum_of_products(grads, shares))
        for i in range(len(made)):
            made[i] = grads[i] * shares[i] - shares[i] * total


@parallel_kernel
def _log_softmax_grad(worker, workers, grad, out, by_x):
    together = _rows_together(out)
    for piece in own_range(worker, workers, (len(out) + together - 1) // together):
        first = piece * together
        made = by_x[first : first + together]
        _exponentials(out[first : first + together], made)
        for row in range(len(made)):
            grads, shares = grad[first + row], made[row]
            total = grad.dtype.type(sum_of(grads))
            for i in range(len(grads)):
                shares[i] = grads[i] - shares[i] * total
