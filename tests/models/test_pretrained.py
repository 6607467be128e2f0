"""The argument `weights`: names, files, and what is wrong with them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import gradengine as ge
from gradengine import models, weights
from gradengine.models import ResNet18_Weights
from gradengine.models.pretrained import WeightsFile


@pytest.fixture(scope="module")
def state():
    return models.resnet18().state_dict()


def with_head(state, classes):
    """Return the state with a head of another size."""
    head = {
        "fc.weight": ge.ones(classes, 512, device="cpu"),
        "fc.bias": ge.ones(classes, device="cpu"),
    }
    return dict(state) | head


def test_the_published_file_and_its_facts():
    member = ResNet18_Weights.DEFAULT
    assert member is ResNet18_Weights.IMAGENET1K_V1
    assert member.url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    file = member.value
    assert file.sha256.startswith("f37072fd")
    assert len(file.sha256) == 64
    assert file.size == 46_830_571
    assert member.meta["num_params"] == 11_689_512
    assert member.meta["num_classes"] == 1000
    assert (member.meta["acc@1"], member.meta["acc@5"]) == (69.758, 89.078)


def test_the_preset_of_the_published_file():
    preset = ResNet18_Weights.DEFAULT.transforms()
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("RGB", (400, 300), (255, 0, 0))
    pixels = np.asarray(preset(image))
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.float32
    expected = (np.array([1, 0, 0]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[:, 100, 100], expected, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_path_gives_the_weights_and_the_number_of_classes(state, tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"model{suffix}"
    ge.save(with_head(state, 7), path)
    for spelled in (path, str(path)):
        model = models.resnet18(weights=spelled)
        assert model.fc.out_features == 7
        np.testing.assert_array_equal(model.conv1.weight.array, state["conv1.weight"].array)
        assert model.training
    assert models.resnet18(path, num_classes=7).fc.out_features == 7
    with pytest.raises(RuntimeError, match="size mismatch for fc.weight: .* shape .7, 512. from"):
        models.resnet18(path, num_classes=10)


def test_a_file_without_counts_is_complete(state, tmp_path):
    path = tmp_path / "old.pth"
    ge.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert len(models.resnet18(path).state_dict()) == 122


def test_a_file_of_another_model_is_refused(state, tmp_path):
    path = tmp_path / "model.pth"
    ge.save(dict(state), path)
    with pytest.raises(RuntimeError, match=r"(?s)loading state_dict for ResNet:.*Missing key\(s\)"):
        models.resnet50(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "model": {}}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    ge.save(content, path)
    with pytest.raises(
        ValueError, match=r"resnet18: weights must be the file of a state dict .*checkpoint.pth"
    ):
        models.resnet18(path)


def test_a_missing_file_is_named_in_one_line():
    with pytest.raises(
        FileNotFoundError,
        match=r'must be a known name \("IMAGENET1K_V1", "DEFAULT"\) or the path of a file that exists; '
        "got weights='nowhere.pth'",
    ) as caught:
        models.resnet18("nowhere.pth")
    assert "\n" not in str(caught.value)


def test_other_depths_say_that_they_have_no_download():
    with pytest.raises(
        FileNotFoundError, match="resnet50: .*none, since no download is known for this model"
    ):
        models.resnet50("DEFAULT")
    with pytest.raises(
        ValueError, match="resnet50: weights must be this model's; got weights=ResNet18_Weights"
    ):
        models.resnet50(ResNet18_Weights.DEFAULT)
    with pytest.raises(
        TypeError,
        match='resnet18: weights must be None, "IMAGENET1K_V1", "DEFAULT", or a path; got True',
    ):
        models.resnet18(True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", ResNet18_Weights.DEFAULT])
def test_published_weights_have_a_thousand_classes(name):
    with pytest.raises(
        ValueError, match=r"num_classes must be that of the weights \(1000\), replace model.fc"
    ):
        models.resnet18(name, num_classes=10)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", ResNet18_Weights.DEFAULT])
def test_published_weights_are_fetched_and_checked(state, tmp_path, monkeypatch, name):
    path = tmp_path / "resnet18-test.pth"
    ge.save(dict(state), path)
    content = path.read_bytes()
    asked = []

    def fetch(url, **options):
        asked.append((url, options))
        return path

    monkeypatch.setattr(weights, "fetch", fetch)
    model = models.resnet18(name, progress=False)
    np.testing.assert_array_equal(model.fc.weight.array, state["fc.weight"].array)
    file = ResNet18_Weights.DEFAULT.value
    options = {"sha256": file.sha256, "size": file.size, "progress": False}
    assert asked == [(file.url, options)]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    digest = hashlib.sha256(content).hexdigest()
    local = WeightsFile(path.as_uri(), digest, len(content), file.meta, file.preset)
    monkeypatch.setattr(ResNet18_Weights.DEFAULT, "_value_", local)
    fetched = ResNet18_Weights.DEFAULT.fetch(progress=False)
    assert fetched.read_bytes() == content
