"""Indexing: reading and writing chosen elements, by position or by mask.

Reading comes down to one operation, `_pick`, and its adjoint `_put_back`, which adds elements to
zeros at the places that `_pick` reads. Places are named by `axes` and `index`: one integer array
for each of these axes, broadcast together, the other axes whole. None in place of an array stands
for the index's own positions along that axis, which is how `gather` names its other axes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gradengine import devices, kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module
from gradengine.dtypes import narrowed, sum_dtype
from gradengine.kernels import settings
from gradengine.operation import array_of, node_of, operation, sum_to_shape
from gradengine.ops.conversion import kept_for_backward, to_dtype
from gradengine.ops.dims import normalized_dim
from gradengine.ops.joining import slices, unbind
from gradengine.ops.shape import broadcast_tensors, expand, ravel, reshape
from gradengine.precision import widest

Axes = tuple[int, ...]
Index = tuple[Any, ...]


class ValuesIndices(NamedTuple):
    """Elements and where they were: what max, min, sort and topk along a dim return."""

    values: Any
    indices: Any


# ---- places --------------------------------------------------------------------------------------


def _filled(index: Index) -> Index:
    """Return the index with an array of positions in place of each None."""
    place = next(axis for axis, one in enumerate(index) if one is not None)
    given = index[place]
    xp, reduced = array_module(given), given.ndim < len(index)

    def positions(axis: int) -> Any:
        own = axis - 1 if reduced and axis > place else axis
        return xp.arange(given.shape[own]).reshape(-1, *[1] * (given.ndim - 1 - own))

    return tuple([positions(axis) if one is None else one for axis, one in enumerate(index)])


def _key(ndim: int, axes: Axes, index: Index) -> Index:
    """Return what stands between brackets to name the places in an array."""
    key: list[Any] = [slice(None)] * ndim
    for axis, one in zip(axes, _filled(index), strict=True):
        key[axis] = one
    return tuple(key)


def _add_at(name: str, out: Any, values: Any, axes: Axes, index: Index) -> None:
    """Add values at the places of a C-contiguous array, as often as each place is named."""
    positions = _positions(out, axes, index)
    kernels.add_at(name, out.reshape(-1), positions.reshape(-1), values.reshape(-1))


def _positions(array: Any, axes: Axes, index: Index) -> Any:
    """Return where each place is in the flat array, laid out as array[key] is."""
    xp, shape = array_module(array), array.shape
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    chosen: Any = 0
    for axis, one in zip(axes, _filled(index), strict=True):
        chosen = chosen + one % max(shape[axis], 1) * steps[axis]  # % makes negatives positive
    # The indexed dims come where the first axis was if the axes are neighbours, else in front.
    place = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0
    others = [axis for axis in range(len(shape)) if axis not in axes]
    positions = chosen.reshape((*chosen.shape, *[1] * (len(others) - place)))
    for rank, axis in enumerate(others):
        behind = len(others) - 1 - rank + (chosen.ndim if rank < place else 0)
        positions = positions + (xp.arange(shape[axis]) * steps[axis]).reshape(-1, *[1] * behind)
    return positions


@operation(label=lambda axes, index, unique, label: label)
def _pick(x, *, axes, index, unique, label):
    """Return the elements of x at the places; `unique` says that none is named twice."""
    return x[_key(x.ndim, axes, index)]


@operation
def _put_back(x, *, axes, index, unique, shape):
    """Return zeros of `shape` with x added at the places: the adjoint of `_pick`."""
    if unique:
        out = array_module(x).zeros(shape, x.dtype)
        out[_key(out.ndim, axes, index)] = x
        return out
    out = array_module(x).zeros(shape, sum_dtype(x.dtype))
    _add_at("the gradient of indexing", out, x, axes, index)
    return narrowed(out, x.dtype)


_pick.pullbacks(
    x=lambda grad, x_shape, axes, index, unique: _put_back(
        grad, axes=axes, index=index, unique=unique, shape=x_shape
    )
)
_put_back.pullbacks(
    x=lambda grad, axes, index, unique: _pick(
        grad, axes=axes, index=index, unique=unique, label="IndexBackward0"
    )
)


def _along(ndim: int, dim: int, index: Any) -> dict[str, Any]:
    """Return the places that `index` names along `dim`, at its own positions in the other dims."""
    return {"axes": tuple(range(ndim)), "index": (*[None] * dim, index, *[None] * (ndim - 1 - dim))}


def pick_along(x: Any, dim: int, indices: Any, label: str) -> Any:
    """Return x's elements at `indices` along `dim`, none of them twice.

    `indices` has x's other dims, and `dim` with any size or not at all.
    """
    places = _along(x.ndim, dim, kept_for_backward(indices, x))
    return _pick(x, **places, unique=True, label=label)


# ---- brackets ------------------------------------------------------------------------------------


def _on_device_of(x: Any, array: Any) -> Any:
    """Return a mask as it is and integers as int64, on x's device."""
    if array.dtype.kind != "b":
        array = array.astype(np.int64, copy=False)
    x = array_of(x)
    if type(x) is np.ndarray and type(array) is np.ndarray:
        return array
    return devices.to_device(array, devices.device_of(x))


