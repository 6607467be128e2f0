"""Splitting and joining: slices, pieces of a whole, and wholes of pieces."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from gradengine.devices import array_module
from gradengine.dtypes import result_type
from gradengine.operation import cast, operation
from gradengine.ops.dims import in_front, normalized_dim, numpy_spelled
from gradengine.ops.shape import reshape

# ---- slices and their adjoint --------------------------------------------------------------------


@operation(label=lambda index, label: label, view=True)
def slices(x, *, index, label):
    """Return x[index] for a basic index that ends with, or holds, an Ellipsis: always a view."""
    return x[index]


@operation
def assemble(*pieces, indices, shape):
    """Return zeros of `shape` with each piece written at its basic index; none overlap."""
    # The pieces' layout is kept. CuPy ignores an empty shape, hence the reshape.
    out = array_module(pieces[0]).zeros_like(pieces[0], shape=shape).reshape(shape)
    for piece, index in zip(pieces, indices, strict=True):
        out[index] = piece
    return out


def _piece_of(grad: Any, position: int, indices: Any) -> Any:
    return slices(grad, index=indices[position], label="SliceBackward0")


slices.pullbacks(x=lambda grad, x_shape, index: assemble(grad, indices=(index,), shape=x_shape))
assemble.pullbacks(pieces=_piece_of)


def narrow(x: Any, dim: int, start: int, length: int) -> Any:
    """Return the view of x that holds `length` places of `dim` from `start`, which may be negative.

    Raises IndexError if they do not lie within the dim.
    """
    dim = normalized_dim("narrow", dim, x.ndim)
    size = x.shape[dim]
    first = start + size if start < 0 else start
    if length < 0 or not 0 <= first <= size - length:
        raise IndexError(
            "narrow: the places must lie within dim (0 <= start, start + length <= x.shape[dim]); "
            f"got start={start}, length={length}, x.shape[{dim}]={size}"
        )
    return _narrow(x, dim, first, length)


def _narrow(x: Any, dim: int, start: int, length: int) -> Any:
    index = in_front(dim, slice(start, start + length))
    return slices(x, index=index, label="SliceBackward0")


# ---- splitting -----------------------------------------------------------------------------------
#
# A gradient of full size for each of n pieces would cost O(n^2). So all pieces of one split hang
# on one node, `_divide`: each piece's pullback gives it a `Share`, shares add up by being
# collected, and `_divide` writes them into one array.


class Share:
    """Parts of the gradient of a divided tensor: what `assemble` makes the whole of."""

    __slots__ = ("dtype", "indices", "pieces", "shape")

    def __init__(self, piece: Any, index: Any, shape: tuple[int, ...]) -> None:
        self.pieces = [piece]
        self.indices = [index]
        self.shape = shape
        self.dtype = piece.dtype

    def __add__(self, other: Share) -> Share:
        self.pieces += other.pieces
        self.indices += other.indices
        return self


@operation(view="one of several")
def _divide(x):
    return x


@operation(label=lambda index, label: label, view="one of several")
def _piece(x, *, index, label):
    return x[index]


_divide.pullbacks(
    x=lambda grad: assemble(*grad.pieces, indices=tuple(grad.indices), shape=grad.shape)
)
_piece.pullbacks(x=lambda grad, x_shape, index: Share(grad, index, x_shape))


def _split(x: Any, dim: int, sizes: Sequence[int], label: str) -> tuple[Any, ...]:
    whole, start, pieces = _divide(x), 0, []
    for size in sizes:
        index = in_front(dim, slice(start, start + size))
        pieces.append(_piece(whole, index=index, label=label))
        start += size
    return tuple(pieces)


def split(x: Any, split_size_or_sections: Any, dim: int = 0) -> tuple[Any, ...]:
    """Return views that divide x along `dim`: of one size, the last maybe smaller, or of several.

    Raises ValueError for a size below 1 (of an empty dim, below 0), or sizes that do not add up to
    the dim's.
    """
    dim = normalized_dim("split", dim, x.ndim)
    total = x.shape[dim]
    if isinstance(split_size_or_sections, Sequence):
        sizes = list(split_size_or_sections)
        if builtins.sum(sizes) != total or any(size < 0 for size in sizes):
            raise ValueError(
                "split: the sizes must add up to the dim's (sum(sizes) == x.shape[dim]); "
                f"got sizes={sizes}, x.shape[{dim}]={total}"
            )
        return _split(x, dim, sizes, "SplitWithSizesBackward0")
    size = split_size_or_sections
    if size < (1 if total else 0):
        raise ValueError(f"split: the size of the pieces must be positive; got split_size={size}")
    return _split(x, dim, _even_sizes(total, size), "SplitBackward0")


def _even_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, max(size, 1))] or [0]


def chunk(x: Any, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    """Return views of at most `chunks` equal pieces of x along `dim`, the last maybe smaller.

    Of an empty dim all `chunks` pieces are empty.
    """
    if chunks < 1:
        raise ValueError(f"chunk: chunks must be positive; got chunks={chunks}")
    dim = normalized_dim("chunk", dim, x.ndim)
    total = x.shape[dim]
    sizes = _even_sizes(total, -(-total // chunks)) if total else [0] * chunks
    return _split(x, dim, sizes, "SplitBackward0")


def unbind(x: Any, dim: int = 0) -> tuple[Any, ...]:
    """Return the views of x at each place of `dim`, without that dim."""
    dim = normalized_dim("unbind", dim, x.ndim)
    whole = _divide(x)
    return tuple(
        [
            _piece(whole, index=in_front(dim, place), label="UnbindBackward0")
            for place in range(x.shape[dim])
        ]
    )


# ---- joining -------------------------------------------------------------------------------------


@operation
def _cat(*tensors, dim, indices):
    return array_module(tensors[0]).concatenate(tensors, axis=dim)


@operation
def _stack(*tensors, dim, indices):
    return array_module(tensors[0]).stack(tensors, axis=dim)


_cat.pullbacks(tensors=_piece_of)
_stack.pullbacks(tensors=_piece_of)


def _of_one_dtype(name: str, tensors: Any) -> list[Any]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{name}: there must be at least one tensor; got tensors=[]")
    dtype = result_type(*tensors)
    return [x if x.dtype == dtype else cast(x, dtype=dtype) for x in tensors]


@numpy_spelled
def cat(tensors: Any, dim: int = 0) -> Any:
    """Return the tensors joined along `dim`, in their common dtype. Shapes must agree elsewhere.

    An empty 1-D tensor, shape (0,), joins with anything. Raises ValueError where shapes disagree.
    """
    tensors = _of_one_dtype("cat", tensors)
    tensors = [x for x in tensors if x.shape != (0,)] or tensors[:1]
    first = tensors[0].shape
    dim = normalized_dim("cat", dim, len(first))
    indices, start = [], 0
    for x in tensors:
        if len(x.shape) != len(first) or (
            x.shape[:dim] != first[:dim] or x.shape[dim + 1 :] != first[dim + 1 :]
        ):
            raise ValueError(
                "cat: shapes must agree in all dims but dim; "
                f"got dim={dim}, shapes {', '.join(str(tuple(x.shape)) for x in tensors)}"
            )
        indices.append(in_front(dim, slice(start, start + x.shape[dim])))
        start += x.shape[dim]
    return _cat(*tensors, dim=dim, indices=indices)


concat = cat


@numpy_spelled
def stack(tensors: Any, dim: int = 0) -> Any:
    """Return the tensors joined along a new dim. Raises ValueError unless all have one shape."""
    tensors = _of_one_dtype("stack", tensors)
    if any(x.shape != tensors[0].shape for x in tensors):
        raise ValueError(
            "stack: all shapes must be equal; "
            f"got shapes {', '.join(str(tuple(x.shape)) for x in tensors)}"
        )
    dim = normalized_dim("stack", dim, tensors[0].ndim + 1)
    indices = [in_front(dim, place) for place in range(len(tensors))]
    return _stack(*tensors, dim=dim, indices=indices)


def hstack(tensors: Any) -> Any:
    """Return the tensors joined along dim 1, or along dim 0 if they are 1-D; 0-d become 1-D."""
    tensors = [reshape(x, (1,)) if x.ndim == 0 else x for x in tensors]
    return cat(tensors, dim=0 if tensors and tensors[0].ndim == 1 else 1)


def vstack(tensors: Any) -> Any:
    """Return the tensors joined along dim 0; 0-d and 1-D become rows of a matrix."""
    return cat([reshape(x, (1, -1)) if x.ndim < 2 else x for x in tensors], dim=0)
