"""The eleven distinct convolutions of ResNet-18, batch 16 at 224 pixels: forward and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.geometry import conv2d_geometry

BATCH = 16
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
PASSES = ("forward", "grad_input", "grad_weight")


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _peer(torch: Any, which: str, x: Any, weight: Any, grad: Any, stride: int) -> Callable[[], Any]:
    """Return PyTorch's run of one pass, with everything in its faster layout, channels last."""
    x, weight, grad = (
        torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
        for array in (x, weight, grad)
    )
    padding = weight.shape[2] // 2
    if which == "forward":
        return lambda: torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    mask = (which == "grad_input", which == "grad_weight", False)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s[3]}x{s[3]}/{s[4]}-{s[0]}-{s[1]}-{s[2]}px"
)
def test_convolution(race: Any, torch: Any, shape: tuple[int, ...], which: str) -> None:
    inputs, outputs, size, kernel, stride = shape
    random = np.random.default_rng(0)
    x = _channels_last(random.standard_normal((BATCH, inputs, size, size), dtype=np.float32))
    weight = random.standard_normal((outputs, inputs, kernel, kernel), dtype=np.float32)
    geometry = conv2d_geometry(x.shape, weight.shape, stride, kernel // 2, 1, 1)
    grad = _channels_last(random.standard_normal(geometry.output_shape, dtype=np.float32))
    runs = {
        "forward": lambda: kernels.conv2d(x, weight, None, geometry),
        "grad_input": lambda: kernels.conv2d_grad_input(grad, weight, geometry),
        "grad_weight": lambda: kernels.conv2d_grad_weight(grad, x, geometry),
    }
    flop = 2 * grad.size * inputs * kernel**2
    peer = _peer(torch, which, x, weight, grad, stride) if torch else None
    race(runs[which], peer, flop=flop, rounds=7)
