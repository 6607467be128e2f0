"""Softmax cross entropy in array operations."""

from __future__ import annotations

from gradengine.devices import array_module
from gradengine.kernels.cuda.windows import sum_dtype
from gradengine.kernels.layout import Array


def softmax_cross_entropy(x: Array, target: Array) -> tuple[Array, Array]:
    xp = array_module(x)
    peak = x.max(axis=1, keepdims=True)
    total = xp.exp(x - peak).sum(axis=1, keepdims=True, dtype=sum_dtype(x.dtype))
    log_sum = xp.log(total).astype(x.dtype)
    picked = xp.take_along_axis(x, target[:, None], axis=1)
    losses = log_sum - (picked - peak)
    return losses[:, 0], xp.concatenate((peak, log_sum), axis=1)


def softmax_cross_entropy_grad(grad: Array, x: Array, target: Array, shifts: Array) -> Array:
    xp = array_module(x)
    out = xp.exp(x - shifts[:, :1] - shifts[:, 1:])
    rows = xp.arange(len(x))
    out[rows, target] -= 1
    out *= grad[:, None]
    return out