@operation
def _places(mask):
    """Return an int64 array for each axis: where the mask holds. Waits for the GPU."""
    return mask.nonzero()


class _Plan(NamedTuple):
    """An index in the two steps in which PyTorch applies it."""

    basic: Index  # integers, slices and None; always with an Ellipsis
    axes: Axes = ()  # of the basic step's result, each indexed by an array
    arrays: Index = ()
    unique: bool = True  # whether no element is named twice


_BASIC_TYPES = {int, slice, type(None), type(...)}


def _planned(x: Any, index: Any) -> _Plan:
    items = index if type(index) is tuple else (index,)
    if all(type(item) in _BASIC_TYPES for item in items):
        return _Plan(items if Ellipsis in items else (*items, ...))
    items = [_item(x, item) for item in items]
    hidden = x.ndim - sum(map(_width, items))  # the number of dims that an Ellipsis stands for
    if hidden < 0 or sum(item is Ellipsis for item in items) > 1:
        raise IndexError(
            "getitem: too many indices for tensor, or more than one Ellipsis; "
            f"got {len(items)} indices, x.shape={tuple(x.shape)}"
        )
    basic: list[Any] = []
    chosen: dict[int, Any] = {}
    source = axis = 0  # the next dim of x, and that of the basic step's result
    for item in items:
        if hasattr(item, "dtype"):
            arrays = _index_arrays(x, item, source)
            chosen.update(zip(range(axis, axis + len(arrays)), arrays, strict=True))
            basic += [slice(None) if item.ndim else None] * len(arrays)
            axis += len(arrays)
        else:
            basic.append(item)
            axis += hidden if item is Ellipsis else type(item) is not int
        source += hidden if item is Ellipsis else _width(item)
    if not any(item is Ellipsis for item in items):
        basic.append(...)
    unique = all(item.dtype.kind == "b" for item in items if hasattr(item, "dtype"))
    return _Plan(tuple(basic), tuple(chosen), tuple(chosen.values()), unique)


def _item(x: Any, item: Any) -> Any:
    """Return one item of an index as None, Ellipsis, an int, a slice, or an array on x's device."""
    if type(item) in _BASIC_TYPES:
        return item
    array = array_of(item)
    if not hasattr(array, "ndim"):
        array = np.asarray(array)
        array = array if array.size else array.astype(np.int64)  # [] is no list of floats
    if array.dtype.kind not in "biu":
        raise IndexError(
            "getitem: tensors and lists used as indices must be of integers or bools; "
            f"got dtype={array.dtype}"
        )
    if array.ndim == 0 and array.dtype.kind != "b":
        return int(array)
    return _on_device_of(x, np.asarray(array) if isinstance(array, np.generic) else array)


