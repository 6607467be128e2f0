"""Batches: what they hold, and that their order depends on the seed and the epoch alone."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

import gradengine as ge
from gradengine.data import ArrayDataset, DataLoader
from gradengine.data.order import random_order


def numbered(count: int) -> ArrayDataset:
    """Give images whose every pixel is their number, which is their label too."""
    numbers = np.arange(count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 3, 2, 2)).astype(np.float32)
    return ArrayDataset(images, numbers)


def labels_of(loader: DataLoader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def test_batches_are_tensors_of_images_and_labels() -> None:
    batches = list(DataLoader(numbered(5), batch_size=2, device="cpu"))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3], [4]]
    for images, labels in batches:
        assert isinstance(images, ge.Tensor)
        assert images.shape == (len(labels), 3, 2, 2)
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
        assert images.array[:, 0, 0, 0].tolist() == labels.tolist()


def test_images_may_be_tensors() -> None:
    class Pictures:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[ge.Tensor, int]:
            return ge.Tensor(np.full((3, 1, 1), index, np.float32)), index

    ((images, _),) = DataLoader(Pictures(), batch_size=2, device="cpu")
    assert images.array[:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("drop_last", "expected"), [(False, [2, 2, 1]), (True, [2, 2])], ids=["all", "drop_last"]
)
def test_last_batch(drop_last: bool, expected: list[int]) -> None:
    loader = DataLoader(numbered(5), batch_size=2, drop_last=drop_last)
    assert list(map(len, labels_of(loader))) == expected
    assert len(loader) == len(expected)


def test_no_images_make_no_batches() -> None:
    loader = DataLoader(numbered(0), batch_size=2)
    assert (len(loader), list(loader)) == (0, [])


def test_each_epoch_shows_every_image_once_in_its_own_order() -> None:
    loader = DataLoader(numbered(20), batch_size=7, shuffle=True, seed=3)
    epochs = [[*chain.from_iterable(labels_of(loader))] for _ in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert loader.epoch == 4


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = DataLoader(numbered(20), batch_size=7, shuffle=True, seed=3)
    epochs = [labels_of(first) for _ in range(3)]
    ge.manual_seed(99)  # neither the process's stream nor earlier passes play a part
    resumed = DataLoader(numbered(20), batch_size=7, shuffle=True, seed=3)
    resumed.epoch = 2
    assert labels_of(resumed) == epochs[2]
    other = DataLoader(numbered(20), batch_size=7, shuffle=True, seed=4)
    other.epoch = 2
    assert labels_of(other) != epochs[2]


def test_a_pass_that_is_broken_off_counts() -> None:
    loader = DataLoader(numbered(20), batch_size=7, shuffle=True)
    next(iter(loader))
    again = DataLoader(numbered(20), batch_size=7, shuffle=True)
    again.epoch = 1
    assert labels_of(loader) == labels_of(again)


def test_shuffling_leaves_the_random_stream_alone() -> None:
    ge.manual_seed(5)
    expected = ge.rand(3).tolist()
    ge.manual_seed(5)
    labels_of(DataLoader(numbered(20), shuffle=True))
    assert ge.rand(3).tolist() == expected


def test_random_order_stays_what_it_is() -> None:
    # A resumed run relies on this in later versions too.
    assert random_order(8, seed=1, stream=2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert random_order(0, 0, 0).tolist() == []


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"batch_size >= 1\); got batch_size=0"):
        DataLoader(numbered(3), batch_size=0)


@pytest.mark.gpu
def test_batches_are_made_on_the_gpu() -> None:
    ((images, labels),) = DataLoader(numbered(2), batch_size=2, device="cuda")
    assert images.is_cuda
    assert labels.is_cuda
    assert images.cpu().array[:, 0, 0, 0].tolist() == [0, 1]
