"""Shape: reshaping, permuting, expanding, repeating, flipping, rolling, triangles and diagonals.

Where NumPy gives a view the result is one: it shares memory, and a write to either is seen by both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.devices import array_module
from gradengine.dtypes import narrowed, sum_dtype
from gradengine.operation import broadcast_to as _broadcast_to
from gradengine.operation import operation
from gradengine.ops.dims import as_tuple, normalized_dim, normalized_dims

# ---- reshaping -----------------------------------------------------------------------------------


@operation(label=lambda shape, label: label, view=True)
def _reshape(x, *, shape, label):
    return x.reshape(shape)


_reshape.pullbacks(x=lambda grad, x_shape: _reshape(grad, shape=x_shape, label="ViewBackward0"))


def reshape(x: Any, shape: Any) -> Any:
    """Return the elements of x, in C order, in `shape`; one size may be -1. A view where possible.

    Raises ValueError if the sizes do not multiply to the number of elements.
    """
    shape = as_tuple(shape)
    if min(shape, default=0) < -1:  # NumPy takes any negative size for -1
        raise _invalid_shape("reshape", shape, x.shape)
    try:
        return _reshape(x, shape=shape, label="ViewBackward0")
    except ValueError:
        raise _invalid_shape("reshape", shape, x.shape) from None


def _invalid_shape(name: str, shape: tuple[int, ...], current: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{name}: shape is invalid for x, it must hold as many elements (prod(shape) == "
        f"prod(x.shape)), with at most one -1; got shape={shape}, x.shape={tuple(current)}"
    )


@operation(label="ViewBackward0", view=True)
def _view(x, *, shape):
    out = x.reshape(shape)
    if out.base is not x and (out.base is None or out.base is not x.base):
        raise RuntimeError(
            "view: shape is not compatible with x's strides, so it would need a copy "
            f"(use reshape); got shape={shape}, x.shape={x.shape}"
        )
    return out


_view.pullbacks(x=lambda grad, x_shape: _reshape(grad, shape=x_shape, label="ViewBackward0"))


def view(x: Any, shape: Any) -> Any:
    """Return x in `shape`, sharing its memory; one size may be -1.

    Raises ValueError if the sizes do not fit, RuntimeError if x's strides would need a copy.
    """
    shape = as_tuple(shape)
    if min(shape, default=0) < -1:
        raise _invalid_shape("view", shape, x.shape)
    try:
        return _view(x, shape=shape)
    except ValueError:
        raise _invalid_shape("view", shape, x.shape) from None


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Return x with the dims from `start_dim` to `end_dim`, both included, made one.

    Raises ValueError if start_dim comes after end_dim.
    """
    start = normalized_dim("flatten", start_dim, max(x.ndim, 1))  # a number is a row of one
    end = normalized_dim("flatten", end_dim, max(x.ndim, 1))
    if start > end:
        raise ValueError(
            "flatten: start_dim must not come after end_dim (start_dim <= end_dim); "
            f"got start_dim={start_dim}, end_dim={end_dim}, ndim={x.ndim}"
        )
    if x.ndim == 0:
        return reshape(x, (1,))
    if start == end:
        return x
    size = math.prod(x.shape[start : end + 1])
    return reshape(x, (*x.shape[:start], size, *x.shape[end + 1 :]))


def ravel(x: Any) -> Any:
    """Return the elements of x in one dim, in C order."""
    return reshape(x, (-1,)) if x.ndim != 1 else x


