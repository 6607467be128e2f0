"""Real images that need no download: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Digits:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels each, with labels 0 to 9.

    `transform` maps a Pillow image (mode L) to an array (3, H, W). They come from the UCI archive
    (Alpaydin and Kaynak, 1998).
    """

    def __init__(self, transform: Callable[[Image], Any]) -> None:
        from sklearn.datasets import load_digits

        found: Any = load_digits()
        self.transform = transform
        self.pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # they are 0 to 16
        self.labels = found.target.astype(np.int64)
        self.classes = [str(name) for name in found.target_names]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])
