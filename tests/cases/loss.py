"""Rows for losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from tests.cases import Case, distinct, normal, positive

CLASSES = np.array([2, 0, 3, 3, 1])
SOME_IGNORED = np.array([2, -100, 3, -100, 1])
PIXELS = np.array([[0, 2], [1, -100], [2, 2]])
PROBABILITIES = scipy.special.softmax(normal(5, 4), axis=1)


def _row(
    name: str,
    note: str,
    inputs: Any,
    reference: Any = None,
    differentiable: bool = True,
    **options: Any,
) -> Case:
    def run(functions: Any, lib: Any, *tensors: Any) -> Any:
        made = {
            key: lib.tensor(value.tolist(), dtype=tensors[0].dtype)
            if isinstance(value, np.ndarray)
            else value
            for key, value in options.items()
        }
        return getattr(functions, name)(*tensors, **made)

    return Case(
        name,
        lambda lib, *tensors: run(lib, lib, *tensors),
        inputs,
        reference,
        torch=lambda torch, *tensors: run(torch.nn.functional, torch, *tensors),
        note=note,
        differentiable=differentiable,
    )


def _cross_entropy(x: np.ndarray, target: np.ndarray) -> Any:
    return -np.take_along_axis(scipy.special.log_softmax(x, axis=1), target[:, None], 1).mean()


def _ignoring(x: np.ndarray, target: np.ndarray) -> Any:
    kept = target != -100
    return _cross_entropy(x[kept], target[kept])


def _soft(x: np.ndarray, target: np.ndarray) -> Any:
    return -(scipy.special.log_softmax(x, axis=1) * target).sum(1).mean()


def _smooth(x: np.ndarray, target: np.ndarray) -> Any:
    return _soft(x, np.eye(x.shape[1])[target] * 0.8 + 0.2 / x.shape[1])


def _weighted(x: np.ndarray, target: np.ndarray) -> Any:
    weights = positive(4)[target]
    scores = scipy.special.log_softmax(x, axis=1)[np.arange(len(target)), target]
    return -(scores * weights).sum() / weights.sum()


CROSS_ENTROPY = [
    _row("cross_entropy", "classes", (normal(5, 4), CLASSES), _cross_entropy),
    _row("cross_entropy", "far", (normal(5, 4) * 300, CLASSES), _cross_entropy),
    _row(
        "cross_entropy",
        "sum",
        (normal(5, 4), CLASSES),
        lambda x, t: _cross_entropy(x, t) * 5,
        reduction="sum",
    ),
    _row("cross_entropy", "none", (normal(5, 4), CLASSES), reduction="none"),
    _row("cross_entropy", "ignored", (normal(5, 4), SOME_IGNORED), _ignoring),
    _row("cross_entropy", "ignored, none", (normal(5, 4), SOME_IGNORED), reduction="none"),
    _row("cross_entropy", "another ignored", (normal(5, 4), CLASSES), ignore_index=3),
    _row(
        "cross_entropy",
        "all ignored",
        (normal(5, 4), np.full(5, -100)),
        lambda x, t: np.float64(np.nan),
        False,
    ),
    _row("cross_entropy", "weight", (normal(5, 4), CLASSES), _weighted, weight=positive(4)),
    _row(
        "cross_entropy",
        "weight, ignored, none",
        (normal(5, 4), SOME_IGNORED),
        weight=positive(4),
        reduction="none",
    ),
    _row(
        "cross_entropy",
        "one sample",
        (normal(4), np.array(2)),
        lambda x, t: -scipy.special.log_softmax(x)[t],
    ),
    _row("cross_entropy", "pixels", (normal(3, 4, 2), PIXELS)),
    _row(
        "cross_entropy",
        "pixels, none",
        (normal(3, 4, 2), PIXELS),
        reduction="none",
        weight=positive(4),
    ),
    _row("cross_entropy", "smooth", (normal(5, 4), CLASSES), _smooth, label_smoothing=0.2),
    _row(
        "cross_entropy",
        "smooth, weight, ignored",
        (normal(5, 4), SOME_IGNORED),
        weight=positive(4),
        label_smoothing=0.2,
    ),
    _row(
        "cross_entropy",
        "smooth, pixels, sum",
        (normal(3, 4, 2), PIXELS),
        reduction="sum",
        weight=positive(4),
        label_smoothing=0.3,
    ),
    _row(
        "cross_entropy",
        "smooth, none",
        (normal(5, 4), SOME_IGNORED),
        reduction="none",
        label_smoothing=0.3,
    ),
    _row("cross_entropy", "probabilities", (normal(5, 4), PROBABILITIES), _soft),
    _row(
        "cross_entropy",
        "probabilities, smooth",
        (normal(5, 4), PROBABILITIES),
        label_smoothing=0.2,
        weight=positive(4),
    ),
    _row(
        "cross_entropy",
        "probabilities, pixels",
        (normal(3, 4, 2), positive(3, 4, 2)),
        weight=positive(4),
    ),
    _row("cross_entropy", "probabilities, one", (normal(4), positive(4)), reduction="sum"),
    _row("nll_loss", "classes", (normal(5, 4), CLASSES), lambda x, t: -x[np.arange(5), t].mean()),
    _row("nll_loss", "pixels", (normal(3, 4, 2), PIXELS), weight=positive(4)),
    _row(
        "nll_loss",
        "none",
        (normal(5, 4), CLASSES),
        lambda x, t: -x[np.arange(5), t],
        reduction="none",
    ),
]

PAIR = (normal(3, 4), distinct(3, 4))
DISTANT = (normal(3, 4) * 3, distinct(3, 4) + 0.01)


def _numbers(
    name: str, each: Callable[..., Any], inputs: tuple[np.ndarray, ...], **options: Any
) -> list[Case]:
    note = ", ".join(f"{key}={value}" for key, value in options.items())
    reductions = {"mean": np.mean, "sum": np.sum, "none": lambda loss: loss}
    return [
        _row(
            name,
            f"{reduction} {note}",
            inputs,
            lambda x, y, reduce=reduce: reduce(each(x, y)),
            reduction=reduction,
            **options,
        )
        for reduction, reduce in reductions.items()
    ]


def _smooth_l1(beta: float) -> Callable[..., Any]:
    return lambda x, y: np.where(
        abs(x - y) < beta, (x - y) ** 2 / (2 * beta), abs(x - y) - beta / 2
    )


def _bce(x: np.ndarray, target: np.ndarray, positive_weight: Any = 1.0) -> np.ndarray:
    share = scipy.special.log_expit
    return -(positive_weight * target * share(x) + (1 - target) * share(-x))


BCE = "binary_cross_entropy_with_logits"
NUMBERS = [
    *_numbers("mse_loss", lambda x, y: (x - y) ** 2, PAIR),
    *_numbers("l1_loss", lambda x, y: abs(x - y), PAIR),
    *_numbers("smooth_l1_loss", _smooth_l1(1.0), DISTANT),
    *_numbers("smooth_l1_loss", _smooth_l1(2.5), DISTANT, beta=2.5),
    *_numbers("smooth_l1_loss", lambda x, y: abs(x - y), DISTANT, beta=0.0),
    *_numbers("huber_loss", _smooth_l1(1.0), DISTANT),
    *_numbers("huber_loss", lambda x, y: 2.5 * _smooth_l1(2.5)(x, y), DISTANT, delta=2.5),
    *_numbers(BCE, _bce, (normal(3, 4), distinct(3, 4) * 0.5 + 0.5)),
    _row(
        BCE, "far", (np.array([-800.0, 800.0]), np.array([1.0, 1.0])), lambda x, y: np.float64(400)
    ),
    _row(
        BCE,
        "positive weight",
        (normal(3, 4), distinct(3, 4)),
        lambda x, y: _bce(x, y, positive(4)).mean(),
        pos_weight=positive(4),
    ),
    _row(
        BCE,
        "weight",
        (normal(3, 4), distinct(3, 4)),
        lambda x, y: (_bce(x, y) * positive(4)).mean(),
        weight=positive(4),
    ),
]

CASES = [*CROSS_ENTROPY, *NUMBERS]
