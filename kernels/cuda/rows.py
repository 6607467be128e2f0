"""Launches of kernels that go along rows: a warp makes a short row, a block a long one."""

from __future__ import annotations

from typing import Any

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import kernel
from gradengine.kernels.layout import Array

WARP = 32
BLOCK = 256
ROWS_OF_BLOCK = 4  # where a warp makes a row
LONGEST_OF_WARP = 256  # elements of a row, up to which a warp makes it
TEAMS = (WARP, BLOCK)


def run_rows(source: str, name: str, shape: tuple[int, int], *arguments: Any) -> None:
    """Run the kernel name<..., THREADS>, given without its last parameter, on (rows, length)."""
    rows, length = shape
    if not rows * length:
        return
    whole_block = length > LONGEST_OF_WARP
    threads, of_block = (BLOCK, 1) if whole_block else (WARP, ROWS_OF_BLOCK)
    run = kernel(source, f"{name}, {threads}>")
    run((-(-rows // of_block),), (threads * of_block,), (*arguments, rows, length))


def in_rows(x: Array) -> Array:
    """Give x as a C-contiguous array: itself where it is one."""
    return array_module(x).ascontiguousarray(x)
