"""The inputs of a call: for given shapes, arrays of every dtype, layout and kind of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DTYPES = ("float64", "float32", "int64", "int32", "uint8", "bool")
EDGES = np.array([np.nan, 1.5, np.inf, -0.0, -np.inf, 0.0, -1.0, 0.5, 2.0, -0.0, 1.0])
# Whole numbers and halves, each several times: ties of maxima, kinks of derivatives, bounds of clamps.
TIES = np.array([1.0, 0.0, -1.0, 1.0, 2.0, 0.5, -1.0, 0.0, 6.0, -0.5])

Arrays = tuple[np.ndarray, ...]


def ordinary(shape: tuple[int, ...], place: int) -> np.ndarray:
    """Return normally distributed numbers, the same at each run, other ones for each input of a call."""
    return np.random.default_rng([place, *shape]).standard_normal(shape)


def _cycle(values: np.ndarray, array: np.ndarray, place: int) -> np.ndarray:
    """Fill an array's shape with the values in turn, so that two inputs meet in many pairs."""
    return values[(np.arange(array.size) * (place + 1) + 3 * place) % len(values)].reshape(
        array.shape
    )


def _as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return small numbers of a dtype: integers with zeros and repeats, positive ones where unsigned."""
    if dtype.startswith("float"):
        return array.astype(dtype)
    whole = np.rint(np.nan_to_num(array, posinf=9, neginf=-9).clip(-9, 9) * 2)
    return np.asarray(abs(whole) if dtype == "uint8" else whole).astype(dtype)


def _strided(array: np.ndarray) -> np.ndarray:
    """Return the same numbers with gaps between them, the first dim running fastest in memory."""
    if array.ndim == 0:
        return array
    memory = np.full((*(2 * size for size in array.shape[::-1]),), -7, array.dtype)
    view = memory.T[(slice(None, None, 2),) * array.ndim]
    view[...] = array
    return view


def _expanded(array: np.ndarray) -> np.ndarray:
    """Return the first place of the last dim, repeated without memory."""
    if array.ndim == 0 or array.size == 0:
        return array
    return np.broadcast_to(array[..., :1], array.shape)


KINDS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    **{name: lambda array, place, name=name: _as_dtype(array, name) for name in DTYPES},
    "strided": lambda array, place: _strided(array),
    "expanded": lambda array, place: _expanded(array),
    "edges": lambda array, place: _cycle(EDGES, array, place),
    "ties": lambda array, place: _cycle(TIES, array, place),
    "float32 edges": lambda array, place: _cycle(EDGES, array, place).astype("float32"),
}


def variations(inputs: Arrays, kinds: Any = KINDS) -> Iterator[tuple[str, Arrays]]:
    """Give the inputs in every kind; those that are not float64 (indices, masks) stay as they are.

    Kinds that make no difference are left out: a layout where nothing has two elements, for example.
    """
    floats = [array.dtype == np.float64 for array in inputs]
    if not any(floats):
        yield "as given", inputs
        return
    largest = max(array.size for array, varied in zip(inputs, floats, strict=True) if varied)
    for kind in kinds:
        if (largest == 0 and kind not in DTYPES) or (
            largest < 2 and kind in ("strided", "expanded")
        ):
            continue
        make = KINDS[kind]
        yield (
            kind,
            tuple(
                make(array, place) if varied else array
                for place, (array, varied) in enumerate(zip(inputs, floats, strict=True))
            ),
        )


def pairs_of_dtypes(inputs: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Give two inputs in every pair of unequal dtypes."""
    x, y = inputs
    for first in DTYPES:
        for second in DTYPES:
            if first != second:
                yield f"{first}, {second}", (_as_dtype(x, first), _as_dtype(y, second))
