"""Weight files: read, written, fetched and verified, without PyTorch.

`load` and `save` deal in tensors. `read_pth`, `write_pth`, `read_safetensors` and
`write_safetensors` deal in NumPy arrays. `fetch` gets a file and checks it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.tensor import Tensor
from gradengine.weights.download import fetch
from gradengine.weights.error import WeightFileError
from gradengine.weights.pth import read_pth, write_pth
from gradengine.weights.safetensors_format import read_safetensors, write_safetensors
from gradengine.weights.tree import map_tree

if TYPE_CHECKING:
    from gradengine.devices import Device

__all__ = [
    "WeightFileError",
    "fetch",
    "load",
    "read_pth",
    "read_safetensors",
    "save",
    "write_pth",
    "write_safetensors",
]


def load(path: str | os.PathLike[str], *, device: str | Device | None = None) -> Any:
    """Return the value in a `.pth` or `.safetensors` file; its content tells which one it is.

    Arrays become tensors on `device` (default: the CPU) that need no gradient. Nothing in the file
    can run code. See `read_pth` and `read_safetensors` for what becomes what.

    Raises:
        WeightFileError: the file is damaged, unsafe or of an unknown kind.
    """

    def wrapped(value: object) -> object:
        if not isinstance(value, np.ndarray):
            return value
        return Tensor(value) if device is None else Tensor(value).to(device)

    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file starts with its JSON header's length in 8 bytes.
    read = read_safetensors if start[8:] == b"{" else read_pth
    return map_tree(wrapped, read(path))


def save(value: object, path: str | os.PathLike[str]) -> None:
    """Write tensors in dicts, lists and tuples to a `.pth`, `.pt` or `.safetensors` file.

    Tensors are written without their gradients, as arrays in CPU memory. PyTorch reads the `.pth`
    form with `weights_only=True`; `.safetensors` holds a flat dict of tensors only. The file is
    replaced only when the new one is complete.

    Raises:
        TypeError: `value` holds what has no place in such a file, for example a module.
        ValueError: the suffix of `path` is unknown.
    """

    def unwrapped(value: object) -> object:
        if isinstance(value, Tensor):
            return value.detach().cpu().array
        if hasattr(value, "state_dict"):
            name = type(value).__name__
            raise TypeError(f"save: pass its state_dict(), not the {name} itself; got type={name}")
        return value

    suffix = Path(path).suffix
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"save: the suffix must be .pth, .pt or .safetensors; got path={path}")
    plain = map_tree(unwrapped, value)
    if suffix == ".safetensors":
        write_safetensors(plain, path)
    else:
        write_pth(plain, path)
