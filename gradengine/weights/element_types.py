"""The element types of weight files, and how their bytes become NumPy arrays."""

from __future__ import annotations

import numpy as np


class ElementType:
    """One element type: its PyTorch names, its name in `.safetensors` files, its NumPy dtypes."""

    __slots__ = ("dtype", "file_dtype", "safetensors_name", "storage_name", "torch_name")

    def __init__(
        self, torch_name: str, storage_name: str, safetensors_name: str, file_dtype: str, dtype: str
    ) -> None:
        self.torch_name = torch_name
        self.storage_name = storage_name
        self.safetensors_name = safetensors_name
        self.file_dtype = np.dtype(file_dtype)  # of the bytes in the file
        self.dtype = np.dtype(dtype)  # of the array they become


ELEMENT_TYPES = (
    ElementType("float64", "DoubleStorage", "F64", "float64", "float64"),
    ElementType("float32", "FloatStorage", "F32", "float32", "float32"),
    ElementType("float16", "HalfStorage", "F16", "float16", "float16"),
    ElementType("bfloat16", "BFloat16Storage", "BF16", "uint16", "float32"),
    ElementType("int64", "LongStorage", "I64", "int64", "int64"),
    ElementType("int32", "IntStorage", "I32", "int32", "int32"),
    ElementType("int16", "ShortStorage", "I16", "int16", "int16"),
    ElementType("int8", "CharStorage", "I8", "int8", "int8"),
    ElementType("uint8", "ByteStorage", "U8", "uint8", "uint8"),
    ElementType("bool", "BoolStorage", "BOOL", "bool", "bool"),
)
_BFLOAT16 = next(kind for kind in ELEMENT_TYPES if kind.torch_name == "bfloat16")
# What arrays are written as; bfloat16 is known by its name, without the import of ml_dtypes.
BY_DTYPE = {kind.dtype: kind for kind in ELEMENT_TYPES if kind is not _BFLOAT16}
READABLE = ", ".join(kind.torch_name for kind in ELEMENT_TYPES)


def decode(raw: np.ndarray, kind: ElementType, *, big_endian: bool = False) -> np.ndarray:
    """Return the 1-D array that the bytes `raw` (uint8) hold, sharing their memory if possible.

    bfloat16 is widened to float32, which is exact: its 16 bits are the upper half of a float32.
    """
    if kind.dtype == np.bool_ and raw.size and raw.max() > 1:
        raise ValueError("a bool must be stored as 0 or 1")
    stored = kind.file_dtype.newbyteorder(">" if big_endian else "<")
    values = raw.view(stored).astype(kind.file_dtype, copy=False)
    if kind.torch_name == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def element_type_of(array: np.ndarray) -> ElementType:
    """Return the element type that `array` is written as; TypeError if there is none."""
    if array.dtype.name == "bfloat16":
        return _BFLOAT16
    kind = BY_DTYPE.get(array.dtype.newbyteorder("="))
    if kind is None:
        names = ", ".join(dtype.name for dtype in BY_DTYPE) + ", bfloat16"
        raise TypeError(f"save: dtype must be one of {names}; got dtype={array.dtype}")
    return kind
