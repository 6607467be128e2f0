"""Pretrained weights: where they are, what they need, how a model's `weights` argument is read."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Any, NamedTuple


class WeightsFile(NamedTuple):
    """A published file of weights."""

    url: str
    sha256: str
    size: int  # bytes
    meta: dict[str, Any]  # what is known about the model with these weights
    preset: dict[str, Any]  # arguments of data.transforms.ImageClassification


class PretrainedWeights(enum.Enum):
    """The weights published for one model. Each member's value is a `WeightsFile`."""

    @property
    def url(self) -> str:
        """Where the file is."""
        return self.value.url

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the model with these weights: sizes, and accuracies in percent."""
        return self.value.meta

    def transforms(self) -> Any:
        """Return the function from a Pillow image to what the model takes: (3, 224, 224) floats."""
        from gradengine.data.transforms import ImageClassification

        return ImageClassification(**self.value.preset)

    def fetch(self, progress: bool = True) -> Path:
        """Return the path of the local file, downloaded if need be, its SHA-256 always checked."""
        from gradengine.weights import fetch

        file = self.value
        return fetch(file.url, sha256=file.sha256, size=file.size, progress=progress)


class ResNet18_Weights(PretrainedWeights):  # noqa: N801 - torchvision's name
    """Weights for `resnet18`."""

    IMAGENET1K_V1 = WeightsFile(
        url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
        sha256="f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        size=46_830_571,
        meta={
            "num_classes": 1000,
            "num_params": 11_689_512,
            "min_size": (1, 1),
            "acc@1": 69.758,  # on ImageNet's validation images
            "acc@5": 89.078,
        },
        preset={
            "crop_size": 224,
            "resize_size": 256,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
    )
    DEFAULT = IMAGENET1K_V1


# Models with a published file whose SHA-256 is known in full.
_PUBLISHED: dict[str, type[PretrainedWeights]] = {"resnet18": ResNet18_Weights}


def read_state(name: str, weights: Any, progress: bool, num_classes: int | None) -> dict[str, Any]:
    """Return the state dict that the argument `weights` of model `name` stands for.

    Raises ValueError if it names none, if it is not a state dict, or if a published one has not
    `num_classes`, and FileNotFoundError for a path where there is no file.
    """
    from gradengine.weights import load

    published = _PUBLISHED.get(name)
    if published is not None and isinstance(weights, str) and weights in published.__members__:
        weights = published[weights]
    if isinstance(weights, PretrainedWeights):
        path = _fetched(name, weights, progress, num_classes)
    else:
        path = _existing(name, weights)
    state = load(path)
    if not isinstance(state, dict) or not all(hasattr(value, "shape") for value in state.values()):
        raise ValueError(
            f"{name}: weights must be the file of a state dict (tensors by name); got {path}"
        )
    return state


def _fetched(
    name: str, weights: PretrainedWeights, progress: bool, num_classes: int | None
) -> Path:
    if type(weights) is not _PUBLISHED.get(name):
        raise ValueError(f"{name}: weights must be this model's; got weights={weights}")
    if num_classes not in (None, weights.meta["num_classes"]):
        raise ValueError(
            f"{name}: num_classes must be that of the weights ({weights.meta['num_classes']}), "
            f"replace model.fc afterwards; got num_classes={num_classes}, weights={weights}"
        )
    return weights.fetch(progress)


def _existing(name: str, weights: Any) -> Path:
    published = _PUBLISHED.get(name)
    known = [f'"{member}"' for member in published.__members__] if published else []
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"{name}: weights must be None, {', '.join([*known, 'or a path'])}; got {weights!r}"
        )
    path = Path(weights)
    if not path.is_file():
        names = ", ".join(known) if known else "none, since no download is known for this model"
        raise FileNotFoundError(
            f"{name}: weights must be a known name ({names}) or the path of a file that exists; "
            f"got weights={os.fspath(weights)!r}"
        )
    return path
