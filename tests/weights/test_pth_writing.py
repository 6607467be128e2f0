"""`.pth` files that gradengine writes: round trips, alignment, and safety of the old file."""

from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from gradengine.weights import pth_writer
from gradengine.weights.pth import read_pth, write_pth

NAMES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
ARRAYS = st.sampled_from(NAMES).flatmap(
    lambda name: arrays(name, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(1 << 63), (1 << 63) - 1), inner, max_size=4)
    ),
    max_leaves=12,
)


def assert_same(ours, expected) -> None:
    assert type(ours) is type(expected)
    if isinstance(expected, np.ndarray):
        assert ours.dtype == expected.dtype
        assert ours.shape == expected.shape
        assert ours.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(ours) == list(expected)
        for key in expected:
            assert_same(ours[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(ours) == len(expected)
        for our_item, item in zip(ours, expected, strict=True):
            assert_same(our_item, item)
    else:
        assert ours == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
def test_what_is_written_is_read(tmp_path, value):
    write_pth(value, tmp_path / "file.pth")
    assert_same(read_pth(tmp_path / "file.pth"), value)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_permuted_layouts_are_kept(tmp_path, axes):
    array = np.arange(120.0).reshape(2, 3, 4, 5).transpose(axes)
    write_pth(array, tmp_path / "file.pth")
    ours = read_pth(tmp_path / "file.pth")
    assert isinstance(ours, np.ndarray)
    assert ours.strides == array.strides
    np.testing.assert_array_equal(ours, array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0)[::-1],
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.broadcast_to(np.arange(3.0), (4, 3)),
    ],
    ids=["reversed", "spread", "broadcast"],
)
def test_other_layouts_become_contiguous(tmp_path, array):
    write_pth(array, tmp_path / "file.pth")
    ours = read_pth(tmp_path / "file.pth")
    assert isinstance(ours, np.ndarray)
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, array)


def test_tied_arrays_share_one_storage(tmp_path):
    array = np.arange(6.0)
    write_pth({"a": array, "b": array.view(), "c": array.copy()}, tmp_path / "file.pth")
    names = zipfile.ZipFile(tmp_path / "file.pth").namelist()
    assert [name for name in names if "/data/" in name] == ["archive/data/0", "archive/data/1"]
    ours = read_pth(tmp_path / "file.pth")
    assert np.shares_memory(ours["a"], ours["b"])


@pytest.mark.parametrize("wide", [False, True])
def test_entries_are_aligned_and_reproducible(tmp_path, monkeypatch, wide):
    if wide:
        monkeypatch.setattr(pth_writer, "_ZIP64_FROM", 0)
    value = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(7.0), "c": np.zeros(0)}
    write_pth(value, tmp_path / "one.pth")
    write_pth(value, tmp_path / "two.pth")
    content = (tmp_path / "one.pth").read_bytes()
    assert content == (tmp_path / "two.pth").read_bytes()
    for entry in zipfile.ZipFile(tmp_path / "one.pth").infolist():
        assert entry.compress_type == zipfile.ZIP_STORED
        name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
        assert (entry.header_offset + 30 + name + extra) % 64 == 0
    assert_same(read_pth(tmp_path / "one.pth"), value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"a": object()}, TypeError, r"a value must be a tensor, dict, .*; got type=object"),
        ([b"bytes"], TypeError, "got type=bytes"),
        ([1j], TypeError, "got type=complex"),
        (np.zeros(2, np.complex64), TypeError, "dtype must be one of .*; got dtype=complex64"),
        (np.zeros(2, np.uint32), TypeError, "got dtype=uint32"),
        (np.array(["a"]), TypeError, "got dtype=<U1"),
        (np.array([None]), TypeError, "got dtype=object"),
        ({(1, 2): 3}, ValueError, "key must be a string or a number; got a tuple"),
        ({1 << 70: 3}, ValueError, "key must be a string or a number; got a int"),
        (1 << 3000, ValueError, "an int must fit 255 bytes; got 376 bytes"),
    ],
)
def test_values_without_a_place_leave_the_old_file(tmp_path, value, error, message):
    write_pth({"kept": 1}, tmp_path / "file.pth")
    with pytest.raises(error, match=message):
        write_pth(value, tmp_path / "file.pth")
    assert read_pth(tmp_path / "file.pth") == {"kept": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_containers_in_themselves_are_refused(tmp_path):
    value: list[object] = []
    value.append(value)
    with pytest.raises(ValueError, match="save: containers must nest at most 100 deep, none in"):
        write_pth(value, tmp_path / "file.pth")


def test_deepest_nesting_is_read_again(tmp_path):
    value: object = None
    for _ in range(100):
        value = [value]
    write_pth(value, tmp_path / "file.pth")
    assert read_pth(tmp_path / "file.pth") == value


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_pth({"kept": 1}, tmp_path / "file.pth")

    def fail(*_args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pth_writer, "_add", fail)
        with pytest.raises(type(error)):
            write_pth({"new": 2}, tmp_path / "file.pth")
    assert read_pth(tmp_path / "file.pth") == {"kept": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_links_are_followed(tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "file.pth")
    write_pth(1, tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert read_pth(tmp_path / "file.pth") == 1
