"""Models, with torchvision's names, and their pretrained weights."""

from gradengine.models.pretrained import PretrainedWeights, ResNet18_Weights
from gradengine.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PretrainedWeights",
    "ResNet",
    "ResNet18_Weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