def unflatten(x: Any, dim: int, sizes: Any) -> Any:
    """Return x with `dim` split into dims of `sizes`; one may be -1.

    Raises ValueError if they do not multiply to the dim's size.
    """
    dim = normalized_dim("unflatten", dim, x.ndim)
    sizes = tuple(sizes)
    known = math.prod(size for size in sizes if size != -1)
    unknown = sizes.count(-1)
    fits = known > 0 == x.shape[dim] % known if unknown and known else known == x.shape[dim]
    if not fits or unknown > 1 or (unknown and not known):
        raise ValueError(
            "unflatten: sizes must multiply to the size of dim (prod(sizes) == x.shape[dim]); "
            f"got sizes={sizes}, x.shape[{dim}]={x.shape[dim]}"
        )
    filled = tuple(x.shape[dim] // known if size == -1 else size for size in sizes)
    return reshape(x, (*x.shape[:dim], *filled, *x.shape[dim + 1 :]))


def unsqueeze(x: Any, dim: int) -> Any:
    """Return a view of x with a dim of size 1 put in at `dim`."""
    dim = normalized_dim("unsqueeze", dim, x.ndim + 1)
    return _reshape(x, shape=(*x.shape[:dim], 1, *x.shape[dim:]), label="UnsqueezeBackward0")


def squeeze(x: Any, dim: Any = None) -> Any:
    """Return a view of x without its dims of size 1: all, or those in `dim` (an int or a tuple)."""
    label = "SqueezeBackward0"
    dims = tuple(range(x.ndim))
    if dim is not None:
        label = "SqueezeBackward2" if isinstance(dim, Sequence) else "SqueezeBackward1"
        dims = normalized_dims("squeeze", dim, x.ndim)
    kept = tuple(size for axis, size in enumerate(x.shape) if axis not in dims or size != 1)
    return _reshape(x, shape=kept, label=label)


# ---- order of dims -------------------------------------------------------------------------------


@operation(label=lambda dims, label: label, view=True)
def _permute(x, *, dims, label):
    return x.transpose(dims)


def _unpermute(grad: Any, dims: tuple[int, ...], label: str) -> Any:
    inverse = tuple(sorted(range(len(dims)), key=dims.__getitem__))
    return _permute(grad, dims=inverse, label=label)


_permute.pullbacks(x=_unpermute)


def permute(x: Any, dims: Any) -> Any:
    """Return a view of x whose axis i is x's axis dims[i].

    Raises ValueError unless each axis is named once.
    """
    order = normalized_dims("permute", dims, x.ndim)
    if len(as_tuple(dims)) != x.ndim:
        raise ValueError(
            "permute: dims must name each of x's dims once (len(dims) == ndim); "
            f"got dims={dims}, ndim={x.ndim}"
        )
    return _permute(x, dims=order, label="PermuteBackward0")


def _transposed(x: Any, dim0: int, dim1: int, label: str) -> Any:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(x, dims=tuple(order), label=label)


def transpose(x: Any, dim0: int, dim1: int) -> Any:
    """Return a view of x with two dims swapped."""
    if x.ndim == 0 and {dim0, dim1} <= {0, -1}:
        return x
    dim0 = normalized_dim("transpose", dim0, x.ndim)
    dim1 = normalized_dim("transpose", dim1, x.ndim)
    return _transposed(x, dim0, dim1, "TransposeBackward0")


swapaxes = transpose


def t(x: Any) -> Any:
    """Return a view of a matrix transposed; x itself if 0-d or 1-D. ValueError for more dims."""
    if x.ndim > 2:
        raise ValueError(
            f"t: x must have at most two dims (x.ndim <= 2); got x.shape={tuple(x.shape)}"
        )
    return x if x.ndim < 2 else _transposed(x, 0, 1, "TBackward0")


def movedim(x: Any, source: Any, destination: Any) -> Any:
    """Return a view of x with the dims `source` moved to `destination` (ints or tuples)."""
    sources = normalized_dims("movedim", source, x.ndim)
    destinations = normalized_dims("movedim", destination, x.ndim)
    if len(sources) != len(destinations):
        raise ValueError(
            "movedim: source and destination must name equally many dims; "
            f"got source={source}, destination={destination}"
        )
    order = [dim for dim in range(x.ndim) if dim not in sources]
    for place, dim in sorted(zip(destinations, sources, strict=True)):
        order.insert(place, dim)
    return _permute(x, dims=tuple(order), label="PermuteBackward0")


# ---- expanding and repeating ---------------------------------------------------------------------


def expand(x: Any, shape: Any) -> Any:
    """Return a read-only view of x repeated along new leading and size-1 dims up to `shape`.

    -1 keeps the size of an existing dim. Raises ValueError for a size neither 1 nor the target's.
    """
    shape = as_tuple(shape)
    added = len(shape) - x.ndim
    current = (*[1] * added, *x.shape)
    target = tuple(
        old if new == -1 and place >= added else new
        for place, (new, old) in enumerate(zip(shape, current, strict=False))
    )
    if added < 0 or any(
        new < 0 or old not in (1, new) for new, old in zip(target, current, strict=True)
    ):
        raise ValueError(
            "expand: each size of x must be 1 or the expanded size, aligned at the last dim; "
            f"got shape={shape}, x.shape={tuple(x.shape)}"
        )
    return _broadcast_to(x, shape=target)


broadcast_to = expand


def broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """Return the tensors expanded to their common shape. Raises ValueError if there is none."""
    shapes = [tuple(x.shape) for x in tensors]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            f"broadcast_tensors: shapes must broadcast together; got {', '.join(map(str, shapes))}"
        ) from None
    return tuple([x if x.shape == shape else _broadcast_to(x, shape=shape) for x in tensors])


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Any, ...]:
    """Return the coordinates of a grid: one tensor for each 1-D or 0-d input, all of one shape.

    `indexing` is "ij" (matrix order) or "xy" (the first two dims swapped). Raises ValueError for
    another, and for inputs of more dims.
    """
    if indexing not in ("ij", "xy"):
        raise ValueError(f'meshgrid: indexing must be "ij" or "xy"; got indexing={indexing!r}')
    if len(tensors) == 1 and isinstance(tensors[0], Sequence):
        tensors = tuple(tensors[0])
    if any(x.ndim > 1 for x in tensors):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"meshgrid: inputs must be 1-D or 0-d (x.ndim <= 1); got shapes {shapes}")
    lines = [reshape(x, (-1,)) for x in tensors]
    places = list(range(len(lines)))
    if indexing == "xy" and len(lines) > 1:
        places[:2] = [1, 0]
    shape = tuple(lines[place].shape[0] for place in places)
    return tuple(
        _broadcast_to(reshape(x, (-1, *[1] * (len(lines) - 1 - place))), shape=shape)
        for x, place in zip(lines, places, strict=True)
    )


