"""Datasets: labelled images by index, from arrays and from folders, and how to hold some out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradengine.data.order import random_order
from gradengine.data.transforms import as_rgb

if TYPE_CHECKING:
    import os

    from PIL.Image import Image

FEWEST_IMAGES = 2  # of a class: one to learn from and one to hold out


class DataError(ValueError):
    """Say, in one line, why a folder of images cannot be used."""


class Dataset(Protocol):
    """What a `DataLoader` reads: a length, and pairs of an image (3, H, W) and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class LabelledDataset(Dataset, Protocol):
    """A dataset that knows all its labels without reading an image."""

    classes: list[str]  # the name of each label
    labels: np.ndarray  # (len,) int64


class ArrayDataset:
    """Images (N, 3, H, W) float32 and labels (N,) int64 that are in memory already."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(
                "ArrayDataset: each image must have a label (len(images) == len(labels)); "
                f"got len(images)={len(images)}, len(labels)={len(labels)}"
            )
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        names = range(int(self.labels.max(initial=-1)) + 1)
        self.classes = list(map(str, names)) if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


class Subset:
    """Those items of a dataset that `indices` name, in that order."""

    def __init__(self, dataset: LabelledDataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = dataset.labels[indices]
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[int(self.indices[index])]


def held_out_split(
    dataset: LabelledDataset, fraction: float = 0.25, seed: int = 0
) -> tuple[Subset, Subset]:
    """Return (rest, held out): of each class `fraction` is held out, at least one and never all.

    The choice is a pure function of the labels and `seed`. Raises ValueError where a class has
    fewer than two images.
    """
    held_out = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(dataset.labels):
        (members,) = np.nonzero(dataset.labels == label)
        if len(members) < FEWEST_IMAGES:
            raise ValueError(
                "held_out_split: each class must have an image to learn from and one to hold out "
                f"(count >= {FEWEST_IMAGES}); got count={len(members)}, "
                f"class={dataset.classes[label]}"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[random_order(len(members), seed, int(label))[:count]]] = True
    return Subset(dataset, np.flatnonzero(~held_out)), Subset(dataset, np.flatnonzero(held_out))


class ImageFolder:
    """Images from a folder that holds one folder a class, in any format that Pillow reads.

    Classes and images are in the order of their names. Each image is decoded once here, and those
    that are broken are left out and named on stderr; hidden files are passed over. `transform` maps
    an RGB Pillow image to an array (3, H, W).

    Raises:
        DataError: there is no such folder, no class in it, or a class of fewer than 2 images.
    """

    def __init__(self, folder: str | os.PathLike[str], transform: Callable[[Image], Any]) -> None:
        self.folder = Path(folder)
        self.transform = transform
        self.classes = _class_names(self.folder)
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            paths = [path for path in _files(self.folder / name) if _is_usable(path)]
            if len(paths) < FEWEST_IMAGES:
                raise DataError(
                    f"ImageFolder: each class must have an image to learn from and one to hold out "
                    f"(count >= {FEWEST_IMAGES}); got count={len(paths)}, "
                    f"folder={self.folder / name}"
                )
            self.paths += paths
            labels += [label] * len(paths)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()  # before the file is closed
                picture = as_rgb(image)
        except OSError as error:
            raise DataError(f"ImageFolder: {path} changed and is broken now: {error}") from error
        return self.transform(picture), int(self.labels[index])


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"ImageFolder: there must be such a folder; got folder={folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise DataError(
            f"ImageFolder: there must be one folder of images a class; got none in folder={folder}"
        )
    return names


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _is_usable(path: Path) -> bool:
    """Decode an image; name it on stderr if that fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # reads a whole JPEG file, but computes an eighth of it
            image.load()
    # Pillow's decoders answer damaged files with OSError, SyntaxError, struct.error and more.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"ImageFolder: left out {path}: {reason}", file=sys.stderr)
        return False
    return True
