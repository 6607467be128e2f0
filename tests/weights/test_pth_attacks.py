"""Hostile and damaged `.pth` files: nothing runs, nothing explodes, one exception type."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradengine.weights.error import WeightFileError
from gradengine.weights.pth import read_pth
from tests.weights.pickle_assembler import (
    LEGACY_MAGIC,
    PROTOCOL_2,
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

FUZZ = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Touch:
    """Unpickled by `pickle`, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def attack_programs(target: str) -> dict[str, bytes]:
    mkdir, path = global_("os", "mkdir"), text(target)
    return {
        "REDUCE": mkdir + path + b"\x85R",
        "posix": global_("posix", "mkdir") + path + b"\x85R",
        "builtins": global_("builtins", "eval")
        + text(f"__import__('os').mkdir({target!r})")
        + b"\x85R",
        "dotted": global_("torch", "serialization.os.mkdir") + path + b"\x85R",
        "module dots": global_("torch.serialization.os", "mkdir") + path + b"\x85R",
        "STACK_GLOBAL": text("os") + text("mkdir") + b"\x93" + path + b"\x85R",
        "INST": b"(" + path + b"ios\nmkdir\n",
        "OBJ": b"(" + mkdir + path + b"o",
        "NEWOBJ": mkdir + path + b"\x85\x81",
        "NEWOBJ_EX": mkdir + path + b"\x85}\x92",
        "BUILD with state": global_("torch", "Size") + dict_of(build=mkdir) + b"b",
        "BUILD slots": b"}" + tuple_of(b"N", dict_of(x=mkdir)) + b"b",
        "memo": mkdir + b"q\x000" + b"h\x00" + path + b"\x85R",
        "EXT1": b"\x82\x01" + path + b"\x85R",
        "EXT4": b"\x84\x01\x00\x00\x00" + path + b"\x85R",
        "PERSID": b"Pos.mkdir\n",
        "text as callable": text("os.mkdir") + path + b"\x85R",
        "array as callable": tensor(storage("FloatStorage", "0", 1), 0, (1,), (1,))
        + path
        + b"\x85R",
        "REDUCE with a list": global_("torch", "Size") + list_of(path) + b"R",
        "load by name": global_("torch", "load") + path + b"\x85R",
        "numpy load": global_("numpy", "load") + path + b"\x85R",
        "getattr": global_("builtins", "getattr") + global_("os", "x") + path + b"\x86R",
    }


@pytest.mark.parametrize("name", attack_programs(""))
def test_no_pickle_can_run_code(tmp_path, name):
    target = tmp_path / "made"
    program = attack_programs(str(target))[name]
    path = write_archive(tmp_path / "model.pth", program, {"data/0": bytes(4)})
    with pytest.raises(WeightFileError):
        read_pth(path)
    legacy = tmp_path / "old.pth"
    legacy.write_bytes(legacy_bytes(program, {}))
    with pytest.raises(WeightFileError):
        read_pth(legacy)
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_cannot_run_code(tmp_path, protocol):
    target = tmp_path / "made"
    content = pickle.dumps({"state": Touch(target)}, protocol)
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
    with pytest.raises(WeightFileError):
        read_pth(path)
    path.write_bytes(LEGACY_MAGIC + content)
    with pytest.raises(WeightFileError):
        read_pth(path)
    assert not target.exists()
    pickle.loads(content)
    assert target.exists()  # the attack itself works


def nested(levels: int) -> bytes:
    return b"]" * levels + b"a" * (levels - 1)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (nested(101), "nest at most 100 deep"),
        (nested(200_000), "nest at most 100 deep"),
        (b"N" + b"\x85" * 200_000, "nest at most 100 deep"),
        (b"]q\x00h\x00a", "nest at most 100 deep, none inside itself"),
        (b"}q\x00" + text("a") + b"h\x00s", "none inside itself"),
        (b"N0", "opcode 0x30"),
        (b"NN", "exactly one value"),
        (b"(N", "exactly one value"),
        (b"", "exactly one value"),
        (b"t", "takes a mark that it never made"),
        (b"\x85", "takes a value that it never made"),
        (b"N(\x85", "takes a value that it never made"),
        (b"R", "takes a value that it never made"),
        (b"h\x05", "recalls value 5"),
        (b"j\xff\xff\xff\xff", "recalls value 4294967295"),
        (b"\x8b\xff\xff\xff\x7f", "opcode 0x8b"),
        (b"\x8a\xff\x00", "ends in the middle"),
        (b"X\xff\xff\xff\xff", "ends in the middle"),
        (b"X\x01\x00\x00\x00\xff", "UnicodeDecodeError"),
        (b"cos", "global's name does not end"),
        (b"c" + b"a" * 1000 + b"\n\n", "global's name does not end"),
        (b"\x80\x04N", "protocol must be 2"),
        (b"K\x01K\x02a", "only a list can be appended to"),
        (b")K\x02a", "only a list can be appended to"),
        (b"](NNu", "only a dict can be given items"),
        (b"}(Nu", "only a dict can be given items, in pairs"),
        (b"})Ns", "key must be a string or a number; got a tuple"),
        (b"}]Ns", "key must be a string or a number; got a list"),
        (b"}" + integer(1 << 70) + b"Ns", "key must be a string or a number; got a int"),
        (global_("torch", "Size") + b"NR", "only the known constructors can be called"),
        (global_("torch", "FloatStorage") + b")R", "only the known constructors can be called"),
        (global_("torch", "Size") + b")R", "TypeError"),
        (b"]}b", "only a dict can be given attributes"),
        (b"}]b", "only a dict can be given attributes"),
        (global_("collections", "deque") + b")R", "'collections.deque' is not allowed"),
    ],
)
def test_hostile_structures_are_refused(tmp_path, program, message):
    path = write_archive(tmp_path / "model.pth", program)
    with pytest.raises(WeightFileError, match=message):
        read_pth(path)


