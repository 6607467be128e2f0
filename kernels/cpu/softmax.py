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
def powers(values, out):
    """Fill out with exp(values - their maximum), give that maximum and the sum of the powers."""
    peak = largest(values)
    for i in range(len(values)):
        out[i] = exponential(values[i] - peak)
    return peak, sum_of(out)


@parallel_kernel
def _softmax(worker, workers, x, out):
    for row in own_range(worker, workers, len(x)):
        made = out[row]
        _, total = powers(x[row], made)
        share = x.dtype.type(np.divide(1.0, total))
        for i in range(len(made)):
            made[i] *= share


@parallel_kernel
def _log_softmax(worker, workers, x, out):
    for row in own_range(worker, workers, len(x)):
        values, made = x[row], out[row]
        peak, total = powers(values, made)
        log_total = x.dtype.type(np.log(total))
        for i in range(len(made)):
            made[i] = values[i] - peak - log_total


@parallel_kernel
def _softmax_grad(worker, workers, grad, out, by_x):
    for row in own_range(worker, workers, len(out)):
        grads, shares, made = grad[row], out[row], by_x[row]
        total = grad.dtype.type(sum_of_products(grads, shares))
        for i in range(len(made)):
            made[i] = grads[i] * shares[i] - shares[i] * total


@parallel_kernel
def _log_softmax_grad(worker, workers, grad, out, by_x):
    for row in own_range(worker, workers, len(out)):
        grads, logs, made = grad[row], out[row], by_x[row]
        total = grad.dtype.type(sum_of(grads))
        for i in range(len(made)):
            made[i] = grads[i] - exponential(logs[i]) * total
