"""Read and write `.safetensors` files through the safetensors library."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np

from gradengine.weights.element_types import ELEMENT_TYPES, READABLE, decode, element_type_of
from gradengine.weights.error import refusals_name
from gradengine.weights.replacing import replacing

_BY_NAME = {kind.safetensors_name: kind for kind in ELEMENT_TYPES}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of the file at `path` by name; bfloat16 is widened to float32, exactly.

    Raises:
        WeightFileError: the file is damaged or holds an element type that NumPy has not.
        ImportError: the safetensors library is missing.
    """
    library = _library()
    with open(path, "rb") as file:
        content = file.read()
    with refusals_name(path):
        return {name: _array(name, entry) for name, entry in library.deserialize(content)}


def write_safetensors(arrays: dict[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write a flat dict of arrays to a `.safetensors` file, replaced only when complete.

    Raises:
        TypeError: the value is not a dict of arrays by name, or a dtype has no place in the file.
        ImportError: the safetensors library is missing.
    """
    library = _library()
    if not isinstance(arrays, dict):
        raise TypeError(f"save: .safetensors holds a flat dict; got type={type(arrays).__name__}")
    contiguous = {}
    for name, array in arrays.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TypeError(
                "save: .safetensors holds tensors by name, nothing else (.pth nests values); "
                f"got key={name!r}, type={type(array).__name__}"
            )
        element_type_of(array)
        contiguous[name] = np.ascontiguousarray(array).reshape(array.shape)
    with replacing(path) as partial:
        # Not save_file: the file it makes is closed to all but its owner, whatever the umask says.
        partial.write_bytes(library.numpy.save(contiguous))


def _library() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors: the library must be installed to read or write such files "
            "(pip install safetensors)"
        ) from error
    return safetensors


def _array(name: str, entry: dict[str, object]) -> np.ndarray:
    kind = _BY_NAME.get(str(entry["dtype"]))
    if kind is None:
        raise ValueError(
            f"tensor {name[:40]!r} has element type {entry['dtype']} ({READABLE} are readable)"
        )
    raw = np.frombuffer(entry["data"], np.uint8)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return decode(raw, kind).reshape(entry["shape"])  # pyright: ignore[reportArgumentType, reportCallIssue]
