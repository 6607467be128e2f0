"""`.pth` files between gradengine and PyTorch, in both directions."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from gradengine.weights import pth_writer
from gradengine.weights.error import WeightFileError
from gradengine.weights.pth import read_pth, write_pth

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.pytorch

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def save(value: object, path, zipped: bool) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)


def assert_same(ours, theirs) -> None:
    """Compare a value of arrays with a value of PyTorch tensors, types and strides included."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach()
        assert isinstance(ours, np.ndarray)
        assert ours.shape == tuple(theirs.shape)
        assert ours.dtype == theirs.numpy().dtype
        if ours.size:
            strides = [stride * ours.itemsize for stride in theirs.stride()]
            assert list(ours.strides) == strides
        np.testing.assert_array_equal(ours, theirs.numpy())
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for our_item, their_item in zip(ours, theirs, strict=True):
            assert_same(our_item, their_item)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@FORMATS
@pytest.mark.parametrize("name", DTYPES)
def test_reads_every_dtype(tmp_path, name, zipped):
    value = {
        "matrix": torch.arange(-3, 3).reshape(2, 3).to(getattr(torch, name)),
        "scalar": torch.tensor(1).to(getattr(torch, name)),
        "empty": torch.zeros(0, 4).to(getattr(torch, name)),
    }
    save(value, tmp_path / "file.pth", zipped)
    assert_same(read_pth(tmp_path / "file.pth"), value)


@FORMATS
def test_reads_bfloat16_as_the_same_float32(tmp_path, zipped):
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save(tensor, tmp_path / "file.pth", zipped)
    assert_same(read_pth(tmp_path / "file.pth"), tensor.to(torch.float32))


@FORMATS
def test_reads_views_parameters_and_checkpoints(tmp_path, zipped):
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        "transposed": base.transpose(0, 2),
        "part": base[1, 1:],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "epoch": 3,
        "best": 0.25,
        "large": -(1 << 80),
        "done": False,
        "name": "Züñ",
        "history": [1, 2.5, (None, "x")],
        "many": list(range(1500)),
    }
    save(value, tmp_path / "file.pth", zipped)
    ours = read_pth(tmp_path / "file.pth")
    assert_same(ours, value)
    assert np.shares_memory(ours["transposed"], ours["part"])


@FORMATS
def test_reads_modules_and_optimizers(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [2, 4, 4])
    model(torch.randn(2, 2, 5, 5)).sum().backward()
    adam.step()
    schedule.step()
    state = {"model": model.state_dict(), "adam": adam.state_dict()}
    save(state | {"schedule": schedule.state_dict()}, tmp_path / "file.pth", zipped)
    ours = read_pth(tmp_path / "file.pth")
    assert ours.pop("schedule")["milestones"] == {2: 1, 4: 2}
    assert_same(ours, state)


@FORMATS
def test_reads_sizes_dtypes_and_counters(tmp_path, zipped):
    value = {
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(b=1, a=2),
    }
    save(value, tmp_path / "file.pth", zipped)
    assert read_pth(tmp_path / "file.pth") == {
        "size": (2, 3),
        "dtype": "float16",
        "device": "cpu",
        "counter": {"a": 2, "b": 1},
        "ordered": {"b": 1, "a": 2},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, dtype=torch.complex64), "ComplexFloat is not readable"),
        (torch.zeros(2, dtype=torch.uint16), "uint16"),
        (torch.zeros(1).expand(5), "repeats its storage's elements"),
        (torch.nn.Linear(1, 1), r"'torch\.nn\.modules\.linear\.Linear' is not allowed"),
        ({1, 2}, "set' is not allowed"),
        (np.arange(3), r"'numpy.*' is not allowed"),
        (torch._neg_view(torch.ones(2)), "a tensor with flags"),
    ],
    ids=["complex", "uint16", "expanded", "module", "set", "numpy", "negated"],
)
def test_refuses_by_name(tmp_path, value, message):
    torch.save(value, tmp_path / "file.pth")
    with pytest.raises(WeightFileError, match=message):
        read_pth(tmp_path / "file.pth")


def test_reads_files_without_checksums(tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(torch.arange(5), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_pth(tmp_path / "file.pth"), torch.arange(5))


@pytest.mark.parametrize("name", DTYPES)
def test_pytorch_reads_every_dtype(tmp_path, name):
    value = {
        "matrix": np.arange(-3, 3).reshape(2, 3).astype(name),
        "scalar": np.array(1, name),
        "empty": np.zeros((0, 4), name),
        "swapped": np.arange(3).astype(np.dtype(name).newbyteorder(">")),
        "reversed": np.arange(3).astype(name)[::-1],
        "spread": np.arange(12).astype(name).reshape(3, 4)[:, ::2],
    }
    write_pth(value, tmp_path / "file.pth")
    theirs = torch.load(tmp_path / "file.pth", weights_only=True)
    for key, array in value.items():
        np.testing.assert_array_equal(theirs[key].numpy(), array)
        assert theirs[key].numpy().dtype == array.dtype.newbyteorder("=")
    assert_same(read_pth(tmp_path / "file.pth"), theirs)


def test_pytorch_reads_checkpoints(tmp_path):
    images = np.arange(120.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    value = {
        "state": {"conv.weight": images, "turned": np.arange(6.0).reshape(2, 3).T},
        "tied": [images, images],
        "numbers": (0, -1, 1 << 40, -(1 << 80), 2.5, float("inf"), True, False, None),
        "words": ["", "ä\n", "\udc80"],
        "containers": [[], {}, (), {1: {2.5: (3,)}}],
        "scalars": [np.float32(0.5), np.int64(3), np.bool_(True)],
    }
    write_pth(value, tmp_path / "file.pth")
    theirs = torch.load(tmp_path / "file.pth", weights_only=True)
    assert_same(read_pth(tmp_path / "file.pth"), theirs)
    assert theirs["state"]["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert theirs["state"]["turned"].stride() == (1, 3)
    assert theirs["tied"][0].data_ptr() == theirs["state"]["conv.weight"].data_ptr()
    assert theirs["numbers"] == value["numbers"]
    assert theirs["words"] == value["words"]
    assert theirs["containers"] == value["containers"]
    assert theirs["scalars"] == [0.5, 3, True]


def test_a_pytorch_model_loads_what_it_saved_through_us(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    write_pth(read_pth(tmp_path / "theirs.pth"), tmp_path / "ours.pth")
    fresh = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    fresh.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    for key, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor)


def test_pytorch_maps_our_files_into_memory(tmp_path):
    write_pth({"a": np.arange(100.0)}, tmp_path / "file.pth")
    theirs = torch.load(tmp_path / "file.pth", weights_only=True, mmap=True)
    np.testing.assert_array_equal(theirs["a"].numpy(), np.arange(100.0))


def test_entries_too_large_for_narrow_zip_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(pth_writer, "_ZIP64_FROM", 32)
    value = {"a": np.arange(100.0), "b": np.arange(2.0)}
    write_pth(value, tmp_path / "file.pth")
    theirs = torch.load(tmp_path / "file.pth", weights_only=True, mmap=True)
    assert_same(value, theirs)
    assert_same(read_pth(tmp_path / "file.pth"), theirs)
