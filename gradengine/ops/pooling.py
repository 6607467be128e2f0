"""Pooling: the largest or the average pixel of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradengine import kernels
from gradengine.kernels.geometry import pool2d_geometry
from gradengine.operation import array_of, operation
from gradengine.ops.interpolation import Taps, resample
from gradengine.ops.reduction import mean
from gradengine.ops.shape import squeeze, unsqueeze
from gradengine.tape import Variable

# ---- largest -------------------------------------------------------------------------------------


@operation(label="MaxPool2DWithIndicesBackward0", keeps=("indices",))
def _max_pool2d(x, *, geometry):
    return kernels.max_pool2d(x, geometry)


@operation(label="MaxPool2DWithIndicesBackward0")
def _max_pool2d_gather(x, *, indices, geometry):
    return kernels.max_pool2d_gather(x, indices, geometry)


@operation(label="MaxPool2DWithIndicesBackwardBackward0")
def max_pool2d_scatter(grad, *, indices, geometry):
    return kernels.max_pool2d_scatter(grad, indices, geometry)


def _max_pool2d_grad(grad: Any, indices: Any, geometry: Any) -> Any:
    return max_pool2d_scatter(grad, indices=indices, geometry=geometry)


_max_pool2d.pullbacks(x=_max_pool2d_grad)
_max_pool2d_gather.pullbacks(x=_max_pool2d_grad)
max_pool2d_scatter.pullbacks(
    grad=lambda x, indices, geometry: _max_pool2d_gather(x, indices=indices, geometry=geometry)
)


def max_pool2d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Return the largest pixel of each window of x (N, C, H, W) or (C, H, W); padding never wins.

    Numbers are ints or (vertical, horizontal) pairs; stride defaults to kernel_size. Along each
    axis out = (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1, with ceil_mode
    rounded up. The first of equal pixels wins and gets the gradient; nan beats all. With
    return_indices also returns the int64 positions h * W + w.
    Raises ValueError if the shapes do not fit.
    """
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if x.ndim == 3:
        out = max_pool2d(unsqueeze(x, 0), *options, return_indices)
        return (squeeze(out[0], 0), squeeze(out[1], 0)) if return_indices else squeeze(out, 0)
    geometry = pool2d_geometry("max_pool2d", x.shape, *options)
    if not return_indices:
        return _max_pool2d(x, geometry=geometry)
    _, indices = kernels.max_pool2d(array_of(x), geometry)
    out = _max_pool2d_gather(x, indices=indices, geometry=geometry)
    indices = indices.astype(np.int64)
    return out, Variable.Result(indices) if isinstance(x, Variable) else indices


# ---- average -------------------------------------------------------------------------------------


@operation(label="AvgPool2DBackward0")
def _avg_pool2d(x, *, geometry):
    return kernels.avg_pool2d(x, geometry)


@operation(label="AvgPool2DBackwardBackward0")
def _avg_pool2d_grad(grad, *, geometry):
    return kernels.avg_pool2d_grad(grad, geometry)


_avg_pool2d.pullbacks(x=lambda grad, geometry: _avg_pool2d_grad(grad, geometry=geometry))
_avg_pool2d_grad.pullbacks(grad=lambda x, geometry: _avg_pool2d(x, geometry=geometry))


def avg_pool2d(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Return the average of each window of x (N, C, H, W) or (C, H, W).

    Numbers are ints or (vertical, horizontal) pairs; sizes are those of `max_pool2d`. Padding is
    zeros that count unless count_include_pad is False; divisor_override replaces the count.
    Raises ValueError if the shapes do not fit.
    """
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if x.ndim == 3:
        return squeeze(avg_pool2d(unsqueeze(x, 0), *options), 0)
    geometry = pool2d_geometry("avg_pool2d", x.shape, *options[:3], 1, *options[3:])
    return _avg_pool2d(x, geometry=geometry)


# What PyTorch calls it: there this pool is a mean.
@operation(label="MeanBackward1")
def _whole_avg_pool2d(x, *, geometry):
    return kernels.avg_pool2d(x, geometry)


_whole_avg_pool2d.pullbacks(x=lambda grad, geometry: _avg_pool2d_grad(grad, geometry=geometry))


def _whole_mean(x: Any) -> Any:
    """Return the mean of each plane of x (N, C, H, W), as (N, C, 1, 1)."""
    array = array_of(x)
    if not kernels.has_kernels(array) or not array.size:
        return mean(x, dim=(2, 3), keepdim=True)
    geometry = pool2d_geometry("adaptive_avg_pool2d", x.shape, x.shape[2:])
    return _whole_avg_pool2d(x, geometry=geometry)


def adaptive_avg_pool2d(x: Any, output_size: int | Sequence[int | None]) -> Any:
    """Return averages of x (N, C, H, W) or (C, H, W) over windows that give `output_size`.

    output_size is an int or a (vertical, horizontal) pair, None keeps the input's size. Window i
    of an axis runs from floor(i * size / out) to ceil((i + 1) * size / out).
    Raises ValueError if x has another rank or a size is not positive.
    """
    if x.ndim == 3:
        return squeeze(adaptive_avg_pool2d(unsqueeze(x, 0), output_size), 0)
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if x.ndim != 4 or len(pair) != 2 or min((1 if s is None else s for s in pair), default=0) < 1:
        raise ValueError(
            "adaptive_avg_pool2d: x must be 3-D or 4-D and output_size one or two positive ints "
            f"(x.ndim in (3, 4) and output_size >= 1); got x.shape={tuple(x.shape)}, "
            f"output_size={output_size}"
        )
    if pair == (1, 1):
        return _whole_mean(x)
    rows, columns = (
        _adaptive_taps(size, size if out is None else out)
        for size, out in zip(x.shape[2:], pair, strict=True)
    )
    return resample(x, rows=rows, columns=columns, label="AdaptiveAvgPool2DBackward0")


def _adaptive_taps(size: int, out: int) -> Taps:
    windows = np.arange(out)
    starts = windows * size // out
    counts = -(-(windows + 1) * size // out) - starts
    steps = np.arange(counts.max())
    covered = steps < counts[:, None]
    return Taps(
        np.where(covered, starts[:, None] + steps, -1),
        np.where(covered, 1 / counts[:, None], 0.0),
        size,
    )
