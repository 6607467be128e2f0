"""What turns a Pillow image into a network's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradengine.tensor import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def as_rgb(image: Image) -> Image:
    """Return a Pillow image of any mode in mode RGB; what is transparent in it is dropped.

    Of 16-bit grey the upper 8 bits stay, where Pillow would make all but the darkest white.
    """
    if image.mode.startswith("I"):
        from PIL.Image import fromarray

        image = fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it drops a palette's transparency
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageClassification:
    """Prepare a Pillow image as the pretrained networks expect it.

    The shorter side becomes `resize_size` pixels (bilinear, antialiased), the middle `crop_size`
    square is cut out, values go from 0..255 to 0..1, and each channel has `mean` taken away and is
    divided by `std`. Calling it returns a (3, crop_size, crop_size) float32 tensor on the CPU.
    """

    def __init__(
        self,
        crop_size: int = 224,
        resize_size: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if not 1 <= crop_size <= resize_size:
            raise ValueError(
                "ImageClassification: the crop must fit into the resized image "
                f"(1 <= crop_size <= resize_size); got crop_size={crop_size}, "
                f"resize_size={resize_size}"
            )
        self.crop_size = crop_size
        self.resize_size = resize_size
        self.mean = np.asarray(mean, dtype=np.float32)
        self.std = np.asarray(std, dtype=np.float32)

    def __call__(self, image: Image) -> Tensor:
        """Return the image as a (3, crop_size, crop_size) float32 tensor."""
        image = self._cropped(self._resized(as_rgb(image)))
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - self.mean) / self.std
        return Tensor(pixels.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)

    def _resized(self, image: Image) -> Image:
        from PIL.Image import Resampling

        shorter = min(image.size)
        if shorter == self.resize_size:
            return image
        # The longer side is rounded down, as in torchvision.
        width, height = (self.resize_size * side // shorter for side in image.size)
        return image.resize((width, height), Resampling.BILINEAR)  # Pillow always antialiases

    def _cropped(self, image: Image) -> Image:
        left, top = (round((side - self.crop_size) / 2) for side in image.size)
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))

    def __repr__(self) -> str:
        return (
            f"ImageClassification(crop_size={self.crop_size}, resize_size={self.resize_size}, "
            f"mean={self.mean.tolist()}, std={self.std.tolist()})"
        )