def test_values_repeated_by_reference_cannot_explode(tmp_path):
    levels = [b"N\x85q\x00"] + [b"(" + b"h\x00" * 10 + b"tq\x00"] * 50
    program = tuple_of(*levels)
    with pytest.raises(WeightFileError, match="repeated by reference until they hold too many"):
        read_pth(write_archive(tmp_path / "model.pth", program))


def test_values_may_be_shared(tmp_path):
    program = list_of(b"K\x01K\x02\x86q\x00", b"h\x00", b"h\x00")
    assert read_pth(write_archive(tmp_path / "model.pth", program)) == [(1, 2)] * 3


def test_one_list_of_pairs_makes_one_ordered_dict(tmp_path):
    ordered = global_("collections", "OrderedDict") + b"q\x01"
    pairs = list_of(list_of(text("a"), integer(1))) + b"q\x00"
    program = tuple_of(ordered + pairs + b"\x85R", b"h\x01h\x00\x85R")
    assert read_pth(write_archive(tmp_path / "model.pth", program)) == ({"a": 1}, {})


def test_oversized_structures_are_refused(tmp_path):
    path = write_archive(tmp_path / "model.pth", b"N" * (16 << 20))
    with pytest.raises(WeightFileError, match="'data\\.pkl' must have at most 16777216 bytes"):
        read_pth(path)


def test_messages_stay_one_short_line(tmp_path):
    program = global_("\u2028\r\x1b\x0b", "x" * 150)
    with pytest.raises(WeightFileError) as caught:
        read_pth(write_archive(tmp_path / "model.pth", program))
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()


SEED_PROGRAM = dict_of(
    weight=tensor(storage("FloatStorage", "0", 6), 0, (3, 2), (1, 3)),
    bias=tensor(storage("HalfStorage", "1", 2), 1, (1,), (1,)),
    step=integer(7),
    betas=tuple_of(b"G\x3f\xe0\x00\x00\x00\x00\x00\x00", b"K\x01"),
)
SEED_RECORDS = {
    "data/0": np.arange(6, dtype="<f4").tobytes(),
    "data/1": np.arange(2, dtype="<f2").tobytes(),
    "byteorder": b"little",
}


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype != object and value.tobytes() is not None
    return value is None or type(value) in (bool, int, float, str)


def read_or_refuse(path: Path) -> None:
    """Read the file: a plain value or a WeightFileError, and no other outcome."""
    try:
        value = read_pth(path)
    except WeightFileError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert is_plain(value)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("seeds")
    archive = write_archive(folder / "seed.pth", SEED_PROGRAM, SEED_RECORDS).read_bytes()
    old = SEED_PROGRAM.replace(integer(6) + b"tQ", integer(6) + b"NtQ")
    old = old.replace(integer(2) + b"tQ", integer(2) + b"NtQ")
    storages = {"0": np.arange(6, dtype="<f4"), "1": np.arange(2, dtype="<f2")}
    legacy = legacy_bytes(old, storages)
    for content in (archive, legacy):
        (folder / "seed.pth").write_bytes(content)
        assert isinstance(read_pth(folder / "seed.pth"), dict)
    return [archive, legacy]


@FUZZ
@given(data=st.data())
def test_truncated_files(seeds, tmp_path, data):
    content = data.draw(st.sampled_from(seeds))
    path = tmp_path / "model.pth"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(WeightFileError):
        read_pth(path)


@FUZZ
@given(data=st.data())
def test_files_with_changed_bytes(seeds, tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    read_or_refuse(path)


@FUZZ
@given(data=st.data())
def test_changed_structures_with_right_checksums(tmp_path, data):
    program = bytearray(SEED_PROGRAM)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(program) - 1))
        piece = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from(OPCODES)))
        program[start : start + data.draw(st.integers(0, 4))] = piece
    read_or_refuse(write_archive(tmp_path / "model.pth", bytes(program), SEED_RECORDS))


OPCODES = [
    *(bytes([code]) for code in b"(N\x88\x89]})\x85\x86\x87taesuRbQ"),
    *(
        b"K\x00",
        b"K\x06",
        b"q\x00",
        b"q\x01",
        b"h\x00",
        b"h\x01",
        integer(-1),
        text("a"),
        text("0"),
    ),
    *(text("storage"), global_("torch", "FloatStorage"), global_("torch", "Size")),
    *(global_("collections", "OrderedDict"), global_("torch._utils", "_rebuild_tensor_v2")),
    *(storage("FloatStorage", "0", 6), tensor(storage("FloatStorage", "0", 6), 0, (2,), (3,))),
]


@FUZZ
@given(pieces=st.lists(st.sampled_from(OPCODES), max_size=40))
def test_random_programs(tmp_path, pieces):
    read_or_refuse(write_archive(tmp_path / "model.pth", b"".join(pieces), SEED_RECORDS))


@FUZZ
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", LEGACY_MAGIC]))
def test_random_bytes(tmp_path, content, start):
    path = tmp_path / "model.pth"
    path.write_bytes(start + content + PROTOCOL_2 + STOP)
    read_or_refuse(path)
