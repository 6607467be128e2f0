"""Read and write PyTorch's `.pth` files on NumPy arrays alone, without PyTorch."""

from __future__ import annotations

import os
from typing import Any

from gradengine.weights.error import refusals_name
from gradengine.weights.legacy_format import MAGIC, read_legacy
from gradengine.weights.pth_writer import write_zip
from gradengine.weights.replacing import replacing
from gradengine.weights.zip_format import read_zip


def read_pth(path: str | os.PathLike[str]) -> Any:
    """Return the value in the file at `path`: containers, numbers and strings around NumPy arrays.

    Reads the zip format and the legacy format before it. Nothing in the file can call anything.
    Tensors and parameters become writable arrays; strides are kept, and tensors of one storage
    share memory. bfloat16 is widened to float32, exactly. An OrderedDict or a Counter becomes a
    dict, a Size a tuple, a dtype or a device its name.

    Raises:
        WeightFileError: the file is damaged, unsafe, or holds what NumPy cannot represent.
    """
    with open(path, "rb") as file, refusals_name(path):
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            return read_zip(file)
        if head.startswith(MAGIC):
            return read_legacy(file, size)
        if head[257:262] == b"ustar":
            raise ValueError(
                "the tar format of PyTorch 0.1 is too old; load and save it in PyTorch"
            )
        raise ValueError("the file is neither PyTorch's zip format nor its legacy format")


def write_pth(value: object, path: str | os.PathLike[str]) -> None:
    """Write dicts, lists, tuples, numbers, strings and NumPy arrays to a `.pth` file.

    `torch.load(path, weights_only=True)` reads it. Dicts keep their order and are written as plain
    dicts; arrays that are the same memory share a storage; a permuted layout (channels-last,
    transposed) is kept. The file is replaced only when the new one is complete.

    Raises:
        TypeError: a value or a dtype has no place in such files.
        ValueError: a dict's key is no string or number, or the nesting is deeper than 100.
    """
    with replacing(path) as partial:
        write_zip(value, partial)
