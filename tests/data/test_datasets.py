"""Datasets: folders good and bad, arrays, digits, and what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradengine.data import (
    ArrayDataset,
    DataError,
    Digits,
    ImageClassification,
    ImageFolder,
    Subset,
    held_out_split,
)

TRANSFORM = ImageClassification(8, 8)


def picture(path: Path, red: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (red, 0, 0)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of two classes: 3 images of cats, one in a folder of its own, and 2 of bees."""
    root = tmp_path / "animals"
    picture(root / "cat" / "b.png", 10)
    picture(root / "cat" / "a.jpg", 0)
    picture(root / "cat" / "more" / "c.bmp", 255)
    picture(root / "bee" / "1.webp", 0)
    picture(root / "bee" / "2.gif", 0, "P")
    return root


def test_classes_and_images_are_in_the_order_of_their_names(folder: Path) -> None:
    images = ImageFolder(folder, TRANSFORM)
    assert images.classes == ["bee", "cat"]
    assert [path.name for path in images.paths] == ["1.webp", "2.gif", "a.jpg", "b.png", "c.bmp"]
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.labels.dtype == np.int64
    assert len(images) == 5


def test_an_item_is_the_transformed_image_and_its_label(folder: Path) -> None:
    image, label = ImageFolder(folder, TRANSFORM)[4]
    assert label == 1
    assert image.shape == (3, 8, 8)
    np.testing.assert_allclose(image.array[0], (1 - 0.485) / 0.229, rtol=1e-5)


def test_the_transform_gets_an_rgb_image(folder: Path) -> None:
    modes = []
    images = ImageFolder(folder, lambda image: modes.append(image.mode))
    for index in range(len(images)):
        images[index]
    assert modes == ["RGB"] * 5


def test_broken_images_are_left_out_and_named_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    big = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg"):
        big.save(folder / "cat" / name)
        content = (folder / "cat" / name).read_bytes()
        (folder / "cat" / name).write_bytes(content[: len(content) // 2])
    (folder / "cat" / "notes.txt").write_text("no image\n")
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "cat" / ".hidden").write_text("passed over")
    images = ImageFolder(folder, TRANSFORM)
    lines = capsys.readouterr().err.splitlines()
    assert len(images) == 5
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        f"left out {folder / 'cat' / name}"
        for name in ("cut.jpg", "cut.png", "empty.png", "notes.txt")
    ]
    for index in range(5):
        images[index]
    assert capsys.readouterr().err == ""


def test_an_image_that_breaks_later_is_named(folder: Path) -> None:
    images = ImageFolder(folder, TRANSFORM)
    images.paths[0].write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1\.webp changed and is broken now: cannot identify"):
        images[0]


def test_hidden_folders_and_loose_files_are_no_classes(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / "README").write_text("")
    assert ImageFolder(folder, TRANSFORM).classes == ["bee", "cat"]


def test_linked_class_folders_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(folder / "cat")
    assert len(ImageFolder(tmp_path / "links", TRANSFORM)) == 3


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there must be such a folder; got folder=.*/nowhere$"):
        ImageFolder(tmp_path / "nowhere", TRANSFORM)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there must be such a folder; got folder=.*/b\.png$"):
        ImageFolder(folder / "cat" / "b.png", TRANSFORM)


def test_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "loose.png")
    with pytest.raises(DataError, match="one folder of images a class; got none in folder="):
        ImageFolder(tmp_path, TRANSFORM)


@pytest.mark.parametrize("count", [0, 1])
def test_class_with_too_few_images(
    folder: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "bee")
    (folder / "bee").mkdir()
    (folder / "bee" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    if count:
        picture(folder / "bee" / "1.png")
    with pytest.raises(DataError, match=rf"\(count >= 2\); got count={count}, folder=.*/bee$"):
        ImageFolder(folder, TRANSFORM)
    assert "broken.png" in capsys.readouterr().err


def test_array_dataset() -> None:
    images = np.zeros((3, 3, 2, 2), np.float32)
    dataset = ArrayDataset(images, np.array([0, 2, 1]))
    assert (len(dataset), dataset.classes) == (3, ["0", "1", "2"])
    assert dataset[1][1] == 2
    assert dataset[1][0].shape == (3, 2, 2)
    assert ArrayDataset(images, np.zeros(3, np.int32), ["only"]).classes == ["only"]


def test_array_dataset_needs_a_label_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"got len\(images\)=3, len\(labels\)=2"):
        ArrayDataset(np.zeros((3, 3, 2, 2)), np.zeros(2))


def labelled(*counts: int) -> ArrayDataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    return ArrayDataset(np.arange(len(labels)), labels)


def test_subset() -> None:
    subset = Subset(labelled(2, 3), np.array([4, 0]))
    assert [subset[index] for index in range(len(subset))] == [(4, 1), (0, 0)]
    assert subset.labels.tolist() == [1, 0]
    assert subset.classes == ["0", "1"]


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ((40, 20), 0.25, [10, 5]),
        ((2, 3), 0.25, [1, 1]),
        ((2, 3), 0.0, [1, 1]),
        ((2, 3), 1.0, [1, 2]),
    ],
)
def test_each_class_is_held_out_in_proportion_and_never_all_of_it(
    counts: tuple[int, ...], fraction: float, expected: list[int]
) -> None:
    dataset = labelled(*counts)
    rest, held_out = held_out_split(dataset, fraction)
    assert np.bincount(held_out.labels).tolist() == expected
    both = [*rest.indices, *held_out.indices]
    assert sorted(both) == list(range(len(dataset)))


def test_split_is_a_function_of_the_seed() -> None:
    chosen = [held_out_split(labelled(40, 20), seed=seed)[1].indices.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_split_needs_two_images_of_each_class() -> None:
    with pytest.raises(ValueError, match=r"\(count >= 2\); got count=1, class=1"):
        held_out_split(labelled(2, 1))


def test_digits_are_real_images_of_ten_classes() -> None:
    digits = Digits(ImageClassification(32, 32))
    assert len(digits) == 1797
    assert digits.classes == list("0123456789")
    assert np.bincount(digits.labels).min() > 170
    image, label = digits[0]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), np.float32, 0)
    assert digits.pixels.max() == 255
    # The middle of a 0 is dark, its stroke is bright.
    assert digits.pixels[0, 4, 4] == 0
    assert digits.pixels[0, 4, 1:3].max() > 100
