"""Write the zip form of `.pth` files, which PyTorch reads with `weights_only=True`."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np

from gradengine.weights.element_types import element_type_of
from gradengine.weights.pickle_machine import DEEPEST, check_key

_ALIGNMENT = 64  # bytes; PyTorch maps storages into memory
_LOCAL_HEADER = 30  # bytes before an entry's name
_ZIP64_FROM = 1 << 31  # bytes; larger entries need the wide size fields, which take 20 bytes
_ZIP64_FIELDS = 20
_LONGEST_INT = 255  # bytes, in two's complement


def write_zip(value: object, path: Path) -> None:
    """Write `value` to a new archive at `path`."""
    structure = _Structure()
    structure.write_value(value, 0)
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "archive/data.pkl", bytes(structure.program + b"."))
        _add(archive, "archive/byteorder", b"little")
        for key, storage in enumerate(structure.storages):
            _add(archive, f"archive/data/{key}", storage.view(np.uint8).data)
        _add(archive, "archive/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Add a stored entry whose content starts at a multiple of the alignment."""
    entry = zipfile.ZipInfo(name)  # dated 1980: the same weights give the same bytes
    wide = len(content) >= _ZIP64_FROM
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER + len(name) + (_ZIP64_FIELDS if wide else 0) + 4
    padding = -start % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=wide) as record:
        record.write(content)


class _Structure:
    """The pickle that describes a value, opcode by opcode, and the storages it refers to."""

    def __init__(self) -> None:
        self.program = bytearray(b"\x80\x02")
        self.storages: list[np.ndarray] = []  # flat, little-endian
        self.keys: dict[tuple[object, ...], int] = {}  # memory of an array -> its storage

    def write_value(self, value: object, depth: int) -> None:
        if isinstance(value, np.ndarray):
            self.write_array(value)
        elif isinstance(value, dict | list | tuple):
            if depth == DEEPEST:
                raise ValueError(
                    f"save: containers must nest at most {DEEPEST} deep, none in itself"
                )
            self.write_container(value, depth)
        else:
            self.write_scalar(value.item() if isinstance(value, np.generic) else value)

    def write_container(self, value: dict | list | tuple, depth: int) -> None:
        if isinstance(value, dict):
            self.program += b"}("
            for key, item in value.items():
                self.write_scalar(check_key(key))
                self.write_value(item, depth + 1)
            self.program += b"u"
            return
        self.program += b"(" if isinstance(value, tuple) else b"]("
        for item in value:
            self.write_value(item, depth + 1)
        self.program += b"t" if isinstance(value, tuple) else b"e"

    def write_scalar(self, value: object) -> None:
        if value is None:
            self.program += b"N"
        elif isinstance(value, bool):
            self.program += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.write_int(value)
        elif isinstance(value, float):
            self.program += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self.program += b"X" + struct.pack("<I", len(text)) + text
        else:
            raise TypeError(
                "save: a value must be a tensor, dict, list, tuple, number, string or None; "
                f"got type={type(value).__name__}"
            )

    def write_int(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.program += b"J" + struct.pack("<i", value)
            return
        length = value.bit_length() // 8 + 1
        if length > _LONGEST_INT:
            raise ValueError(f"save: an int must fit {_LONGEST_INT} bytes; got {length} bytes")
        self.program += b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)

    def write_array(self, array: np.ndarray) -> None:
        key, strides = self.add_storage(array)
        storage_name = element_type_of(array).storage_name
        self.program += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.write_scalar("storage")
        self.program += f"ctorch\n{storage_name}\n".encode()
        self.write_scalar(str(key))
        self.write_scalar("cpu")
        self.write_int(array.size)
        self.program += b"tQ"
        self.write_int(0)  # the offset in the storage
        self.write_value(array.shape, 0)
        self.write_value(strides, 0)
        self.program += b"\x89ccollections\nOrderedDict\n)RtR"  # needs no gradient, has no hooks

    def add_storage(self, array: np.ndarray) -> tuple[int, tuple[int, ...]]:
        """Return the key of the storage that holds `array`, and the strides in it, in elements.

        Arrays that are the same memory share a storage (tied weights). An array that is a
        permutation of a contiguous one (channels-last, transposed) keeps its layout.
        """
        axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        if not array.transpose(axes).flags.c_contiguous:
            axes = list(range(array.ndim))
        strides, step = [0] * array.ndim, 1
        for axis in reversed(axes):
            strides[axis] = step
            step *= max(array.shape[axis], 1)
        memory = (array.__array_interface__["data"][0], array.dtype.str, array.shape, array.strides)
        key = self.keys.setdefault(memory, len(self.storages))
        if key == len(self.storages):
            little_endian = array.dtype.newbyteorder("<")
            flat = np.ascontiguousarray(array.transpose(axes), little_endian).reshape(-1)
            self.storages.append(flat)
        return key, tuple(strides)
