"""Random numbers drawn where they are needed: nothing is copied to the device, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine.kernels.cuda.capture import by_value_or_live
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import THREADS, blocks
from gradengine.kernels.layout import Array

SOURCE = "random.cu"

_TYPES = ("float16", "bfloat16", "float", "double")
KERNELS = {
    SOURCE: (
        *(f"{name}<{type}>" for name in ("uniform", "normal") for type in _TYPES),
        *("integers", "bernoulli"),
    )
}

_STREAM = np.dtype([("seed", np.uint64), ("first", np.uint64)])

Take = Callable[[], tuple[int, int]]


def uniform(out: Array, take: Take) -> None:
    _launch(f"uniform<{c_name(out.dtype)}>", out, take)


def normal(out: Array, take: Take) -> None:
    _launch(f"normal<{c_name(out.dtype)}>", out, take)


def integers(out: Array, low: int, span: int, take: Take) -> None:
    _launch("integers", out, take, low, np.uint64(span))


def bernoulli(out: Array, threshold: int, take: Take) -> None:
    _launch("bernoulli", out, take, np.uint64(threshold))


def _launch(name: str, out: Array, take: Take, *numbers: Any) -> None:
    """Fill out, a thread for each block of the stream."""
    stream = by_value_or_live(_STREAM, lambda: np.array(take(), _STREAM))
    threads = -(-out.size // (2 if out.dtype.itemsize == 8 else 4))
    arguments = (out.reshape(-1), out.size, *numbers, *stream)
    kernel(SOURCE, name)((blocks(threads),), (THREADS,), arguments)