@operation
def _repeat(x, *, repeats):
    return array_module(x).tile(x, repeats)


@operation
def _sum_repeats(x, *, shape):
    """Sum the copies that `_repeat` makes of an array of `shape`."""
    counts = [size // max(one, 1) for size, one in zip(x.shape, shape, strict=True)]
    folded = [size for pair in zip(counts, shape, strict=True) for size in pair]
    axes = tuple(range(0, 2 * x.ndim, 2))
    return narrowed(x.reshape(folded).sum(axis=axes, dtype=sum_dtype(x.dtype)), x.dtype)


_repeat.pullbacks(x=lambda grad, x_shape: _sum_repeats(grad, shape=x_shape))
_sum_repeats.pullbacks(
    x=lambda grad, x_shape, shape: _repeat(
        grad, repeats=tuple(size // max(one, 1) for size, one in zip(x_shape, shape, strict=True))
    )
)


def repeat(x: Any, repeats: Any) -> Any:
    """Return x copied repeats[i] times along dim i; more repeats than dims add leading dims.

    Raises ValueError for fewer repeats than dims, and for negative ones.
    """
    repeats = as_tuple(repeats)
    added = len(repeats) - x.ndim
    if added < 0 or min(repeats, default=0) < 0:
        raise ValueError(
            "repeat: there must be a number of repeats for each dim "
            "(len(repeats) >= ndim, min(repeats) >= 0); "
            f"got repeats={repeats}, ndim={x.ndim}"
        )
    if added:
        x = reshape(x, (*[1] * added, *x.shape))
    return _repeat(x, repeats=repeats)


def tile(x: Any, dims: Any) -> Any:
    """Return x copied dims[i] times along dim i; missing leading counts are 1."""
    dims = as_tuple(dims)
    return repeat(x, (*[1] * (x.ndim - len(dims)), *dims))


# ---- flipping, rolling, triangles ----------------------------------------------------------------


@operation
def _flip(x, *, dims):
    return array_module(x).flip(x, dims).copy(order="K")  # a copy, as in PyTorch


_flip.pullbacks(x=lambda grad, dims: _flip(grad, dims=dims))


def flip(x: Any, dims: Any) -> Any:
    """Return a copy of x with the order of places in `dims` (an int or a tuple) reversed."""
    return _flip(x, dims=normalized_dims("flip", dims, x.ndim))


@operation
def _roll(x, *, shifts, dims):
    return array_module(x).roll(x, shifts, axis=dims)


_roll.pullbacks(
    x=lambda grad, shifts, dims: _roll(grad, shifts=tuple(-one for one in shifts), dims=dims)
)


def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    """Return x with places moved on by `shifts` along `dims`, the last coming back in at the front.

    Without dims, x is rolled as if it were flat. Shifts of one dim add up. Raises ValueError unless
    each dim has one shift.
    """
    shifts = as_tuple(shifts)
    if dims is None and len(shifts) == 1:
        return reshape(_roll(ravel(x), shifts=shifts, dims=(0,)), x.shape)
    named = () if dims is None else as_tuple(dims)
    places = tuple([normalized_dim("roll", dim, x.ndim) for dim in named])
    if len(shifts) != len(places):
        raise ValueError(
            f"roll: there must be one shift for each dim; got shifts={shifts}, dims={dims}"
        )
    return _roll(x, shifts=shifts, dims=places)


@operation
def _tril(x, *, diagonal):
    return narrowed(array_module(x).tril(x, diagonal), x.dtype)


@operation
def _triu(x, *, diagonal):
    return narrowed(array_module(x).triu(x, diagonal), x.dtype)


_tril.pullbacks(x=lambda grad, diagonal: _tril(grad, diagonal=diagonal))
_triu.pullbacks(x=lambda grad, diagonal: _triu(grad, diagonal=diagonal))


def _check_matrix(name: str, x: Any) -> None:
    if x.ndim < 2:
        raise ValueError(
            f"{name}: x must have at least two dims (x.ndim >= 2); got x.shape={tuple(x.shape)}"
        )


def tril(x: Any, diagonal: int = 0) -> Any:
    """Return the last two dims' elements on and below a diagonal (0: the main one), else zeros."""
    _check_matrix("tril", x)
    return _tril(x, diagonal=diagonal)


def triu(x: Any, diagonal: int = 0) -> Any:
    """Return the last two dims' elements on and above a diagonal (0: the main one), else zeros."""
    _check_matrix("triu", x)
    return _triu(x, diagonal=diagonal)


@operation(view=True)
def _diagonal(x, *, offset, dim1, dim2):
    out = x.diagonal(offset, dim1, dim2)
    if type(out) is np.ndarray and x.flags.writeable:  # as CuPy's is
        out.flags.writeable = True
    return out


@operation
def _diagonal_zeros(x, *, offset, dim1, dim2, shape):
    """Return zeros of `shape` whose diagonal is x: the adjoint of `_diagonal`."""
    xp = array_module(x)
    out = xp.zeros(shape, x.dtype)
    others = [dim for dim in range(len(shape)) if dim not in (dim1, dim2)]
    places = xp.arange(x.shape[-1])
    matrices = out.transpose(*others, dim1, dim2)
    matrices[..., places + max(0, -offset), places + max(0, offset)] = x
    return out


_diagonal.pullbacks(
    x=lambda grad, x_shape, offset, dim1, dim2: _diagonal_zeros(
        grad, offset=offset, dim1=dim1, dim2=dim2, shape=x_shape
    )
)
_diagonal_zeros.pullbacks(
    x=lambda grad, offset, dim1, dim2: _diagonal(grad, offset=offset, dim1=dim1, dim2=dim2)
)


def diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Return a view of the diagonal of two dims of x, as the last dim.

    `offset` counts upwards from the main diagonal. Raises ValueError if the two dims are one.
    """
    first, second = (
        normalized_dim("diagonal", dim1, x.ndim),
        normalized_dim("diagonal", dim2, x.ndim),
    )
    if first == second:
        raise ValueError(
            f"diagonal: dim1 and dim2 must differ; got dim1={dim1}, dim2={dim2}, ndim={x.ndim}"
        )
    return _diagonal(x, offset=offset, dim1=first, dim2=second)


def diag(x: Any, diagonal: int = 0) -> Any:
    """Return a square matrix with the vector x on a diagonal, or the diagonal of the matrix x."""
    if x.ndim == 2:
        return _diagonal(x, offset=diagonal, dim1=0, dim2=1)
    if x.ndim != 1:
        raise ValueError(f"diag: x must have one or two dims; got x.shape={tuple(x.shape)}")
    size = x.shape[0] + abs(diagonal)
    return _diagonal_zeros(x, offset=diagonal, dim1=0, dim2=1, shape=(size, size))


# ---- copies --------------------------------------------------------------------------------------


@operation(label="CloneBackward0")
def _copy(x, *, order):
    return kernels.copy_in_order(x) if order == "C" else x.copy(order=order)


_copy.pullbacks(x=lambda grad: grad)


def clone(x: Any) -> Any:
    """Return a differentiable copy of x, in the same memory layout."""
    return _copy(x, order="K")


def contiguous(x: Any) -> Any:
    """Return x if its elements lie in memory in C order, else a copy in which they do."""
    array = getattr(x, "array", x)
    return x if array.flags.c_contiguous else _copy(x, order="C")
