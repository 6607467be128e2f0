"""Put `.pth` files together byte by byte, without PyTorch and without `pickle`."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np

MARK, STOP, REDUCE, EMPTY_TUPLE = b"(", b".", b"R", b")"
PROTOCOL_2 = b"\x80\x02"
LEGACY_MAGIC = PROTOCOL_2 + b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" + STOP


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def list_of(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(kind: str, key: str, count: int, *extra: bytes) -> bytes:
    name = global_("torch", kind)
    return tuple_of(text("storage"), name, text(key), text("cpu"), integer(count), *extra) + b"Q"


def tensor(
    stored: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *extra: bytes
) -> bytes:
    arguments = tuple_of(
        stored,
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, strides)),
        b"\x89",
        global_("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE,
        *extra,
    )
    return global_("torch._utils", "_rebuild_tensor_v2") + arguments + REDUCE


def write_archive(
    path: Path,
    program: bytes,
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a zip file with `program` as its data.pkl; `records` are named below the root."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", PROTOCOL_2 + program + STOP)
        for name, content in (records or {}).items():
            archive.writestr(f"model/{name}", content)
        archive.writestr("model/version", b"3\n")
    return path


def legacy_bytes(program: bytes, storages: dict[str, np.ndarray]) -> bytes:
    """Return a file in the legacy format; `storages` are written in order."""
    keys = list_of(*(text(key) for key in storages))
    version = PROTOCOL_2 + b"M\xe9\x03" + STOP
    machine = PROTOCOL_2 + dict_of(little_endian=b"\x88") + STOP
    head = LEGACY_MAGIC + version + machine + PROTOCOL_2 + program + STOP + PROTOCOL_2 + keys + STOP
    return head + b"".join(
        struct.pack("<q", values.size) + values.tobytes() for values in storages.values()
    )
