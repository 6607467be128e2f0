"""Rows for normalization."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal, positive

MEAN, VARIANCE = normal(3), positive(3)


def _standard(x: Any, axes: Any, eps: float = 1e-5) -> Any:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def _by_channel(vector: Any, x: Any) -> Any:
    return vector.reshape(-1, *(1,) * (x.ndim - 2))


def _training(note: str, x: np.ndarray, eps: float = 1e-5) -> Case:
    def reference(x: Any, weight: Any, bias: Any) -> Any:
        normal = _standard(x, (0, *range(2, x.ndim)), eps)
        return normal * _by_channel(weight, x) + _by_channel(bias, x)

    return _row(
        "batch_norm",
        note,
        (x, positive(3), normal(3)),
        reference,
        (None, None),
        training=True,
        eps=eps,
    )


def _evaluation(note: str, x: np.ndarray) -> Case:
    def run(function: Any, lib: Any, x: Any, weight: Any, bias: Any) -> Any:
        running = [lib.tensor(statistic.tolist(), dtype=x.dtype) for statistic in (MEAN, VARIANCE)]
        return function(x, *running, weight, bias)

    def reference(x: Any, weight: Any, bias: Any) -> Any:
        normal = (x - _by_channel(MEAN, x)) / np.sqrt(_by_channel(VARIANCE, x) + 1e-5)
        return normal * _by_channel(weight, x) + _by_channel(bias, x)

    return Case(
        "batch_norm",
        lambda lib, *tensors: run(lib.batch_norm, lib, *tensors),
        (x, positive(3), normal(3)),
        reference,
        torch=lambda torch, *tensors: run(torch.nn.functional.batch_norm, torch, *tensors),
        note=note,
    )


def _row(name: str, note: str, inputs: Any, reference: Any, between: Any, **options: Any) -> Case:
    return Case(
        name,
        lambda lib, x, *vectors: getattr(lib, name)(x, *between, *vectors, **options),
        inputs,
        reference,
        torch=lambda torch, x, *vectors: getattr(torch.nn.functional, name)(
            x, *between, *vectors, **options
        ),
        note=note,
    )


def _layer_norm(note: str, x: np.ndarray, shape: tuple[int, ...], *vectors: np.ndarray) -> Case:
    def reference(x: Any, weight: Any = 1.0, bias: Any = 0.0) -> Any:
        return _standard(x, tuple(range(-len(shape), 0))) * weight + bias

    return _row("layer_norm", note, (x, *vectors), reference, (shape,))


CASES = [
    _training("4-D", normal(2, 3, 2, 4)),
    _training("2-D", normal(5, 3)),
    _training("3-D", normal(2, 3, 4), eps=0.1),
    _training("5-D", normal(2, 3, 2, 1, 2)),
    _training("permuted", normal(2, 2, 4, 3).transpose(0, 3, 1, 2)),
    _row(
        "batch_norm",
        "no weight",
        (normal(4, 3),),
        lambda x: _standard(x, 0),
        (None, None),
        training=True,
    ),
    _row(
        "batch_norm",
        "no bias",
        (normal(4, 3), normal(3)),
        lambda x, w: _standard(x, 0) * w,
        (None, None),
        training=True,
    ),
    _evaluation("eval", normal(2, 3, 2, 4)),
    _evaluation("eval 2-D", normal(4, 3)),
    _evaluation("eval one value", normal(1, 3)),
    _layer_norm("last", normal(2, 3, 4), (4,), normal(4), positive(4)),
    _layer_norm("two axes", normal(2, 3, 4), (3, 4), normal(3, 4), positive(3, 4)),
    _layer_norm("no weight", normal(2, 4), (4,)),
    _layer_norm("no bias", normal(2, 4), (4,), normal(4)),
]