def _width(item: Any) -> int:
    """Return how many of x's dims an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if hasattr(item, "dtype") and item.dtype.kind == "b" else 1


def _index_arrays(x: Any, array: Any, source: int) -> list[Any]:
    """Return the integer arrays that an array in an index stands for: of a mask, where it holds."""
    if array.dtype.kind != "b":
        return [array]
    if array.ndim == 0:  # a bool alone makes a new dim, of size 1 or 0
        return list(_places(array.reshape(1)))
    if array.shape != x.shape[source : source + array.ndim]:
        raise IndexError(
            f"getitem: the shape of the mask does not match the shape of the indexed tensor; "
            f"got mask.shape={array.shape}, x.shape={tuple(x.shape)}, first dim={source}"
        )
    return list(_places(array))


def _basic_label(basic: Index) -> str | None:
    """Return the name of the last thing that a basic index does, or None if it changes nothing."""
    for item in reversed(basic):
        if item is None:
            return "UnsqueezeBackward0"
        if type(item) is int:
            return "SelectBackward0"
        if type(item) is slice and item != slice(None):
            return "SliceBackward0"
    return None


def getitem(x: Any, index: Any) -> Any:
    """Return x[index] for integers, slices, None, Ellipsis, masks and integer tensors or lists.

    Integers and slices (of any step) give a view; masks and tensors give a copy, after the rest of
    the index has been applied, as in PyTorch. Raises IndexError for what lies outside x.
    """
    try:
        if type(index) is int:
            return slices(x, index=(index, ...), label="SelectBackward0")
        plan = _planned(x, index)
        label = _basic_label(plan.basic)
        if label is not None or not plan.axes:
            trivial = "SliceBackward0" if slice(None) in plan.basic else "AliasBackward0"
            x = slices(x, index=plan.basic, label=label or trivial)
        if not plan.axes:
            return x
        index = _kept(plan.arrays, x)
        return _pick(x, axes=plan.axes, index=index, unique=plan.unique, label="IndexBackward0")
    except IndexError as error:
        raise _index_error("getitem", error, x) from None


def _index_error(name: str, error: IndexError, x: Any) -> IndexError:
    """Return an error of an index in our words, or NumPy's and CuPy's words with the operation's name."""
    words = str(error)
    return (
        error
        if words.startswith("getitem: ")
        else IndexError(f"{name}: {words}; got x.shape={tuple(x.shape)}")
    )


def _kept(index: Index, *inputs: Any) -> Index:
    return tuple([one if one is None else kept_for_backward(one, *inputs) for one in index])


def _store(array: Any, plan: _Plan, value: Any) -> None:
    """Write into an array what an index names."""
    try:
        part = array[plan.basic]
        if settings.general.deterministic and not plan.unique and np.ndim(value):
            _store_in_order(part, plan, value)
            return
        key = _key(part.ndim, plan.axes, plan.arrays) if plan.axes else ...
        _put_values(part, key, value)
    except IndexError as error:
        raise _index_error("setitem", error, array) from None


def _put_values(part: Any, key: Any, value: Any) -> None:
    try:
        part[key] = value
    except ValueError:
        _refuse_value(value, part[key].shape)
        raise


def _store_in_order(part: Any, plan: _Plan, value: Any) -> None:
    """Write as `_store` does; a place that is named twice gets what is named last, on a GPU too."""
    xp = array_module(part)
    positions = _positions(part, plan.axes, plan.arrays)
    try:
        values = xp.broadcast_to(xp.asarray(value), positions.shape)
    except ValueError:
        _refuse_value(value, positions.shape)
        raise
    whole = xp.ascontiguousarray(part)
    flat = values.astype(part.dtype).reshape(-1)
    kernels.put_at("setitem", whole.reshape(-1), positions.reshape(-1), flat)
    if whole is not part:
        part[...] = whole


