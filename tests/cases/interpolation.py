"""Rows for interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal


def _row(note: str, x: np.ndarray, reference: Any = None, **options: Any) -> Case:
    return Case(
        "interpolate",
        lambda lib, x: lib.interpolate(x, **options),
        (x,),
        reference,
        torch=lambda torch, x: torch.nn.functional.interpolate(x, **options),
        differentiable=x.dtype.kind == "f",
        note=note,
    )


BYTES = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4)
TWICE = {"scale_factor": 2, "mode": "nearest"}
CASES = [
    _row(
        "nearest twice",
        normal(2, 3, 2, 3),
        lambda x: x.repeat(2, axis=2).repeat(2, axis=3),
        **TWICE,
    ),
    _row("nearest bytes", BYTES, lambda x: x.repeat(2, axis=2).repeat(2, axis=3), **TWICE),
    _row("nearest half", normal(1, 2, 4, 6), lambda x: x[:, :, ::2, ::2], size=(2, 3)),
    _row("nearest odd", normal(1, 2, 7, 5), size=(3, 11)),
    _row("nearest factor", normal(1, 2, 7, 5), scale_factor=(1.7, 0.6)),
    _row("bilinear same", normal(1, 2, 4, 3), lambda x: x, size=(4, 3), mode="bilinear"),
    _row("bilinear up", normal(1, 2, 3, 4), size=(7, 9), mode="bilinear"),
    _row("bilinear down", normal(1, 2, 7, 9), size=3, mode="bilinear", align_corners=False),
    _row("bilinear factor", normal(1, 2, 5, 4), scale_factor=1.7, mode="bilinear"),
    _row("corners", normal(1, 2, 3, 4), size=(5, 7), mode="bilinear", align_corners=True),
    _row("corners to 1", normal(1, 2, 3, 4), size=1, mode="bilinear", align_corners=True),
    _row("antialias", normal(1, 2, 9, 8), size=(4, 3), mode="bilinear", antialias=True),
    _row("antialias up", normal(1, 2, 3, 4), size=(5, 9), mode="bilinear", antialias=True),
    _row(
        "antialias corners",
        normal(1, 2, 9, 8),
        size=(4, 3),
        mode="bilinear",
        antialias=True,
        align_corners=True,
    ),
]
