"""`.safetensors` files, written and read by us and by the library."""

from __future__ import annotations

import json
import stat
import struct
import sys

import numpy as np
import pytest

from gradengine.weights.error import WeightFileError
from gradengine.weights.safetensors_format import read_safetensors, write_safetensors

library = pytest.importorskip("safetensors.numpy")
NAMES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def file_bytes(header: object, content: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_and_the_library_agree(tmp_path, name):
    arrays = {
        "matrix": np.arange(-3, 3).reshape(2, 3).astype(name),
        "transposed": np.arange(6).reshape(2, 3).astype(name).T,
        "reversed": np.arange(3).astype(name)[::-1],
        "swapped": np.arange(3).astype(np.dtype(name).newbyteorder(">")),
        "scalar": np.array(1, name),
        "empty": np.zeros((0, 4), name),
    }
    write_safetensors(arrays, tmp_path / "file.safetensors")
    ours = read_safetensors(tmp_path / "file.safetensors")
    theirs = library.load_file(tmp_path / "file.safetensors")
    assert set(ours) == set(theirs) == set(arrays)
    for key, array in arrays.items():
        assert ours[key].dtype == theirs[key].dtype == np.dtype(name)
        assert ours[key].shape == array.shape
        assert ours[key].flags.writeable
        np.testing.assert_array_equal(ours[key], array)
        np.testing.assert_array_equal(theirs[key], array)


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = np.array([0x0000, 0x8000, 0x3F80, 0xC049], "<u2")
    header = {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    (tmp_path / "file.safetensors").write_bytes(file_bytes(header, bits.tobytes()))
    array = read_safetensors(tmp_path / "file.safetensors")["a"]
    assert array.dtype == np.float32
    expected = (bits.astype(np.uint32) << 16).reshape(2, 2)
    np.testing.assert_array_equal(array.view(np.uint32), expected)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"\xff" * 8 + b"{", "SafetensorError"),
        (b"\x02\0\0\0\0\0\0\0{x", "SafetensorError"),
        (file_bytes({"a": entry("F32", [2], 0, 8)}, bytes(7)), "SafetensorError"),
        (file_bytes({"a": entry("F32", [2], 0, 8)}, bytes(9)), "SafetensorError"),
        (file_bytes({"a": entry("F32", [3], 0, 8)}, bytes(8)), "SafetensorError"),
        (file_bytes({"a": entry("F32", [1 << 62, 4], 0, 8)}, bytes(8)), "SafetensorError"),
        (
            file_bytes({"a": entry("F8_E4M3", [2], 0, 2)}, bytes(2)),
            "tensor 'a' has element type F8_E4M3",
        ),
        (file_bytes({"a": entry("U16", [1], 0, 2)}, bytes(2)), "element type U16"),
        (file_bytes({"a": entry("BOOL", [1], 0, 1)}, b"\x02"), "a bool must be stored as 0 or 1"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([np.zeros(2)], r"\.safetensors holds a flat dict; got type=list"),
        ({"a": {"b": np.zeros(2)}}, "holds tensors by name, nothing else .* key='a', type=dict"),
        ({1: np.zeros(2)}, "got key=1, type=ndarray"),
        ({"a": np.zeros(2, np.complex128)}, "dtype must be one of .* got dtype=complex128"),
    ],
)
def test_values_without_a_place_leave_the_old_file(tmp_path, value, message):
    path = tmp_path / "file.safetensors"
    write_safetensors({"kept": np.ones(1)}, path)
    with pytest.raises(TypeError, match=message):
        write_safetensors(value, path)
    assert list(read_safetensors(path)) == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors({"a": np.ones(1)}, tmp_path / "file.safetensors")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    path = tmp_path / "file.safetensors"
    with pytest.raises(ImportError, match=r"\(pip install safetensors\)"):
        read_safetensors(path) if call == "read" else write_safetensors({}, path)
