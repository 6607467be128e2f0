"""Read the form of `.pth` files from before PyTorch 1.6: five pickles, then the storages' bytes."""

from __future__ import annotations

from io import BufferedReader

import numpy as np

from gradengine.weights.element_types import decode
from gradengine.weights.pickle_machine import LONGEST_PICKLE, PickleMachine
from gradengine.weights.storages import GLOBALS, Storage, check_storage_id

# The first pickle holds PyTorch's magic number, 0x1950a86a20f9469cfc6c, as a LONG1.
MAGIC = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_PROTOCOL = 1001


def read_legacy(file: BufferedReader, file_size: int) -> object:
    """Return the value that `file` holds; ValueError and others if it is bad."""
    head = file.read(LONGEST_PICKLE)  # the five pickles lie in it
    storages = _Storages(file_size)
    machine = PickleMachine(head, len(MAGIC), {}, _no_storage)
    if machine.run() != _PROTOCOL:
        raise ValueError(f"the legacy format's version must be {_PROTOCOL}")
    # The third pickle describes the machine that wrote the file; storages are little-endian anyway.
    machine = PickleMachine(head, machine.position, {}, _no_storage)
    machine.run()
    machine = PickleMachine(head, machine.position, GLOBALS, storages.allocate)
    value = machine.run()
    machine = PickleMachine(head, machine.position, {}, _no_storage)
    keys = machine.run()
    file.seek(machine.position)
    storages.fill(file, keys)
    return value


def _no_storage(_persistent_id: object) -> object:
    raise ValueError("a storage stands where none is expected")


class _Storages:
    """Storages that tensors refer to before their bytes are read, as the format's order demands."""

    def __init__(self, file_size: int) -> None:
        self.bytes_left = file_size
        self.by_key: dict[str, Storage] = {}

    def allocate(self, persistent_id: object) -> Storage:
        kind, key, count = check_storage_id(persistent_id, (None,))
        storage = self.by_key.get(key)
        if storage is None:
            self.bytes_left -= count * kind.file_dtype.itemsize
            if self.bytes_left < 0:
                raise ValueError("the storages claim more bytes than the file has")
            storage = Storage(kind, np.empty(count, kind.dtype))
            self.by_key[key] = storage
        elif storage.kind is not kind or storage.values.size != count:
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return storage

    def fill(self, file: BufferedReader, keys: object) -> None:
        """Read the bytes of the storages `keys`, in this order; each must come exactly once."""
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise ValueError("the storages' keys must be a list of strings")
        if len(keys) != len(self.by_key) or set(keys) != set(self.by_key):
            raise ValueError("the storages in the file must be those that the tensors refer to")
        for key in keys:
            storage = self.by_key[key]
            count = int.from_bytes(_read_exactly(file, 8).tobytes(), "little", signed=True)
            if count != storage.values.size:
                raise ValueError(f"storage {key[:40]!r} is described in two ways")
            raw = _read_exactly(file, count * storage.kind.file_dtype.itemsize)
            storage.values[...] = decode(raw, storage.kind)


def _read_exactly(file: BufferedReader, count: int) -> np.ndarray:
    content = np.empty(count, np.uint8)
    if file.readinto(content.data) != count:
        raise ValueError("the file ends in the middle of a storage")
    return content
