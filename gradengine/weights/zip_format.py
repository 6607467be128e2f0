"""Read the zip form of `.pth` files: a structure record, and one for each storage."""

from __future__ import annotations

import zipfile
from io import BufferedIOBase, BufferedReader
from typing import cast

import numpy as np

from gradengine.weights.element_types import decode
from gradengine.weights.pickle_machine import LONGEST_PICKLE, PickleMachine
from gradengine.weights.storages import GLOBALS, Storage, check_storage_id

_LOCAL_HEADER = 30  # bytes before an entry's name


def read_zip(file: BufferedReader) -> object:
    """Return the value that the zip archive `file` holds; ValueError and others if it is bad."""
    with zipfile.ZipFile(file) as archive:
        return _Records(archive).read_value()


class _Records:
    """The records of an archive, and the storages read so far."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.entries = _checked_entries(archive)
        tops = [
            name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(tops) != 1:
            raise ValueError("the archive must hold one folder with a data.pkl")
        self.root = tops[0].removesuffix("data.pkl")
        self.big_endian = False
        self.storages: dict[str, Storage] = {}

    def read_value(self) -> object:
        if f"{self.root}byteorder" in self.entries:
            byte_order = self.read("byteorder", 16).tobytes()
            if byte_order not in (b"little", b"big"):
                raise ValueError("the byteorder record must be 'little' or 'big'")
            self.big_endian = byte_order == b"big"
        program = self.read("data.pkl", LONGEST_PICKLE).tobytes()
        return PickleMachine(program, 0, GLOBALS, self.load_storage).run()

    def load_storage(self, persistent_id: object) -> Storage:
        kind, key, count = check_storage_id(persistent_id, ())
        storage = self.storages.get(key)
        if storage is None:
            raw = self.read(f"data/{key}")
            needed = count * kind.file_dtype.itemsize
            if needed > raw.size:
                raise ValueError(f"a storage claims {needed} bytes of a record of {raw.size}")
            storage = Storage(kind, decode(raw[:needed], kind, big_endian=self.big_endian))
            self.storages[key] = storage
        elif storage.kind is not kind or storage.values.size != count:
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return storage

    def read(self, name: str, most_bytes: int | None = None) -> np.ndarray:
        """Return a record's bytes as a new uint8 array."""
        entry = self.entries.get(self.root + name)
        if entry is None:
            raise ValueError(f"record {name[:40]!r} is missing")
        if most_bytes is not None and entry.file_size > most_bytes:
            raise ValueError(f"record {name[:40]!r} must have at most {most_bytes} bytes")
        if entry.CRC == 0:
            del entry.CRC  # PyTorch's mark of "no checksum"; without one zipfile does not check
        content = np.empty(entry.file_size, np.uint8)
        with cast(BufferedIOBase, self.archive.open(entry)) as record:
            if record.readinto(content.data) != content.size:
                raise ValueError(f"record {name[:40]!r} is truncated")
        return content


def _checked_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name: stored as they are, unique, none over another.

    So all records together are never larger than the file, whatever their headers claim.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.filename in entries:
            raise ValueError("the archive holds two entries of one name")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError("the archive's entries must not be compressed")
        if entry.header_offset < end:
            raise ValueError("the archive's entries overlap")
        end = entry.header_offset + _LOCAL_HEADER + len(entry.filename) + entry.file_size
        entries[entry.filename] = entry
    if end > archive.start_dir:
        raise ValueError("the archive's entries are larger than the file")
    return entries
