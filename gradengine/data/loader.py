"""Batches from a dataset, in an order that a resumed run can repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gradengine import devices
from gradengine.data.order import random_order
from gradengine.tensor import Tensor

if TYPE_CHECKING:
    from gradengine.data.datasets import Dataset


class DataLoader:
    """Iterate over a dataset in batches: images (B, 3, H, W) and labels (B,) int64, as tensors.

    With `shuffle` the order is a pure function of (`seed`, `epoch`). `epoch` is the number of the
    next pass and grows by one with each; set it to go on where another run ended. `drop_last`
    leaves out a last batch that is not full. Batches lie on `device` (default: the default device).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: str | devices.Device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(
                "DataLoader: a batch must hold something (batch_size >= 1); "
                f"got batch_size={batch_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.device = device
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.dataset)
        order = random_order(count, self.seed, self.epoch) if self.shuffle else np.arange(count)
        self.epoch += 1
        return self._batches(order)

    def _batches(self, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in range(len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            items = [self.dataset[int(index)] for index in chosen]
            images = np.stack([np.asarray(image) for image, _ in items])
            labels = np.asarray([label for _, label in items], dtype=np.int64)
            yield self._tensor(images), self._tensor(labels)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return Tensor(devices.to_device(array, self.device))
