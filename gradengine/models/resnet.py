"""Residual networks (He et al., arXiv:1512.03385), with torchvision's names for all parts.

Weights therefore load by name, in both directions. The 3x3 convolution of a bottleneck carries the
stride, as in torchvision, not the 1x1 one before it.
"""

from __future__ import annotations

import os

from gradengine import nn
from gradengine.models import pretrained
from gradengine.tensor import Tensor

Weights = pretrained.PretrainedWeights | str | os.PathLike[str] | None


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `downsample` brings the shortcut to the new shape."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nn.conv_norm(x, self.conv1, self.bn1, activation=self.relu)
        return nn.conv_norm(x, self.conv2, self.bn2, activation=self.relu, residual=shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, which narrow and widen, beside a shortcut."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nn.conv_norm(x, self.conv1, self.bn1, activation=self.relu)
        x = nn.conv_norm(x, self.conv2, self.bn2, activation=self.relu)
        return nn.conv_norm(x, self.conv3, self.bn3, activation=self.relu, residual=shortcut)


class ResNet(nn.Module):
    """Images (N, 3, H, W) in, logits (N, num_classes) out; `layers` counts each stage's blocks.

    Convolutions start from kaiming_normal_ by fan out, batch norms from 1 and 0.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, layers[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, layers[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, layers[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # (N, 3, H, W) -> (N, 64, H / 4, W / 4)
        x = nn.conv_norm(x, self.conv1, self.bn1, activation=self.relu, pool=self.maxpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, features, H / 32, W / 32)
        return self.fc(self.avgpool(x).flatten(1))


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """Return `count` blocks, the first of which changes size and number of channels."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            _conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, width, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, width) for _ in range(count - 1)))


def _build(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: tuple[int, int, int, int],
    weights: Weights,
    progress: bool,
    num_classes: int | None,
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, 1000 if num_classes is None else num_classes)
    state = pretrained.read_state(name, weights, progress, num_classes)
    if num_classes is None and "fc.weight" in state:
        num_classes = state["fc.weight"].shape[0]
    model = ResNet(block, layers, 1000 if num_classes is None else num_classes)
    model.load_state_dict(state)
    return model


def resnet18(
    weights: Weights = None, progress: bool = True, num_classes: int | None = None
) -> ResNet:
    """Return an 18-layer ResNet: 11.7 million parameters.

    `weights` is None for random ones; a member of ResNet18_Weights or its name ("DEFAULT"), whose
    file is downloaded once; or the path of a `.pth` or `.safetensors` file. num_classes is 1000 by
    default, or what a file says. Raises ValueError where num_classes is not that of a member,
    FileNotFoundError for a path of no file, RuntimeError for weights of another model.
    """
    return _build("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, num_classes)


def resnet34(
    weights: Weights = None, progress: bool = True, num_classes: int | None = None
) -> ResNet:
    """Return a 34-layer ResNet: 21.8 million parameters. `weights` is None or a path."""
    return _build("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, num_classes)


def resnet50(
    weights: Weights = None, progress: bool = True, num_classes: int | None = None
) -> ResNet:
    """Return a 50-layer ResNet: 25.6 million parameters. `weights` is None or a path."""
    return _build("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, num_classes)


def resnet101(
    weights: Weights = None, progress: bool = True, num_classes: int | None = None
) -> ResNet:
    """Return a 101-layer ResNet: 44.5 million parameters. `weights` is None or a path."""
    return _build("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, num_classes)


def resnet152(
    weights: Weights = None, progress: bool = True, num_classes: int | None = None
) -> ResNet:
    """Return a 152-layer ResNet: 60.2 million parameters. `weights` is None or a path."""
    return _build("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, num_classes)
