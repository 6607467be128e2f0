"""Rows for convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal


def _reference(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolve (N, C, H, W) by windows of the padded input, group by group."""
    (sy, sx), (py, px), (dy, dx) = (
        np.broadcast_to(value, 2) for value in (stride, padding, dilation)
    )
    rows, columns = ((np.array(weight.shape[2:]) - 1) * (dy, dx) + 1).tolist()
    padded = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), axis=(2, 3))
    windows = windows[:, :, ::sy, ::sx, ::dy, ::dx]
    parts = [
        np.einsum("nchwrs,kcrs->nkhw", window, kernel)
        for window, kernel in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups), strict=True
        )
    ]
    out = np.concatenate(parts, axis=1)
    return out if bias is None else out + bias[:, None, None]


def _conv2d(
    note: str, x: Any, weight: Any, bias: Any = None, reference: Any = None, **options: Any
) -> Case:
    def expected(x: Any, weight: Any, bias: Any = None) -> Any:
        return _reference(x, weight, bias, **options)

    return Case(
        "conv2d",
        lambda lib, *tensors: lib.conv2d(*tensors, **options),
        (x, weight) if bias is None else (x, weight, bias),
        reference or expected,
        in_torch=reference is not _same,  # it warns of the even kernel
        note=note,
    )


def _conv1d(note: str, x: Any, weight: Any, bias: Any, **options: int) -> Case:
    images: Any = {name: (0 if name == "padding" else 1, value) for name, value in options.items()}
    if "groups" in options:
        images["groups"] = options["groups"]

    def expected(x: Any, weight: Any, bias: Any) -> Any:
        batch = x if x.ndim == 3 else x[None]
        out = _reference(batch[:, :, None], weight[:, :, None], bias, **images)[:, :, 0]
        return out if x.ndim == 3 else out[0]

    return Case(
        "conv1d",
        lambda lib, *tensors: lib.conv1d(*tensors, **options),
        (x, weight, bias),
        expected,
        note=note,
    )


def _unbatched(x: Any, weight: Any, bias: Any) -> Any:
    return _reference(x[None], weight, bias, padding=1)[0]


def _same(x: Any, weight: Any) -> Any:
    return _reference(np.pad(x, ((0, 0), (0, 0), (0, 1), (1, 1))), weight)


CASES = [
    _conv2d("3x3", normal(2, 3, 5, 4), normal(2, 3, 3, 3), normal(2), padding=1),
    _conv2d("no bias", normal(2, 3, 4, 5), normal(2, 3, 2, 3)),
    _conv2d("stride", normal(1, 2, 6, 7), normal(2, 2, 3, 3), stride=2, padding=1),
    _conv2d("1x1", normal(2, 3, 3, 3), normal(4, 3, 1, 1), normal(4)),
    _conv2d("1x1 stride", normal(2, 3, 4, 5), normal(2, 3, 1, 1), stride=2),
    _conv2d("dilation", normal(1, 2, 7, 6), normal(2, 2, 3, 2), dilation=(2, 3), padding=(1, 2)),
    _conv2d("groups", normal(2, 4, 4, 4), normal(6, 2, 3, 3), normal(6), groups=2, padding=1),
    _conv2d("depthwise", normal(1, 3, 5, 5), normal(3, 1, 3, 3), groups=3),
    _conv2d("same", normal(1, 2, 4, 4), normal(2, 2, 2, 3), reference=_same, padding="same"),
    _conv2d(
        "unbatched", normal(3, 5, 4), normal(2, 3, 3, 3), normal(2), reference=_unbatched, padding=1
    ),
    _conv2d("permuted", normal(2, 5, 4, 3).transpose(0, 3, 1, 2), normal(2, 3, 3, 3), padding=1),
    _conv1d("plain", normal(2, 3, 7), normal(4, 3, 3), normal(4), padding=1, stride=2),
    _conv1d("groups", normal(2, 4, 6), normal(4, 2, 2), normal(4), groups=2, dilation=2),
    _conv1d("unbatched", normal(3, 7), normal(4, 3, 3), normal(4)),
]
