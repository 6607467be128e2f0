"""Softmax and its logarithm along rows: one launch forward, one back."""

from __future__ import annotations

from math import prod

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import c_name
from gradengine.kernels.cuda.rows import TEAMS, in_rows, run_rows
from gradengine.kernels.layout import Array

SOURCE = "softmax.cu"
KERNELS = {
    SOURCE: tuple(
        f"{name}<{element}, {threads}>"
        for name in ("softmax", "log_softmax", "softmax_grad", "log_softmax_grad")
        for element in ("float16", "bfloat16", "float", "double")
        for threads in TEAMS
    )
}


def softmax(x: Array) -> Array:
    return _of_rows("softmax", x)


def log_softmax(x: Array) -> Array:
    return _of_rows("log_softmax", x)


def softmax_grad(grad: Array, out: Array) -> Array:
    return _of_rows("softmax_grad", grad, out)


def log_softmax_grad(grad: Array, out: Array) -> Array:
    return _of_rows("log_softmax_grad", grad, out)


def _of_rows(name: str, *arrays: Array) -> Array:
    first = arrays[0]
    out = array_module(first).empty(first.shape, first.dtype)
    shape = (prod(first.shape[:-1]), first.shape[-1])
    run_rows(SOURCE, f"{name}<{c_name(first.dtype)}", shape, *map(in_rows, arrays), out)
    return out
