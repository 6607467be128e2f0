"""Adding and writing at positions that may repeat: at once by atomics, or in order after sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels import settings
from gradengine.kernels.cuda.capture import in_step
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.cuda.layout import THREADS, blocks
from gradengine.kernels.layout import Array

SOURCE = "indexing.cu"

_WORDS = {1: "unsigned char", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
KERNELS = {
    SOURCE: (
        *("add_runs<float>", "add_runs<double>"),
        *(f"put_runs<{word}>" for word in _WORDS.values()),
    )
}


def add_at(name: str, out: Array, positions: Array, values: Array) -> None:
    if out.dtype.kind == "f" and settings.general.deterministic:
        _run(name, f"add_runs<{c_name(out.dtype)}>", out, positions, values.astype(out.dtype))
    else:  # sums of integers are the same in any order
        array_module(out).add.at(out, positions, values)


def put_at(name: str, out: Array, positions: Array, values: Array) -> None:
    size = out.dtype.itemsize
    words = out.view(f"u{size}"), positions, values.view(f"u{size}")
    _run(name, f"put_runs<{_WORDS[size]}>", *words)


def _run(name: str, instance: str, out: Array, positions: Array, values: Array) -> None:
    """Launch a kernel on the values, sorted by position, those of one in their order."""
    if in_step():
        raise RuntimeError(
            f"{name}: elements that are named twice need a fixed order (use_deterministic_algorithms), "
            "and a captured step cannot hold the sort that gives it; take it out of the step, or call "
            "use_deterministic_algorithms(False)"
        )
    if not positions.size:
        return
    order: Any = positions.argsort(kind="stable").astype(np.int64, copy=False)
    run = kernel(SOURCE, instance)
    run((blocks(order.size),), (THREADS,), (out, positions[order], order, values, order.size))
