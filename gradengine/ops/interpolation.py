"""Interpolation: images resized along both axes, by a table of weighted pixels for each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.dtypes import is_floating_point
from gradengine.operation import operation
from gradengine.precision import raised


class Taps(NamedTuple):
    """How each output position of one axis is made: a sum of weighted input positions."""

    positions: np.ndarray  # (out, taps) input positions, -1 where there is none
    weights: np.ndarray  # (out, taps)
    size: int  # of the input axis


@operation(label=lambda rows, columns, label: label)
def resample(x, *, rows, columns, label):
    """Apply Taps to the rows and the columns of x (N, C, H, W); `label` names the node."""
    pixels = kernels.weigh(x.transpose(0, 2, 3, 1), rows.positions, rows.weights, 1)
    pixels = kernels.weigh(pixels, columns.positions, columns.weights, 2)
    return pixels.transpose(0, 3, 1, 2)  # channels-last in memory


resample.pullbacks(
    x=lambda grad, rows, columns, label: resample(
        grad, rows=_transposed(rows), columns=_transposed(columns), label=label
    )
)


def _transposed(taps: Taps) -> Taps:
    """Return the taps of the adjoint: which outputs each input position is part of."""
    outputs, taken = np.nonzero(taps.positions >= 0)
    inputs, weights = taps.positions[outputs, taken], taps.weights[outputs, taken]
    order = np.argsort(inputs, kind="stable")
    counts = np.bincount(inputs, minlength=taps.size)
    inputs = inputs[order]
    rank = np.arange(len(inputs)) - (np.cumsum(counts) - counts)[inputs]
    shape = (taps.size, counts.max())
    transposed = Taps(np.full(shape, -1), np.zeros(shape), len(taps.positions))
    transposed.positions[inputs, rank] = outputs[order]
    transposed.weights[inputs, rank] = weights[order]
    return transposed


def interpolate(
    x: Any,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Resize x (N, C, H, W) to `size` or by `scale_factor`: numbers or (vertical, horizontal).

    mode is "nearest" or "bilinear". Bilinear alone knows align_corners (the corner pixels' centres,
    not their outer edges, are the ends of the axis) and antialias (a triangle filter as wide as the
    reduction). By a factor, out = floor(size * scale_factor). Raises ValueError for anything else,
    TypeError for integers unless "nearest".
    """
    if autocast_mode.dtype is not None:
        x = raised(x)
    _check_interpolation(x, size, scale_factor, mode, align_corners, antialias)
    numbers: Any = size if scale_factor is None else scale_factor
    pair = tuple(numbers) if isinstance(numbers, (tuple, list)) else (numbers, numbers)
    tables = []
    for length, number in zip(x.shape[2:], pair, strict=True):
        out = number if scale_factor is None else math.floor(length * number)
        if out < 1:
            raise ValueError(
                "interpolate: the result must not be empty (size >= 1); "
                f"got x.shape={tuple(x.shape)}, size={size}, scale_factor={scale_factor}"
            )
        # A scale_factor counts as it was given, though rounding the size makes another of it.
        step = length / out if scale_factor is None else 1 / number
        if align_corners:
            step = (length - 1) / (out - 1) if out > 1 else 0.0
        if mode == "nearest":
            tables.append(_nearest_taps(length, out, step))
        elif antialias:
            tables.append(_antialiased_taps(length, out, step))
        else:
            tables.append(_bilinear_taps(length, out, step, bool(align_corners)))
    label = "UpsampleNearest2DBackward0" if mode == "nearest" else "UpsampleBilinear2DBackward0"
    return resample(x, rows=tables[0], columns=tables[1], label=label)


def _nearest_taps(size: int, out: int, step: float) -> Taps:
    # In float32, as PyTorch computes them: another rounding would choose other pixels.
    positions = np.floor(np.arange(out, dtype=np.float32) * np.float32(step)).astype(np.int64)
    return Taps(np.minimum(positions, size - 1)[:, None], np.ones((out, 1)), size)


def _bilinear_taps(size: int, out: int, step: float, align_corners: bool) -> Taps:
    centres = np.arange(out) * step if align_corners else (np.arange(out) + 0.5) * step - 0.5
    centres = np.clip(centres, 0, size - 1)
    first = centres.astype(np.int64)
    share = centres - first
    positions = np.stack([first, np.minimum(first + 1, size - 1)], axis=1)
    return Taps(positions, np.stack([1 - share, share], axis=1), size)


def _antialiased_taps(size: int, out: int, step: float) -> Taps:
    """Weigh by a triangle of half-width max(step, 1) around each output pixel's centre."""
    width = max(step, 1.0)
    centres = (np.arange(out) + 0.5) * step
    starts = np.maximum((centres - width + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + width + 0.5).astype(np.int64), size)
    positions = starts[:, None] + np.arange((ends - starts).max())
    weights = np.maximum(1 - abs(positions + 0.5 - centres[:, None]) / width, 0)
    weights[positions >= ends[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return Taps(np.where(weights > 0, positions, -1), weights, size)


def _check_interpolation(
    x: Any, size: Any, scale_factor: Any, mode: str, align_corners: bool | None, antialias: bool
) -> None:
    if x.ndim != 4:
        raise ValueError(f"interpolate: x must be 4-D (x.ndim == 4); got x.shape={tuple(x.shape)}")
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"interpolate: mode must be 'nearest' or 'bilinear'; got mode={mode!r}")
    if (size is None) == (scale_factor is None):
        raise ValueError(
            "interpolate: one of size and scale_factor must be given; "
            f"got size={size}, scale_factor={scale_factor}"
        )
    if mode == "nearest" and (align_corners is not None or antialias):
        raise ValueError(
            "interpolate: align_corners and antialias are for mode='bilinear'; "
            f"got mode='nearest', align_corners={align_corners}, antialias={antialias}"
        )
    if mode == "bilinear" and not is_floating_point(x.dtype):
        raise TypeError(
            f"interpolate: bilinear needs floating point (x.is_floating_point()); got x.dtype={x.dtype}"
        )
