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


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _peer(torch: Any, which: str, tensors: list[Any], stride: int) -> Callable[[], Any]:
    """Return PyTorch's run of one pass on x, weight and grad, in whichever layout they have."""
    x, weight, grad = tensors
    padding = weight.shape[2] // 2
    if which == "forward":
        return lambda: torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    mask = (which == "gradient by input", which == "gradient by weight", False)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def _peers(torch: Any, which: str, arrays: tuple[np.ndarray, ...], stride: int) -> dict[str, Any]:
    layouts = {"PyTorch nchw": torch.contiguous_format, "PyTorch nhwc": torch.channels_last}
    runs = {}
    for name, layout in layouts.items():
        tensors = [torch.from_numpy(array).contiguous(memory_format=layout) for array in arrays]
        runs[name] = _peer(torch, which, tensors, stride)
    return runs


@pytest.mark.parametrize("which", ["forward", "gradient by input", "gradient by weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution(race: Any, torch: Any, shape: tuple[int, ...], which: str) -> None:
    inputs, outputs, size, kernel, stride = shape
    random = np.random.default_rng(0)
    x = _channels_last(random.standard_normal((BATCH, inputs, size, size), dtype=np.float32))
    weight = random.standard_normal((outputs, inputs, kernel, kernel), dtype=np.float32)
    geometry = conv2d_geometry(x.shape, weight.shape, stride, kernel // 2, 1, 1)
    grad = _channels_last(random.standard_normal(geometry.output_shape, dtype=np.float32))
    ours = {
        "forward": lambda: kernels.conv2d(x, weight, None, geometry),
        "gradient by input": lambda: kernels.conv2d_grad_input(grad, weight, geometry),
        "gradient by weight": lambda: kernels.conv2d_grad_weight(grad, x, geometry),
    }
    runs = {"gradengine": ours[which]}
    if torch:
        runs |= _peers(torch, which, (x, weight, grad), stride)
    name = f"{kernel}x{kernel}, stride {stride}, {inputs} to {outputs} channels, {size} px, {which}"
    group = f"Convolutions of ResNet-18, batch {BATCH}"
    race(group, name, runs, flop=2 * grad.size * inputs * kernel**2, seconds=1.5)
