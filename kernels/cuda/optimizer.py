"""Optimizers: one launch updates up to 64 arrays, however many elements each of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.capture import by_value_or_live
from gradengine.kernels.cuda.launch import addresses, by_value, c_name, kernel
from gradengine.kernels.layout import Array
from gradengine.kernels.rows import Rows

# As in optimizer.cu
TENSORS = 64
THREADS = 256
CHUNK = 4096

_TYPES = ("float", "double", "float16", "bfloat16")
KERNELS = {
    "optimizer.cu": tuple(
        f"{name}<{type}>" for name in ("sgd", "adam", "unscale") for type in _TYPES
    )
}

_SGD_NUMBERS = np.dtype(
    [(n, "f8") for n in ("lr", "momentum", "share", "weight_decay", "sign", "nesterov")]
)
_ADAM_NUMBERS = np.dtype(
    [
        *((n, "f8") for n in ("keep", "keep_square", "add", "add_square")),
        *((n, "f8") for n in ("eps", "shrink", "weight_decay", "sign")),
        *((n, "f8", TENSORS) for n in ("rate", "root_factor")),
    ]
)


def sgd(
    values: Sequence[Array],
    grads: Sequence[Array],
    velocities: Sequence[Array],
    fresh: Sequence[bool],
    options: Mapping[str, Any],
) -> None:
    def read() -> np.ndarray:
        sign = -1 if options["maximize"] else 1
        share = 1 - options["dampening"]
        rest = (share, options["weight_decay"], sign, options["nesterov"])
        return by_value(np.array((options["lr"], options["momentum"], *rest), _SGD_NUMBERS))

    numbers = by_value_or_live(_SGD_NUMBERS, read)

    def arguments(part: slice) -> tuple[Any, ...]:
        bits = sum(1 << place for place, starts in enumerate(fresh[part]) if starts)
        return (np.uint64(bits), *numbers)

    _launch("sgd", arguments, values, grads, velocities or values)


def adam(
    values: Sequence[Array],
    grads: Sequence[Array],
    averages: Sequence[Array],
    squares: Sequence[Array],
    states: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    decoupled: bool,
) -> None:
    def read(part: slice) -> np.ndarray:
        lr, (keep, keep_square) = options["lr"], options["betas"]
        decay = options["weight_decay"]
        numbers = np.zeros((), _ADAM_NUMBERS)
        numbers["keep"], numbers["keep_square"] = keep, keep_square
        numbers["add"], numbers["add_square"] = 1 - keep, 1 - keep_square
        numbers["eps"] = options["eps"]
        numbers["shrink"] = 1 - lr * decay if decoupled else 1
        numbers["weight_decay"] = 0 if decoupled else decay
        numbers["sign"] = -1 if options["maximize"] else 1
        # both averages start at 0, too low by these factors
        for place, state in enumerate(states[part]):
            numbers["rate"][place] = lr / (1 - keep ** state["step"])
            numbers["root_factor"][place] = (1 - keep_square ** state["step"]) ** 0.5
        return by_value(numbers)

    def arguments(part: slice) -> tuple[Any, ...]:
        return by_value_or_live(_ADAM_NUMBERS, lambda: read(part))

    _launch("adam", arguments, values, grads, averages, squares)


def unscale(grads: Sequence[Array], factor: float) -> Array:
    found = array_module(grads[0]).zeros(1, np.float32)
    _launch("unscale", lambda part: (factor, found), grads)
    return found


def _launch(
    name: str, arguments: Callable[[slice], tuple[Any, ...]], *rows: Sequence[Array]
) -> None:
    """Launch the kernel of this name on tables of the rows' arrays, with the arguments for each part."""
    dtype = rows[0][0].dtype
    with Rows(dtype, *rows) as alike:
        for table, chunks, part in _tables(alike):
            update = kernel("optimizer.cu", f"{name}<{c_name(dtype)}>")
            update((chunks,), (THREADS,), (table, *arguments(part)))


@cache
def _table_dtype(rows: int) -> np.dtype:
    return np.dtype(
        [
            ("rows", np.uint64, (rows, TENSORS)),
            ("sizes", np.int64, TENSORS),
            ("first_chunk", np.int32, TENSORS),
        ]
    )


def _tables(rows: list[list[Array]]) -> Iterator[tuple[np.ndarray, int, slice]]:
    """Yield `Table` of optimizer.cu for up to 64 places, how many chunks they have, and which they are."""
    for start in range(0, len(rows[0]), TENSORS):
        part = slice(start, start + TENSORS)
        sizes = np.array([array.size for array in rows[0][part]], np.int64)
        ends = np.cumsum(-(-sizes // CHUNK))
        if not ends[-1]:
            continue
        table = np.zeros((), _table_dtype(len(rows)))
        table["rows"][:, : sizes.size] = [addresses(row[part]) for row in rows]
        table["sizes"][: sizes.size] = sizes
        table["first_chunk"] = ends[-1]
        table["first_chunk"][0] = 0
        table["first_chunk"][1 : sizes.size] = ends[:-1]
        yield by_value(table), int(ends[-1]), part
