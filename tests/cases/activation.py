"""Rows for activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from tests.cases import Case, nonzero, normal

FAR = np.array([-900.0, -90.0, -20.5, 20.5, 90.0, 900.0])
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5])


def _row(
    name: str,
    reference: Callable[..., Any] | None,
    values: np.ndarray,
    note: str = "",
    differentiable: bool = True,
    **options: Any,
) -> Case:
    return Case(
        name,
        lambda lib, x: getattr(lib, name)(x, **options),
        (values,),
        reference,
        torch=lambda torch, x: getattr(torch.nn.functional, name)(x, **options),
        note=note,
        differentiable=differentiable,
    )


def _log_softmax(dim: int) -> Callable[..., Any]:
    return lambda x: scipy.special.log_softmax(x, axis=dim)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


RECTIFIERS = [
    _row("relu", lambda x: np.maximum(x, 0), nonzero(3, 4)),
    _row("relu", lambda x: np.maximum(x, 0), nonzero(2, 3, 4).transpose(2, 0, 1), "permuted"),
    _row("relu", lambda x: np.maximum(x, 0), SPECIAL, "special", False),
    _row("relu", lambda x: np.maximum(x, 0), np.array([-2, 0, 3]), "integers", False),
    _row("relu", lambda x: np.maximum(x, 0), np.zeros(3), "zero", False),
    _row("relu6", lambda x: x.clip(0, 6), nonzero(3, 4) * 5),
    _row("hardtanh", lambda x: x.clip(-1, 1), nonzero(3, 4)),
    _row(
        "hardtanh", lambda x: x.clip(-0.5, 1.5), nonzero(3, 4), "bounds", min_val=-0.5, max_val=1.5
    ),
    _row("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x), nonzero(3, 4)),
    _row(
        "leaky_relu",
        lambda x: np.where(x > 0, x, 0.3 * x),
        nonzero(3, 4),
        "slope",
        negative_slope=0.3,
    ),
]

SMOOTH = [
    _row("elu", lambda x: np.where(x > 0, x, np.expm1(x)), nonzero(3, 4)),
    _row("elu", lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)), nonzero(3, 4), "alpha", alpha=0.7),
    _row("elu", lambda x: np.where(x > 0, x, -1.0), FAR[[0, 1, 4, 5]], "far"),
    _row("gelu", lambda x: x * scipy.special.ndtr(x), normal(3, 4)),
    _row("gelu", lambda x: np.maximum(x, 0), FAR, "far"),
    _row("gelu", _gelu_tanh, normal(3, 4), "tanh", approximate="tanh"),
    _row("silu", lambda x: x * scipy.special.expit(x), normal(3, 4)),
    _row("silu", lambda x: x * scipy.special.expit(x), FAR, "far"),
    _row("softplus", lambda x: np.logaddexp(x, 0), normal(3, 4)),
    _row("softplus", lambda x: np.logaddexp(2 * x, 0) / 2, normal(3, 4), "beta", beta=2),
    _row(
        "softplus",
        lambda x: np.where(x > 1, x, np.logaddexp(x, 0)),
        normal(3, 4) * 2,
        "threshold",
        threshold=1,
    ),
    _row("softplus", lambda x: np.where(x > 20, x, np.logaddexp(x, 0)), FAR, "far"),
    _row("logsigmoid", scipy.special.log_expit, normal(3, 4)),
    _row("logsigmoid", scipy.special.log_expit, FAR, "far"),
]

SOFTMAX = [
    _row("softmax", lambda x: scipy.special.softmax(x, axis=-1), normal(3, 4), dim=-1),
    _row("softmax", lambda x: scipy.special.softmax(x, axis=0), normal(3, 4, 2), "first", dim=0),
    _row("softmax", lambda x: scipy.special.softmax(x, axis=0), FAR, "far", dim=0),
    _row("log_softmax", _log_softmax(1), normal(3, 4), dim=1),
    _row("log_softmax", _log_softmax(1), normal(2, 4, 3), "middle", dim=1),
    _row("log_softmax", _log_softmax(0), FAR, "far", dim=0),
    _row("log_softmax", _log_softmax(0), np.array([0.0, -np.inf, 1.0]), "one -inf", False, dim=0),
    _row("softmax", lambda x: np.full(2, np.nan), np.full(2, -np.inf), "all -inf", False, dim=0),
    _row("softmax", lambda x: x, normal(2, 0), "empty", dim=1),
]

DROPOUT = [
    _row("dropout", lambda x: x, normal(3, 4), "none", p=0.0),
    _row("dropout", lambda x: x, normal(3, 4), "eval", training=False),
    _row("dropout", np.zeros_like, normal(3, 4), "all", p=1.0),
]

CASES = [*RECTIFIERS, *SMOOTH, *SOFTMAX, *DROPOUT]
