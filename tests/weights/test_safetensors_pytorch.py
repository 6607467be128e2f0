"""`.safetensors` files between gradengine and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from gradengine.weights.safetensors_format import read_safetensors, write_safetensors

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.pytorch


def test_reads_a_model_of_pytorch(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    library.save_file(model.state_dict(), tmp_path / "file.safetensors")
    ours = read_safetensors(tmp_path / "file.safetensors")
    assert set(ours) == set(model.state_dict())
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(ours[key], tensor.numpy())


def test_reads_bfloat16(tmp_path):
    tensor = torch.randn(20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    library.save_file({"a": tensor}, tmp_path / "file.safetensors")
    ours = read_safetensors(tmp_path / "file.safetensors")["a"]
    np.testing.assert_array_equal(ours, tensor.to(torch.float32).numpy())


def test_pytorch_reads_ours(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(3), "c": np.zeros((0, 2), bool)}
    write_safetensors(arrays, tmp_path / "file.safetensors")
    theirs = library.load_file(tmp_path / "file.safetensors")
    for key, array in arrays.items():
        np.testing.assert_array_equal(theirs[key].numpy(), array)
