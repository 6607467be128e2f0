"""Storages, the flat arrays of a `.pth` file, and the tensors that are views of them.

`GLOBALS` is the table of all names that a `.pth` file may mention. It holds functions of this
module, element types and strings, so no name in a file can reach anything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradengine.weights.element_types import ELEMENT_TYPES, READABLE, ElementType
from gradengine.weights.pickle_machine import Constructor, check_key

_MOST_AXES = 64  # NumPy's limit


class Storage:
    """A flat array that tensors are views of."""

    __slots__ = ("kind", "values")

    def __init__(self, kind: ElementType, values: np.ndarray) -> None:
        self.kind = kind
        self.values = values


class UnreadableType:
    """An element type of PyTorch that NumPy has no dtype for: it has a name and no reader."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def check_count(name: str, value: object) -> int:
    """Return `value` if it is a non-negative integer."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a non-negative integer; got {str(value)[:40]}")
    return value


def check_storage_id(
    persistent_id: object, extra: tuple[object, ...]
) -> tuple[ElementType, str, int]:
    """Return (type, key, element count) of ('storage', type, key, location, count, *extra)."""
    if type(persistent_id) is not tuple or len(persistent_id) != 5 + len(extra):
        raise ValueError("a persistent id must describe a storage")
    tag, kind, key, _location, count = persistent_id[:5]
    if type(kind) is UnreadableType:
        raise ValueError(f"element type {kind.name} is not readable ({READABLE} are)")
    if tag != "storage" or type(kind) is not ElementType or type(key) is not str:
        raise ValueError("a persistent id must describe a storage")
    if persistent_id[5:] != extra:
        raise ValueError("a storage that is a view of another storage is not readable")
    return kind, key, check_count("a storage's length", count)


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _requires_grad: object = False,
    _hooks: object = None,
    flags: object = None,
) -> np.ndarray:
    """Return the view of `storage` that starts at `offset`; it must lie inside the storage."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor must be a view of a storage")
    if flags:  # a lazily negated or conjugated tensor
        raise ValueError("a tensor with flags is not readable (save tensor.resolve_neg())")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor must have one stride an axis, and at most {_MOST_AXES} axes")
    first = check_count("a tensor's offset", offset)
    sizes = [check_count("a tensor's size", size) for size in shape]
    steps = [check_count("a tensor's stride", step) for step in strides]
    values = storage.values
    if 0 in sizes:
        return np.empty(sizes, values.dtype)
    last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if last >= values.size:
        raise ValueError(f"a tensor reaches to element {last} of a storage of {values.size}")
    count = 1
    for size in sizes:
        count *= size
        if count > values.size:
            raise ValueError("a tensor repeats its storage's elements (save tensor.contiguous())")
    width = values.dtype.itemsize
    return np.ndarray(sizes, values.dtype, values, first * width, [step * width for step in steps])


def _rebuild_parameter(tensor: object, _requires_grad: object, _hooks: object) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError("a parameter must hold a tensor")
    return tensor


def _ordered_dict(pairs: object = None) -> dict[Any, object]:
    if pairs is None:
        return {}
    if type(pairs) is not list or not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise ValueError("an OrderedDict must be made of a list of pairs")
    items = {check_key(key): value for key, value in pairs}
    pairs.clear()  # moved, not copied: repeating the call must not multiply memory
    return items


def _counter(counts: object) -> object:
    if type(counts) is not dict:
        raise ValueError("a Counter must be made of a dict")
    return counts


def _size(sizes: object) -> object:
    if type(sizes) is not tuple:
        raise ValueError("a Size must be made of a tuple")
    return sizes


def _device(name: object, index: object = None) -> str:
    if type(name) is not str or not (index is None or type(index) is int):
        raise ValueError("a device must be made of a name and an index")
    return name if index is None else f"{name}:{index}"


_UNTYPED = UnreadableType("UntypedStorage (uint16, uint32, uint64, float8)")


def _allowed_globals() -> dict[str, object]:
    table: dict[str, object] = {
        "collections.OrderedDict": Constructor(_ordered_dict),
        "collections.Counter": Constructor(_counter),
        "torch.Size": Constructor(_size),
        "torch.device": Constructor(_device),
        "torch._utils._rebuild_tensor": Constructor(_rebuild_tensor),
        "torch._utils._rebuild_tensor_v2": Constructor(_rebuild_tensor),
        "torch._utils._rebuild_parameter": Constructor(_rebuild_parameter),
        # uint16 and younger types have no storage class; the next persistent id refuses them.
        "torch._utils._rebuild_tensor_v3": _UNTYPED,
        "torch.storage.UntypedStorage": _UNTYPED,
    }
    for module in ("torch", "torch.cuda"):  # old files name the class of the device
        for kind in ELEMENT_TYPES:
            table[f"{module}.{kind.storage_name}"] = kind
        for name in ("ComplexFloat", "ComplexDouble", "QInt8", "QUInt8", "QInt32"):
            table[f"{module}.{name}Storage"] = UnreadableType(name)
    # A dtype that is a value (not a storage's) is read as its name.
    return table | {f"torch.{kind.torch_name}": kind.torch_name for kind in ELEMENT_TYPES}


GLOBALS = _allowed_globals()
