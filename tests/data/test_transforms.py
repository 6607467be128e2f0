"""The pretrained networks' preparation of an image, against its definition and PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gradengine.data import ImageClassification

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(tensor: object) -> np.ndarray:
    """Undo the normalisation: (3, H, W) to (H, W, 3) in 0..255."""
    return (np.asarray(tensor).transpose(1, 2, 0) * STD + MEAN) * 255


def test_result_is_a_float_image_with_channels_first() -> None:
    result = ImageClassification()(noise(300, 400))
    assert result.shape == (3, 224, 224)
    assert result.dtype == np.float32
    assert not result.requires_grad


def test_values_are_scaled_and_normalised_by_channel() -> None:
    image = Image.new("RGB", (40, 40), (255, 0, 51))
    result = ImageClassification(32, 36)(image).numpy()
    expected = (np.array([1, 0, 0.2]) - MEAN) / STD
    np.testing.assert_allclose(result, np.broadcast_to(expected[:, None, None], (3, 32, 32)), 1e-5)


def test_middle_is_cut_out_without_resizing_when_the_size_fits() -> None:
    image = noise(10, 13)
    result = pixels_of(ImageClassification(6, 10)(image))
    # (13 - 6) / 2 = 3.5 pixels are left of it: round() takes the even number, as in torchvision.
    np.testing.assert_allclose(result, np.asarray(image)[2:8, 4:10], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(100, 77), (31, 64), (50, 50)])
def test_shorter_side_is_resized_and_the_longer_follows(height: int, width: int) -> None:
    image = noise(height, width)
    shorter = min(height, width)
    size = (40 * width // shorter, 40 * height // shorter)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    top, left = round((size[1] - 32) / 2), round((size[0] - 32) / 2)
    result = pixels_of(ImageClassification(32, 40)(image))
    np.testing.assert_allclose(result, resized[top : top + 32, left : left + 32], atol=1e-3)


def test_resizing_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch")
    image = noise(90, 120)
    planes = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float()[None]
    expected = torch.nn.functional.interpolate(
        planes, size=(40, 53), mode="bilinear", antialias=True, align_corners=False
    )[0, :, 4:36, 10:42]
    result = pixels_of(ImageClassification(32, 40)(image)).transpose(2, 0, 1)
    np.testing.assert_allclose(result, expected.numpy(), atol=1.01)  # Pillow rounds to 8 bits


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    result = ImageClassification(8, 8)(noise(8, 8).convert(mode)).numpy()
    expected = ImageClassification(8, 8)(noise(8, 8).convert(mode).convert("RGB")).numpy()
    np.testing.assert_array_equal(result, expected)


def test_transparent_palette_is_no_warning() -> None:
    image = noise(8, 8).convert("P")
    image.info["transparency"] = b"\x00\x7f"
    assert ImageClassification(8, 8)(image).shape == (3, 8, 8)


def test_the_image_is_left_as_it_was() -> None:
    image = noise(50, 60)
    ImageClassification(32, 40)(image)
    assert image == noise(50, 60)


@pytest.mark.parametrize(("crop", "resize"), [(10, 9), (0, 9)])
def test_crop_must_fit(crop: int, resize: int) -> None:
    message = rf"1 <= crop_size <= resize_size\); got crop_size={crop}, resize_size={resize}"
    with pytest.raises(ValueError, match=message):
        ImageClassification(crop, resize)


def test_it_prints_what_it_does() -> None:
    assert repr(ImageClassification(mean=(0, 0, 0), std=(1, 1, 1))) == (
        "ImageClassification(crop_size=224, resize_size=256, mean=[0.0, 0.0, 0.0], "
        "std=[1.0, 1.0, 1.0])"
    )


def test_16_bit_grey_keeps_its_shades() -> None:
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    prepare = ImageClassification(8, 8, mean=(0, 0, 0), std=(1, 1, 1))
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        np.testing.assert_allclose(prepare(image).numpy()[0], (grey >> 8) / 255, atol=1e-6)