def _refuse_value(value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a value has the shape of the part into which it is written."""
    found = getattr(value, "shape", ())
    if found != shape:
        raise ValueError(
            "setitem: value must broadcast to the part that is written; "
            f"got value.shape={found}, part.shape={shape}"
        ) from None


@operation(label=lambda plan, label: label)
def _put(x, value, *, plan, label):
    out = x.copy(order="K")
    _store(out, plan, value)
    return out


def _value_gradient(grad: Any, value_shape: tuple[int, ...], plan: _Plan) -> Any:
    part = slices(grad, index=plan.basic, label="SliceBackward0")
    if plan.axes:
        part = _pick(
            part, axes=plan.axes, index=plan.arrays, unique=plan.unique, label="IndexBackward0"
        )
    # A value may have more leading dims, of size 1, than the part has dims.
    added = max(0, len(value_shape) - part.ndim)
    gradient = sum_to_shape(part, shape=value_shape[added:])
    return reshape(gradient, value_shape) if added else gradient


_put.pullbacks(
    x=lambda grad, plan: _put(grad, 0, plan=plan, label="IndexPutBackward0"), value=_value_gradient
)


def _as_value(x: Any, value: Any) -> Any:
    """Return what is written into x in x's dtype; numbers and lists as they are."""
    if isinstance(value, np.generic):
        return value.item()
    return to_dtype(value, x.dtype) if hasattr(value, "dtype") else value


def setitem(x: Any, index: Any, value: Any) -> Any:
    """Return a copy of x in which x[index] is `value`, broadcast and converted to x's dtype.

    Indices as for `getitem`; where one element is named twice, which value it gets is not defined.
    Raises ValueError for a value that does not broadcast to x[index].
    """
    plan = _planned(x, index)
    plan = plan._replace(arrays=_kept(plan.arrays, x, value))
    return _put(x, _as_value(x, value), plan=plan, label="CopySlices")


def setitem_in_place(x: Any, index: Any, value: Any, recorded: bool) -> Any:
    """Write into a tensor's own memory, as `setitem` does into a copy.

    Returns the node of the tape, if this is to be `recorded`, of which the tensor is now the result.
    """
    plan = _planned(x.array, index)
    if recorded:
        if hasattr(value, "dtype"):
            devices.check_same_device("setitem", x.array, array_of(value))
        plan = plan._replace(arrays=_kept(plan.arrays, x, value))
        value = _as_value(x, value)
    _store(x.array, plan, array_of(value))
    if not recorded:
        return None
    return node_of(_put, (x, value), x.array, plan=plan, label="CopySlices")


# ---- gather and scatter --------------------------------------------------------------------------


def _index_array(name: str, x: Any, index: Any) -> Any:
    """Return an index tensor as an array on x's device, after checking its dtype."""
    array = array_of(index)
    array = array if hasattr(array, "ndim") else np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: index must be of an integer dtype; got index.dtype={array.dtype}")
    return _on_device_of(x, array)


def _check_bounds(name: str, index: Any, size: int, lowest: int = 0) -> None:
    # For NumPy only: reading the bounds from a GPU would wait for it.
    if type(index) is np.ndarray and index.size:
        low, high = int(index.min()), int(index.max())
        if low < lowest or high >= size:
            raise IndexError(
                f"{name}: index {high if high >= size else low} is out of bounds for a dim of that "
                f"size ({lowest} <= index < size); got size={size}"
            )


def _gathered_dim(name: str, x: Any, dim: int, index: Any) -> int:
    """Return the dim from the front, after the checks that gather and scatter share."""
    dim = normalized_dim(name, dim, x.ndim)
    fits = index.ndim == x.ndim and all(
        axis == dim or index.shape[axis] <= x.shape[axis] for axis in range(x.ndim)
    )
    if not fits:
        raise ValueError(
            f"{name}: index must have x's number of dims and be no larger apart from dim; "
            f"got index.shape={index.shape}, x.shape={tuple(x.shape)}, dim={dim}"
        )
    _check_bounds(name, index, x.shape[dim])
    return dim


def gather(x: Any, dim: int, index: Any) -> Any:
    """Return out[i, j, k] = x[i, index[i, j, k], k] for dim 1, and so on: out has index's shape.

    `index` holds integers in [0, x.shape[dim]), has x's number of dims and is nowhere larger apart
    from dim. Raises IndexError for others, TypeError for an index that is not of integers.
    """
    index = _index_array("gather", x, index)
    if x.ndim == 0 == index.ndim:
        return reshape(gather(reshape(x, (1,)), dim, index.reshape(1)), ())
    dim = _gathered_dim("gather", x, dim, index)
    index = kept_for_backward(index, x)
    return _pick(x, **_along(x.ndim, dim, index), unique=False, label="GatherBackward0")


def take_along_dim(x: Any, indices: Any, dim: int | None = None) -> Any:
    """Return x's elements at `indices` along `dim`, x and indices broadcast in the other dims.

    Without dim, both are taken as flat. Negative indices count from the end.
    """
    indices = _index_array("take_along_dim", x, indices)
    if dim is None:
        return take(x, indices.reshape(-1))
    dim = normalized_dim("take_along_dim", dim, x.ndim)
    if indices.ndim != x.ndim:
        raise ValueError(
            "take_along_dim: indices must have x's number of dims (indices.ndim == x.ndim); "
            f"got indices.shape={indices.shape}, x.shape={tuple(x.shape)}"
        )
    shape = list(np.broadcast_shapes(_without(x.shape, dim), _without(indices.shape, dim)))
    x = expand(x, (*shape[:dim], x.shape[dim], *shape[dim:]))
    indices = kept_for_backward(indices, x)
    indices = expand(indices, (*shape[:dim], indices.shape[dim], *shape[dim:]))
    _check_bounds("take_along_dim", indices, x.shape[dim], -x.shape[dim])
    return _pick(x, **_along(x.ndim, dim, indices), unique=False, label="GatherBackward0")


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def take(x: Any, indices: Any) -> Any:
    """Return x's elements at `indices`, which count as if x were flat, in the shape of indices."""
    indices = _index_array("take", x, indices)
    flat = ravel(x)
    _check_bounds("take", indices, flat.shape[0], -flat.shape[0])
    indices = kept_for_backward(indices, x)
    return _pick(flat, axes=(0,), index=(indices,), unique=False, label="TakeBackward0")


def index_select(x: Any, dim: int, index: Any) -> Any:
    """Return the places `index`, a 1-D integer tensor, of x along `dim`."""
    if x.ndim == 0:
        return reshape(index_select(reshape(x, (1,)), dim, index), ())
    index, dim = _line("index_select", x, dim, index)
    index = kept_for_backward(index, x)
    return _pick(x, axes=(dim,), index=(index,), unique=False, label="IndexSelectBackward0")


def _line(name: str, x: Any, dim: int, index: Any) -> tuple[Any, int]:
    """Return a 1-D index as an array, and the dim from the front, checked."""
    index = _index_array(name, x, index)
    if index.ndim > 1:
        raise ValueError(f"{name}: index must be 1-D; got index.shape={index.shape}")
    dim = normalized_dim(name, dim, x.ndim)
    _check_bounds(name, index, x.shape[dim])
    return index.reshape(-1), dim


@operation(label=lambda axes, index, label: label)
def _add(x, values, *, axes, index, label):
    out = x.astype(sum_dtype(x.dtype), order="C")
    name = "index_add" if label == "IndexAddBackward0" else "scatter_add"
    _add_at(name, out, values, axes, index)
    return out.astype(x.dtype, copy=False)


_add.pullbacks(
    x=lambda grad: grad,
    values=lambda grad, axes, index: _pick(
        grad, axes=axes, index=index, unique=False, label="IndexBackward0"
    ),
)


def _check_same_dtype(name: str, x: Any, source: Any) -> None:
    if source.dtype != x.dtype:
        raise TypeError(
            f"{name}: x and the source must have one dtype; "
            f"got x.dtype={x.dtype}, source.dtype={source.dtype}"
        )


def _cropped(name: str, source: Any, index: Any) -> Any:
    """Return the leading part of a scattered source that the index has places for."""
    if source.ndim != index.ndim or any(
        places > size for places, size in zip(index.shape, source.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: index must have src's number of dims and be no larger; "
            f"got index.shape={index.shape}, src.shape={tuple(source.shape)}"
        )
    if source.shape == index.shape:
        return source
    part = (*[slice(0, size) for size in index.shape], ...)
    return slices(source, index=part, label="SliceBackward0")


def scatter(x: Any, dim: int, index: Any, src: Any) -> Any:
    """Return a copy of x with out[i, index[i, j, k], k] = src[i, j, k] for dim 1, and so on.

    `src`, a number or a tensor of x's dtype, is nowhere smaller than `index`, which is as for
    `gather`. Where a place is named twice, which element it gets is not defined.
    """
    index = _index_array("scatter", x, index)
    if x.ndim == 0 == index.ndim:
        src = reshape(src, (1,)) if hasattr(src, "dtype") else src
        return reshape(scatter(reshape(x, (1,)), dim, index.reshape(1), src), ())
    dim = _gathered_dim("scatter", x, dim, index)
    if hasattr(src, "dtype"):
        _check_same_dtype("scatter", x, src)
        src = _cropped("scatter", src, index)
    places = _along(x.ndim, dim, kept_for_backward(index, x, src))
    plan = _Plan((...,), places["axes"], places["index"], unique=False)
    return _put(x, src, plan=plan, label="ScatterBackward0")


def scatter_add(x: Any, dim: int, index: Any, src: Any) -> Any:
    """Return a copy of x with src[i, j, k] added at [i, index[i, j, k], k] for dim 1, and so on.

    `src`, of x's dtype, is nowhere smaller than `index`, which is as for `gather`. On a GPU the
    order of additions to one place, and so the last bit, may differ between runs: see
    `use_deterministic_algorithms`.
    """
    index = _index_array("scatter_add", x, index)
    if x.ndim == 0 == index.ndim:
        row = reshape(x, (1,)), dim, index.reshape(1), reshape(src, (1,))
        return reshape(scatter_add(*row), ())
    dim = _gathered_dim("scatter_add", x, dim, index)
    if autocast_mode.dtype is not None:
        x, src = widest(x, src)
    _check_same_dtype("scatter_add", x, src)
    src = _cropped("scatter_add", src, index)
    index = kept_for_backward(index, x, src)
    return _add(x, src, **_along(x.ndim, dim, index), label="ScatterAddBackward0")


def index_add(x: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Any:
    """Return a copy of x to which alpha * source is added at the places `index` of `dim`.

    `index` is 1-D; `source`, of x's dtype, has x's shape but for dim, where it has index's size.
    """
    if isinstance(alpha, float) and x.dtype.kind in "biu":
        raise TypeError(
            "index_add: alpha must be an integer beside integers (isinstance(alpha, int)); "
            f"got alpha={alpha}, x.dtype={x.dtype}"
        )
    index, dim = _line("index_add", x, dim, index)
    _check_same_dtype("index_add", x, source)
    if tuple(source.shape) != (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :]):
        raise ValueError(
            "index_add: source must have x's shape, and index's size in dim; got source.shape="
            f"{tuple(source.shape)}, x.shape={tuple(x.shape)}, index.shape={index.shape}, dim={dim}"
        )
    source = source if alpha == 1 else source * alpha
    index = kept_for_backward(index, x, source)
    return _add(x, source, axes=(dim,), index=(index,), label="IndexAddBackward0")


# ---- masks and counts ----------------------------------------------------------------------------


@operation
def _masked_fill(x, value, *, mask):
    value = value.astype(x.dtype) if hasattr(value, "dtype") else _as_element(value, x.dtype)
    return narrowed(array_module(x).where(mask, value, x), x.dtype)


def _as_element(value: Any, dtype: np.dtype[Any]) -> Any:
    try:
        return dtype.type(value)
    except (ValueError, OverflowError):  # nan, or too large
        raise ValueError(
            f"masked_fill: value must fit into x's dtype; got value={value}, x.dtype={dtype}"
        ) from None


_masked_fill.pullbacks(
    x=lambda grad, mask: _masked_fill(grad, 0, mask=mask),
    value=lambda grad, mask: sum_to_shape(_masked_fill(grad, 0, mask=~mask), shape=()),
)


def _mask_array(name: str, x: Any, mask: Any) -> Any:
    array = array_of(mask)
    kind = getattr(array, "dtype", type(mask).__name__)
    if kind != np.bool_:
        raise TypeError(f"{name}: mask must be a bool tensor (mask.dtype == bool); got {kind}")
    return _on_device_of(x, array)


def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    """Return x with `value`, a number or a 0-d tensor, where the bool `mask` holds, in x's dtype.

    x and mask are broadcast together.
    """
    mask = _mask_array("masked_fill", x, mask)
    if getattr(value, "ndim", 0) > 0:
        raise ValueError(
            "masked_fill: value must be a number or a 0-d tensor (value.ndim == 0); "
            f"got value.shape={tuple(value.shape)}"
        )
    if hasattr(value, "dtype"):
        value = to_dtype(value, x.dtype)
    x, mask = broadcast_tensors(x, kept_for_backward(mask, x, value))
    return _masked_fill(x, value, mask=mask)


def masked_select(x: Any, mask: Any) -> Any:
    """Return, in one dim, the elements of x where the bool `mask` holds, both broadcast together.

    Waits for the GPU.
    """
    x, mask = broadcast_tensors(x, _mask_array("masked_select", x, mask))
    if x.ndim == 0:
        x, mask = reshape(x, (1,)), mask.reshape(1)
    axes = tuple(range(x.ndim))
    return _pick(x, axes=axes, index=_places(mask), unique=True, label="MaskedSelectBackward0")


@operation
def _argwhere(x):
    return array_module(x).argwhere(x)


def nonzero(x: Any, as_tuple: bool = False) -> Any:
    """Return the int64 places of nonzero elements: one row each, or `as_tuple` one tensor a dim.

    Waits for the GPU.
    """
    if not as_tuple:
        return _argwhere(x)
    return unbind(_argwhere(x if x.ndim else reshape(x, (1,))), 1)


@operation
def _one_hot(labels, *, num_classes):
    classes = array_module(labels).arange(num_classes)
    return (labels[..., None] == classes).astype(np.int64)


def one_hot(labels: Any, num_classes: int = -1) -> Any:
    """Return int64 of labels' shape and one more dim of `num_classes`: 1 at the label, else 0.

    -1 takes the largest label plus 1, which waits for the GPU. Raises TypeError for labels that are
    not integers, IndexError for negative ones and those above num_classes.
    """
    array = _index_array("one_hot", labels, labels)
    if num_classes == -1:
        if array.size == 0:
            raise ValueError(
                "one_hot: the number of classes cannot be inferred from no labels "
                f"(pass num_classes); got labels.shape={array.shape}"
            )
        num_classes = int(array.max()) + 1
    _check_bounds("one_hot", array, num_classes)
    return _one_hot(labels, num_classes=num_classes)
