"""Dims as callers give them: counted from either end, one or several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a sequence as a tuple, and a single value as a tuple of one."""
    if type(value) is tuple:
        return value
    return tuple(value) if isinstance(value, Sequence) else (value,)


def normalized_dim(name: str, dim: int, ndim: int) -> int:
    """Return `dim` counted from the front. Raises IndexError in the name of operation `name`."""
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"{name}: dim must be in [{-ndim}, {ndim - 1}] (-ndim <= dim < ndim); "
            f"got dim={dim}, ndim={ndim}"
        )
    return dim % ndim


def normalized_dims(name: str, dim: Any, ndim: int) -> tuple[int, ...]:
    """Return an int or a sequence of ints as dims counted from the front, in the order given.

    A 0-d tensor may be given dim 0 or -1, as in PyTorch. Raises ValueError for a repeated dim.
    """
    given = as_tuple(dim)
    number = ndim == 0 and all(-1 <= one <= 0 for one in given)
    dims = tuple([normalized_dim(name, one, 1 if number else ndim) for one in given])
    if len(set(dims)) != len(dims):
        raise ValueError(f"{name}: a dim must not appear twice; got dim={dim}, ndim={ndim}")
    return () if number else dims


def numpy_spelled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `axis` and `keepdims` stand for `dim` and `keepdim`, as PyTorch does."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        for ours, theirs in (("dim", "axis"), ("keepdim", "keepdims")):
            if theirs in options:
                options[ours] = options.pop(theirs)
        return function(*args, **options)

    return call


def in_front(dim: int, item: Any) -> tuple[Any, ...]:
    """Return the basic index that applies `item` to axis `dim` and keeps the others whole."""
    # The Ellipsis makes NumPy give a 0-d view, not a scalar, when every axis is taken.
    return (*[slice(None)] * dim, item, ...)
