"""Images and labels for training: datasets, what makes an image a network's input, and batches."""

from gradengine.data.datasets import (
    ArrayDataset,
    DataError,
    Dataset,
    ImageFolder,
    LabelledDataset,
    Subset,
    held_out_split,
)
from gradengine.data.digits import Digits
from gradengine.data.loader import DataLoader
from gradengine.data.transforms import ImageClassification

__all__ = [
    "ArrayDataset",
    "DataError",
    "DataLoader",
    "Dataset",
    "Digits",
    "ImageClassification",
    "ImageFolder",
    "LabelledDataset",
    "Subset",
    "held_out_split",
]
