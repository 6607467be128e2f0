"""The eleven distinct convolutions of ResNet-18, and grouped ones: forward and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.geometry import conv2d_geometry

BATCH = 16
PASSES = ("forward", "gradient by input", "gradient by weight")
# (input channels, output channels, input size, kernel, stride)
SHAPES = [
    (3, 64, 224, 7, 2),
    (64, 64, 56, 3, 1),
    (64, 128, 56, 3, 2),
    (64, 128, 56, 1, 2),
    (128, 128, 28, 3, 1),
    (128, 256, 28, 3, 2),
    (128, 256, 28, 1, 2),
    (256, 256, 14, 3, 1),
    (256, 512, 14, 3, 2),
    (256, 512, 14, 1, 2),
    (512, 512, 7, 3, 1),
]
# (channels, size, kernel, stride, groups)
GROUPED = [(64, 56, 3, 1, 64), (128, 28, 3, 2, 128), (256, 14, 5, 1, 256), (256, 14, 3, 1, 32)]


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _peer(
    torch: Any, which: str, tensors: list[Any], stride: int, groups: int
) -> Callable[[], Any]:
    """Return PyTorch's run of one pass on x, weight and grad, in whichever layout they have."""
    x, weight, grad = tensors
    padding = weight.shape[2] // 2
    if which == "forward":
        return lambda: torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, groups)
    mask = (which == "gradient by input", which == "gradient by weight", False)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def _runs(
    torch: Any, which: str, inputs: int, outputs: int, size: int, kernel: int, stride: int,
    groups: int = 1,
) -> tuple[dict[str, Any], float]:  # fmt: skip
    """Return what runs one pass, and its floating point operations."""
    random = np.random.default_rng(0)
    x = _channels_last(random.standard_normal((BATCH, inputs, size, size), dtype=np.float32))
    weight = random.standard_normal((outputs, inputs // groups, kernel, kernel), dtype=np.float32)
    geometry = conv2d_geometry(x.shape, weight.shape, stride, kernel // 2, 1, groups)
    grad = _channels_last(random.standard_normal(geometry.output_shape, dtype=np.float32))
    ours = {
        "forward": lambda: kernels.conv2d(x, weight, None, geometry),
        "gradient by input": lambda: kernels.conv2d_grad_input(grad, weight, geometry),
        "gradient by weight": lambda: kernels.conv2d_grad_weight(grad, x, geometry),
    }
    runs = {"gradengine": ours[which]}
    layouts = {"PyTorch nchw": "contiguous_format", "PyTorch nhwc": "channels_last"}
    for name, layout in layouts.items() if torch else ():
        memory = {"memory_format": getattr(torch, layout)}
        tensors = [torch.from_numpy(array).contiguous(**memory) for array in (x, weight, grad)]
        runs[name] = _peer(torch, which, tensors, stride, groups)
    return runs, 2.0 * grad.size * inputs // groups * kernel**2


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution(race: Any, torch: Any, shape: tuple[int, ...], which: str) -> None:
    inputs, outputs, size, kernel, stride = shape
    runs, flop = _runs(torch, which, *shape)
    name = f"{kernel}x{kernel}, stride {stride}, {inputs} to {outputs} channels, {size} px, {which}"
    race(f"Convolutions of ResNet-18, batch {BATCH}", name, runs, flop=flop, seconds=1.5)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_grouped(race: Any, torch: Any, shape: tuple[int, ...], which: str) -> None:
    channels, size, kernel, stride, groups = shape
    runs, flop = _runs(torch, which, channels, channels, size, kernel, stride, groups)
    kind = "depthwise" if groups == channels else f"{groups} groups"
    name = f"{kernel}x{kernel}, stride {stride}, {channels} channels, {kind}, {size} px, {which}"
    race(f"Grouped convolutions, batch {BATCH}", name, runs, flop=flop, seconds=1.0)
