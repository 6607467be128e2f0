"""`load` and `save`: tensors in, tensors out, the format by content and by suffix."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gradengine.tensor import Tensor
from gradengine.weights import WeightFileError, load, read_pth, save, write_pth
from gradengine.weights.tree import map_tree


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_tensors_come_back(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    state = {"weight": Tensor(np.arange(6.0, dtype=np.float32).reshape(2, 3)), "plain": np.ones(2)}
    save(state, tmp_path / f"file{suffix}")
    loaded = load(tmp_path / f"file{suffix}")
    assert set(loaded) == set(state)
    assert all(type(value) is Tensor and not value.requires_grad for value in loaded.values())
    np.testing.assert_array_equal(loaded["weight"].array, state["weight"].array)
    assert loaded["weight"].array.dtype == np.float32
    assert str(loaded["weight"].device) == "cpu"


def test_the_content_tells_the_format(tmp_path):
    pytest.importorskip("safetensors")
    for written, read in [("a.pth", "b.safetensors"), ("c.safetensors", "d.pth")]:
        save({"x": Tensor(np.ones(2))}, tmp_path / written)
        (tmp_path / written).rename(tmp_path / read)
        loaded = load(tmp_path / read)
        assert isinstance(loaded, dict)
        np.testing.assert_array_equal(loaded["x"].array, [1, 1])


def test_nested_values_and_tied_tensors(tmp_path):
    tied = Tensor(np.ones(2))
    save({"epoch": 3, "states": [(tied, None), {0: tied}]}, tmp_path / "file.pth")
    loaded = load(tmp_path / "file.pth")
    (first, nothing), second = loaded["states"]
    assert (loaded["epoch"], nothing) == (3, None)
    assert np.shares_memory(first.array, second[0].array)


def test_the_device_is_passed_on(tmp_path):
    write_pth([np.ones(2)], tmp_path / "file.pth")
    loaded = load(tmp_path / "file.pth", device="cpu")
    assert isinstance(loaded[0], Tensor)


@pytest.mark.gpu
def test_loads_onto_a_gpu_and_saves_from_it(tmp_path):
    write_pth({"a": np.arange(3.0)}, tmp_path / "file.pth")
    loaded = load(tmp_path / "file.pth", device="cuda")
    assert str(loaded["a"].device) == "cuda:0"
    save(loaded, tmp_path / "again.pth")
    again = read_pth(tmp_path / "again.pth")
    np.testing.assert_array_equal(again["a"], np.arange(3.0))


@pytest.mark.parametrize("nest", [lambda module: module, lambda module: {"model": module}])
def test_modules_are_not_weights(tmp_path, nest):
    module = SimpleNamespace(state_dict=dict)
    with pytest.raises(TypeError, match=r"save: pass its state_dict\(\), not the SimpleNamespace"):
        save(nest(module), tmp_path / "file.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file.npz", "file", "file.PTH.gz"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"suffix must be \.pth, \.pt or \.safetensors; got path="):
        save({}, tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK", b"garbage" * 99])
def test_unknown_files_are_refused(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(WeightFileError, match="neither PyTorch's zip format nor its legacy format"):
        load(tmp_path / "file.pth")


def test_map_tree_keeps_order_and_sharing():
    leaf, inner = object(), [1]
    mapped = map_tree(lambda value: [value], {"b": leaf, "a": (leaf, inner, inner)})
    assert list(mapped) == ["b", "a"]
    assert mapped["b"] is mapped["a"][0]
    assert mapped["a"][1] is mapped["a"][2]
    assert mapped["a"][1] == [[1]]


def test_map_tree_refuses_values_in_themselves():
    value: list[object] = []
    value.append(value)
    with pytest.raises(ValueError, match="nest at most 100 deep, none inside itself"):
        map_tree(lambda leaf: leaf, value)
