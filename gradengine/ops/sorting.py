"""Sorting along a dim. Only places are computed here; the gradients are those of picking elements.

nan counts as larger than any number, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

from gradengine.devices import array_module
from gradengine.dtypes import widened
from gradengine.operation import operation
from gradengine.ops.dims import normalized_dim
from gradengine.ops.indexing import ValuesIndices, pick_along
from gradengine.ops.shape import reshape


def _order(x: Any, dim: int, descending: bool) -> Any:
    """Return the places of an array's elements in order; equal elements keep theirs."""
    xp = array_module(x)
    if not descending:
        return xp.argsort(x, axis=dim, kind="stable")
    # Sorted from the back, then turned round, so that equal elements keep their order here too.
    backwards = xp.argsort(xp.flip(x, dim), axis=dim, kind="stable")
    return x.shape[dim] - 1 - xp.flip(backwards, dim)


@operation
def _argsort(x, *, dim, descending):
    return _order(widened(x), dim, descending)  # CuPy sorts no bfloat16


@operation
def _argtop(x, *, k, dim, largest):
    """Return the places of the k largest or smallest elements along `dim`, best first."""
    xp, x = array_module(x), widened(x)
    size = x.shape[dim]
    if k == 0 or 2 * k > size:
        return xp.moveaxis(xp.moveaxis(_order(x, dim, largest), dim, 0)[:k], 0, dim)
    # A partition finds the k elements without sorting the others.
    places = xp.argpartition(x, size - k if largest else k - 1, axis=dim)
    places = xp.moveaxis(places, dim, 0)
    places = xp.moveaxis(places[-k:] if largest else places[:k], 0, dim)
    places = xp.sort(places, axis=dim)  # equal elements in the order in which they stand
    best = _order(xp.take_along_axis(x, places, dim), dim, largest)
    return xp.take_along_axis(places, best, dim)


def _sorted(x: Any, dim: int, places: Any, label: str) -> ValuesIndices:
    return ValuesIndices(pick_along(x, dim, places, label), places)


def sort(x: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> ValuesIndices:
    """Return the pair (values, indices) of x's elements in order along `dim`.

    Equal elements always keep their order, whether `stable` or not: results are the same on every
    device. nan comes after all numbers.
    """
    if x.ndim == 0:
        one = sort(reshape(x, (1,)), dim)
        return ValuesIndices(reshape(one.values, ()), reshape(one.indices, ()))
    dim = normalized_dim("sort", dim, x.ndim)
    return _sorted(x, dim, _argsort(x, dim=dim, descending=descending), "SortBackward0")


def argsort(x: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """Return the int64 indices that `sort` returns."""
    if x.ndim == 0:
        return reshape(argsort(reshape(x, (1,)), dim, descending), ())
    dim = normalized_dim("argsort", dim, x.ndim)
    return _argsort(x, dim=dim, descending=descending)


def topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> ValuesIndices:
    """Return the pair (values, indices) of the k largest (or smallest) elements along `dim`.

    They come in order, whether `sorted` or not. Raises ValueError unless 0 <= k <= x.shape[dim].
    """
    if x.ndim == 0:
        values, indices = topk(reshape(x, (1,)), k, dim, largest)
        shape = () if k == 1 else (0,)
        return ValuesIndices(reshape(values, shape), reshape(indices, shape))
    dim = normalized_dim("topk", dim, x.ndim)
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(
            "topk: k must be in range (0 <= k <= x.shape[dim]); "
            f"got k={k}, x.shape[{dim}]={x.shape[dim]}"
        )
    return _sorted(x, dim, _argtop(x, k=k, dim=dim, largest=largest), "TopkBackward0")
