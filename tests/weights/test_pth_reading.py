"""`.pth` files put together by hand: what is read, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from gradengine.weights.error import WeightFileError
from gradengine.weights.pth import read_pth
from tests.weights.pickle_assembler import (
    EMPTY_TUPLE,
    LEGACY_MAGIC,
    PROTOCOL_2,
    REDUCE,
    STOP,
    dict_of,
    global_,
    integer,
    legacy_bytes,
    list_of,
    storage,
    tensor,
    text,
    tuple_of,
    write_archive,
)

SIX = np.arange(6, dtype="<f4")
SIX_FLOATS = storage("FloatStorage", "0", 6)


def read_program(folder: Path, program: bytes, records: dict[str, bytes] | None = None):
    records = {"data/0": SIX.tobytes()} if records is None else records
    return read_pth(write_archive(folder / "model.pth", program, records))


def test_numbers_strings_and_containers(tmp_path):
    program = dict_of(
        numbers=tuple_of(
            b"N", b"\x88", b"\x89", b"K\x07", b"M\x01\x02", integer(-3), integer(1 << 70)
        ),
        real=b"G\x3f\xf8\x00\x00\x00\x00\x00\x00",
        words=list_of(text("ä"), b"U\x02ok"),
        appended=b"]K\x01aK\x02a",
        pairs=b"K\x01K\x02\x86",
    )
    assert read_program(tmp_path, program) == {
        "numbers": (None, True, False, 7, 513, -3, 1 << 70),
        "real": 1.5,
        "words": ["ä", "ok"],
        "appended": [1, 2],
        "pairs": (1, 2),
    }


def test_state_dict_with_attributes_becomes_a_plain_dict(tmp_path):
    ordered = global_("collections", "OrderedDict")
    program = ordered + EMPTY_TUPLE + REDUCE + text("a") + integer(1) + b"s"
    program += dict_of(_metadata=b"}") + b"b"
    value = read_program(tmp_path, program)
    assert type(value) is dict
    assert value == {"a": 1}


def test_ordered_dict_of_python_2(tmp_path):
    pairs = list_of(list_of(text("b"), integer(1)), list_of(text("a"), integer(2)))
    program = global_("collections", "OrderedDict") + pairs + b"\x85" + REDUCE
    assert list(read_program(tmp_path, program).items()) == [("b", 1), ("a", 2)]


def test_known_torch_values(tmp_path):
    program = dict_of(
        size=global_("torch", "Size") + tuple_of(integer(2), integer(3)) + b"\x85" + REDUCE,
        dtype=global_("torch", "bfloat16"),
        device=global_("torch", "device") + tuple_of(text("cuda"), integer(1)) + REDUCE,
        counter=global_("collections", "Counter") + b"}K\x05K\x02s\x85" + REDUCE,
    )
    expected = {"size": (2, 3), "dtype": "bfloat16", "device": "cuda:1", "counter": {5: 2}}
    assert read_program(tmp_path, program) == expected


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", "<f8"),
        ("FloatStorage", "<f4"),
        ("HalfStorage", "<f2"),
        ("LongStorage", "<i8"),
        ("IntStorage", "<i4"),
        ("ShortStorage", "<i2"),
        ("CharStorage", "i1"),
        ("ByteStorage", "u1"),
        ("BoolStorage", "?"),
    ],
)
def test_every_element_type(tmp_path, kind, dtype, legacy):
    values = np.array([0, 1, 0, 100, -7, 1]).astype(dtype)
    if legacy:
        path = tmp_path / "model.pth"
        program = tensor(storage(kind, "9", 6, b"N"), 0, (2, 3), (3, 1))
        path.write_bytes(legacy_bytes(program, {"9": values}))
        array = read_pth(path)
    else:
        program = tensor(storage(kind, "0", 6), 0, (2, 3), (3, 1))
        array = read_program(tmp_path, program, {"data/0": values.tobytes()})
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    assert array.flags.writeable
    np.testing.assert_array_equal(array, values.reshape(2, 3))


@pytest.mark.parametrize("legacy", [False, True])
def test_bfloat16_is_widened_exactly(tmp_path, legacy):
    bits = np.array([0x0000, 0x8000, 0x3F80, 0xC049, 0x7F80, 0x0001], "<u2")
    stored = storage("BFloat16Storage", "0", 6, *([b"N"] if legacy else []))
    program = tensor(stored, 0, (6,), (1,))
    if legacy:
        (tmp_path / "model.pth").write_bytes(legacy_bytes(program, {"0": bits}))
        array = read_pth(tmp_path / "model.pth")
    else:
        array = read_program(tmp_path, program, {"data/0": bits.tobytes()})
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.view(np.uint32), bits.astype(np.uint32) << 16)


def test_big_endian_records(tmp_path):
    program = tensor(SIX_FLOATS, 0, (6,), (1,))
    records = {"data/0": SIX.astype(">f4").tobytes(), "byteorder": b"big"}
    array = read_program(tmp_path, program, records)
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, SIX)


def test_unknown_byte_order_is_refused(tmp_path):
    with pytest.raises(WeightFileError, match="byteorder record must be"):
        read_program(tmp_path, b"N", {"byteorder": b"middle"})


def test_offsets_strides_and_shared_storages(tmp_path):
    program = tuple_of(
        tensor(SIX_FLOATS, 0, (3, 2), (1, 3)),
        tensor(SIX_FLOATS, 4, (2,), (1,)),
        tensor(SIX_FLOATS, 5, (), ()),
        tensor(SIX_FLOATS, 0, (0, 3), (3, 1)),
    )
    transposed, tail, scalar, empty = read_program(tmp_path, program)
    np.testing.assert_array_equal(transposed, SIX.reshape(2, 3).T)
    assert transposed.strides == (4, 12)
    np.testing.assert_array_equal(tail, [4, 5])
    assert scalar.shape == ()
    assert empty.shape == (0, 3)
    tail[1] = 9
    assert transposed[2, 1] == 9
    assert scalar == 9


def test_parameters_become_arrays(tmp_path):
    hooks = global_("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    arguments = tuple_of(tensor(SIX_FLOATS, 0, (6,), (1,)), b"\x88", hooks)
    program = global_("torch._utils", "_rebuild_parameter") + arguments + REDUCE
    np.testing.assert_array_equal(read_program(tmp_path, program), SIX)


def test_checksums_of_zero_are_not_checked(tmp_path):
    path = write_archive(
        tmp_path / "model.pth", tensor(SIX_FLOATS, 0, (6,), (1,)), {"data/0": SIX.tobytes()}
    )
    content = path.read_bytes()
    for record in zipfile.ZipFile(path).infolist():
        content = content.replace(record.CRC.to_bytes(4, "little"), bytes(4))
    path.write_bytes(content)
    np.testing.assert_array_equal(read_pth(path), SIX)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (7,), (1,), "reaches to element 6 of a storage of 6"),
        (1, (6,), (1,), "reaches to element 6"),
        (0, (2, 2), (5, 1), "reaches to element 6"),
        (1 << 62, (1,), (1,), "reaches to element"),
        (-1, (1,), (1,), "offset must be a non-negative integer"),
        (5, (2,), (-1,), "stride must be a non-negative integer"),
        (0, (-1,), (1,), "size must be a non-negative integer"),
        (0, (1 << 40,), (0,), "repeats its storage's elements"),
        (0, (1 << 62, 1 << 62, 1 << 62), (0, 0, 0), "repeats its storage's elements"),
        (0, (2,), (1, 1), "one stride an axis"),
        (0, (1,) * 65, (1,) * 65, "at most 64 axes"),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, shape, strides, message):
    with pytest.raises(WeightFileError, match=message):
        read_program(tmp_path, tensor(SIX_FLOATS, offset, shape, strides))


def test_tensor_sizes_must_be_integers(tmp_path):
    program = tensor(SIX_FLOATS, 0, (6,), (1,)).replace(
        integer(0) + tuple_of(integer(6)), b"\x89" + tuple_of(integer(6))
    )
    with pytest.raises(WeightFileError, match="offset must be a non-negative integer; got False"):
        read_program(tmp_path, program)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            tensor(storage("FloatStorage", "0", 7), 0, (1,), (1,)),
            "claims 28 bytes of a record of 24",
        ),
        (tensor(storage("FloatStorage", "0", 1 << 62), 0, (1,), (1,)), "of a record of 24"),
        (tensor(storage("FloatStorage", "0", -1), 0, (1,), (1,)), "length must be a non-negative"),
        (tensor(storage("FloatStorage", "1", 6), 0, (1,), (1,)), "record 'data/1' is missing"),
        (tensor(storage("FloatStorage", "../version", 0), 0, (0,), (1,)), "is missing"),
        (tensor(storage("FloatStorage", "0", 6, b"N"), 0, (1,), (1,)), "must describe a storage"),
        (tuple_of(text("storage")) + b"Q", "must describe a storage"),
        (b"NQ", "must describe a storage"),
        (storage("FloatStorage", "0", 6), "weights hold no Storage"),
        (global_("torch", "FloatStorage"), "weights hold no ElementType"),
        (global_("torch", "Size"), "weights hold no Constructor"),
        (list_of(SIX_FLOATS, storage("IntStorage", "0", 6)), "'0' is described in two ways"),
        (list_of(SIX_FLOATS, storage("FloatStorage", "0", 5)), "'0' is described in two ways"),
        (
            tensor(storage("ComplexFloatStorage", "0", 3), 0, (3,), (1,)),
            "ComplexFloat is not readable",
        ),
        (tensor(storage("QInt8Storage", "0", 3), 0, (3,), (1,)), "QInt8 is not readable"),
        (tensor(storage("BoolStorage", "0", 24), 0, (3,), (1,)), "a bool must be stored as 0 or 1"),
        (tensor(SIX_FLOATS, 0, (6,), (1,), dict_of(neg=b"\x88")), "a tensor with flags"),
        (tensor(text("0"), 0, (6,), (1,)), "a tensor must be a view of a storage"),
        (global_("torch", "Size") + b"K\x01\x85R", "a Size must be made of a tuple"),
        (global_("torch", "device") + b"K\x01\x85R", "a device must be made of a name"),
        (global_("collections", "Counter") + b"K\x01\x85R", "a Counter must be made of a dict"),
        (global_("collections", "OrderedDict") + b"}\x85R", "made of a list of pairs"),
        (global_("torch._utils", "_rebuild_parameter") + b"NNN\x87R", "must hold a tensor"),
    ],
)
def test_bad_structures_are_refused(tmp_path, program, message):
    with pytest.raises(WeightFileError, match=message) as caught:
        read_program(tmp_path, program)
    assert str(caught.value).startswith(str(tmp_path / "model.pth"))
    assert "\n" not in str(caught.value)


def test_compressed_entries_are_refused(tmp_path):
    path = write_archive(
        tmp_path / "bomb.pth", b"N", {"data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(WeightFileError, match="must not be compressed"):
        read_pth(path)


def test_entries_over_each_other_are_refused(tmp_path):
    path = write_archive(tmp_path / "model.pth", b"N", {"data/0": bytes(64), "data/1": bytes(64)})
    infos = {info.filename: info for info in zipfile.ZipFile(path).infolist()}
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    moved = infos["model/data/1"].header_offset.to_bytes(4, "little")
    first = infos["model/data/0"].header_offset.to_bytes(4, "little")
    path.write_bytes(content[:directory] + content[directory:].replace(moved, first, 1))
    with pytest.raises(WeightFileError, match="overlap"):
        read_pth(path)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = write_archive(tmp_path / "model.pth", b"N", {"data/0": b"a", "data/1": b"b"})
    path.write_bytes(path.read_bytes().replace(b"data/1", b"data/0"))
    with pytest.raises(WeightFileError, match="two entries of one name"):
        read_pth(path)


@pytest.mark.parametrize(
    "names", [[], ["data.pkl"], ["a/data.pkl", "b/data.pkl"], ["a/b/data.pkl"]]
)
def test_archives_need_one_structure_record(tmp_path, names):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", b"")
        for name in names:
            archive.writestr(name, PROTOCOL_2 + b"N" + STOP)
    with pytest.raises(WeightFileError, match="one folder with a data\\.pkl"):
        read_pth(path)


def test_a_changed_byte_is_noticed(tmp_path):
    path = write_archive(
        tmp_path / "model.pth", tensor(SIX_FLOATS, 0, (6,), (1,)), {"data/0": SIX.tobytes()}
    )
    content = bytearray(path.read_bytes())
    content[content.index(SIX.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match="CRC"):
        read_pth(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither PyTorch's zip format nor its legacy format"),
        (b"<!DOCTYPE html>", "neither PyTorch's zip format"),
        (PROTOCOL_2 + b"N" + STOP, "neither PyTorch's zip format"),
        (b"PK\x03\x04", "BadZipFile"),
        (b"\0" * 257 + b"ustar\x0000" + b"\0" * 300, "the tar format of PyTorch 0.1 is too old"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, content, message):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message):
        read_pth(path)


def test_missing_files_are_not_weight_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pth(tmp_path / "none.pth")


def legacy_six(count: int = 6) -> bytes:
    return tensor(storage("FloatStorage", "7", count, b"N"), 0, (3, 2), (1, 3))


def test_legacy_file(tmp_path):
    path = tmp_path / "old.pth"
    other = tensor(storage("LongStorage", "3", 1, b"N"), 0, (), ())
    program = dict_of(weight=legacy_six(), tied=legacy_six(), steps=other)
    path.write_bytes(legacy_bytes(program, {"3": np.array([12], "<i8"), "7": SIX}))
    value = read_pth(path)
    np.testing.assert_array_equal(value["weight"], SIX.reshape(2, 3).T)
    assert value["steps"] == 12
    assert np.shares_memory(value["weight"], value["tied"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy_bytes(legacy_six(), {"7": SIX})[:-1], "ends in the middle of a storage"),
        (legacy_bytes(legacy_six(), {"7": SIX[:5]}), "'7' is described in two ways"),
        (legacy_bytes(legacy_six(), {}), "must be those that the tensors refer to"),
        (legacy_bytes(legacy_six(), {"7": SIX, "8": SIX}), "must be those that the tensors"),
        (legacy_bytes(legacy_six(1 << 40), {"7": SIX}), "claim more bytes than the file has"),
        (legacy_bytes(list_of(legacy_six(), legacy_six(5)), {"7": SIX}), "reaches|two ways"),
        (
            legacy_bytes(tensor(storage("FloatStorage", "7", 6, b")"), 0, (1,), (1,)), {"7": SIX}),
            "a view of another storage is not readable",
        ),
        (LEGACY_MAGIC, "ends in the middle of an opcode"),
        (LEGACY_MAGIC + PROTOCOL_2 + b"K\x01" + STOP, "version must be 1001"),
        (LEGACY_MAGIC + PROTOCOL_2 + b"NQ" + STOP, "a storage stands where none is expected"),
    ],
)
def test_bad_legacy_files_are_refused(tmp_path, content, message):
    path = tmp_path / "old.pth"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message):
        read_pth(path)


def test_legacy_keys_must_be_strings(tmp_path):
    path = tmp_path / "old.pth"
    content = legacy_bytes(legacy_six(), {"7": SIX})
    path.write_bytes(content.replace(list_of(text("7")), text("7")))
    with pytest.raises(WeightFileError, match="keys must be a list of strings"):
        read_pth(path)
