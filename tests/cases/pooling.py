"""Rows for pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cases import Case, distinct, normal

NOT_A_NUMBER = np.where(distinct(1, 1, 4, 4) > 0.6, np.nan, distinct(1, 1, 4, 4))


def _windows(
    x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], reduce: Callable[..., Any]
) -> np.ndarray:
    view = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(-2, -1))
    return reduce(view[..., :: stride[0], :: stride[1], :, :], axis=(-2, -1))


def _row(
    name: str,
    note: str,
    x: np.ndarray,
    *arguments: Any,
    reference: Any = None,
    differentiable: bool = True,
    **options: Any,
) -> Case:
    return Case(
        name,
        lambda lib, x: getattr(lib, name)(x, *arguments, **options),
        (x,),
        reference,
        torch=lambda torch, x: getattr(torch.nn.functional, name)(x, *arguments, **options),
        note=note,
        differentiable=differentiable,
    )


def _padded_max(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    return _windows(padded, (3, 3), (2, 2), np.max)


MAX = [
    _row(
        "max_pool2d",
        "2x2",
        distinct(2, 3, 4, 6),
        2,
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.max),
    ),
    _row("max_pool2d", "3x3", distinct(2, 2, 7, 6), 3, 2, 1, reference=_padded_max),
    _row(
        "max_pool2d",
        "pairs",
        distinct(1, 2, 5, 6),
        (2, 3),
        (1, 2),
        reference=lambda x: _windows(x, (2, 3), (1, 2), np.max),
    ),
    _row("max_pool2d", "ceil", distinct(1, 2, 6, 7), 3, 2, 1, ceil_mode=True),
    _row("max_pool2d", "dilation", distinct(1, 2, 6, 7), 2, 1, 0, 2),
    _row(
        "max_pool2d",
        "unbatched",
        distinct(3, 4, 4),
        2,
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.max),
    ),
    _row("max_pool2d", "permuted", distinct(2, 4, 6, 3).transpose(0, 3, 1, 2), 2),
    _row(
        "max_pool2d",
        "nan",
        NOT_A_NUMBER,
        2,
        differentiable=False,
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.max),
    ),
    Case(
        "max_pool2d",
        lambda lib, x: lib.max_pool2d(x, 2, return_indices=True)[0],
        (distinct(2, 2, 4, 4),),
        lambda x: _windows(x, (2, 2), (2, 2), np.max),
        note="values beside indices",
        torch=lambda torch, x: torch.nn.functional.max_pool2d(x, 2, return_indices=True)[0],
    ),
    Case(
        "max_pool2d",
        lambda lib, x: lib.max_pool2d(x, 2, return_indices=True)[1],
        (distinct(2, 2, 4, 4),),
        note="indices",
        differentiable=False,
        torch=lambda torch, x: torch.nn.functional.max_pool2d(x, 2, return_indices=True)[1],
    ),
]

AVERAGE = [
    _row(
        "avg_pool2d",
        "2x2",
        normal(2, 3, 4, 6),
        2,
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.mean),
    ),
    _row("avg_pool2d", "padding", normal(2, 2, 5, 6), 3, 2, 1),
    _row("avg_pool2d", "padding uncounted", normal(2, 2, 5, 6), 3, 2, 1, count_include_pad=False),
    _row("avg_pool2d", "ceil", normal(1, 2, 6, 7), 3, 2, 1, ceil_mode=True),
    _row(
        "avg_pool2d",
        "divisor",
        normal(1, 2, 4, 4),
        2,
        1,
        divisor_override=3,
        reference=lambda x: _windows(x, (2, 2), (1, 1), np.sum) / 3,
    ),
    _row(
        "avg_pool2d",
        "unbatched",
        normal(3, 4, 4),
        2,
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.mean),
    ),
]

ADAPTIVE = [
    _row(
        "adaptive_avg_pool2d",
        "1x1",
        normal(2, 3, 4, 5),
        1,
        reference=lambda x: x.mean((2, 3), keepdims=True),
    ),
    _row(
        "adaptive_avg_pool2d",
        "even",
        normal(2, 3, 4, 6),
        (2, 3),
        reference=lambda x: _windows(x, (2, 2), (2, 2), np.mean),
    ),
    _row("adaptive_avg_pool2d", "uneven", normal(1, 2, 7, 5), (3, 4)),
    _row("adaptive_avg_pool2d", "larger", normal(1, 2, 3, 2), (5, 5)),
    _row("adaptive_avg_pool2d", "kept", normal(1, 2, 3, 4), (None, 2)),
    _row("adaptive_avg_pool2d", "unbatched", normal(2, 7, 5), (3, 1)),
]

CASES = [*MAX, *AVERAGE, *ADAPTIVE]
