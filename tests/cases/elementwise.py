"""Rows for the elementwise operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from tests.cases import Case, distinct, nonzero, normal, positive

INTEGERS = np.array([[5, -3, 0, 7], [-7, 2, 9, 4]])
BOOLS = np.array([[True, False, True, False], [False, False, True, True]])
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5])


def _unary(name: str, reference: Callable[..., Any], values: np.ndarray, **options: Any) -> Case:
    return Case(name, lambda lib, x: getattr(lib, name)(x), (values,), reference, **options)


def _binary(name: str, reference: Callable[..., Any], x: Any, y: Any, **options: Any) -> Case:
    return Case(name, lambda lib, x, y: getattr(lib, name)(x, y), (x, y), reference, **options)


def _compared(name: str, reference: Callable[..., Any], x: Any, y: Any, note: str = "") -> Case:
    return _binary(name, reference, x, y, differentiable=False, note=note)


ARITHMETIC = [
    _binary("add", np.add, normal(3, 4), normal(4)),
    _binary("add", np.add, normal(3, 1), normal(), note="0-d"),
    Case("add", lambda lib, x: 2 + x + 1.5, (normal(3),), lambda x: x + 3.5, note="numbers"),
    _binary("sub", np.subtract, normal(3, 1), normal(1, 4)),
    Case("sub", lambda lib, x: 2 - (x - 1.5), (normal(3),), lambda x: 3.5 - x, note="numbers"),
    _binary("mul", np.multiply, normal(2, 3, 4), normal(3, 1)),
    Case("mul", lambda lib, x: x * x * 3, (normal(3),), lambda x: 3 * x * x, note="same twice"),
    _binary("div", np.divide, normal(3, 4), nonzero(4)),
    Case("div", lambda lib, x: 2 / x, (nonzero(3),), lambda x: 2 / x, note="reflected"),
    _binary(
        "div",
        lambda x, y: (x / y).astype(np.float32),
        INTEGERS,
        np.array([1, 2, 3, 4]),
        differentiable=False,
        in_torch=False,
        note="integers",
    ),
    _compared("floor_divide", np.floor_divide, normal(3, 4), nonzero(4)),
    _compared("floor_divide", np.floor_divide, INTEGERS, np.array([2, -2, 3, -3]), "integers"),
    _binary("remainder", np.remainder, normal(3, 4), nonzero(4)),
    _unary("neg", np.negative, normal(3, 4)),
    _unary("abs", np.abs, nonzero(3, 4)),
    _unary("abs", np.abs, np.zeros(3), differentiable=False, note="zero"),
    _unary("sign", np.sign, nonzero(3, 4)),
    _unary("sign", np.sign, SPECIAL, differentiable=False, in_torch=False, note="special"),
]

ROUNDING = [
    _unary("floor", np.floor, distinct(3, 4)),
    _unary("ceil", np.ceil, distinct(3, 4)),
    _unary("round", np.round, distinct(3, 4)),
    _unary("round", np.round, np.array([0.5, 1.5, 2.5, -0.5]), differentiable=False, note="halves"),
    _unary("trunc", np.trunc, distinct(3, 4)),
]

POWERS = [
    Case("pow", lambda lib, x: x**3, (normal(3, 4),), lambda x: x**3, note="cube"),
    Case("pow", lambda lib, x: x**2, (np.array([0.0, 1.0, -2.0]),), np.square, note="square at 0"),
    Case("pow", lambda lib, x: x**0, (normal(3),), np.ones_like, note="zeroth"),
    Case("pow", lambda lib, x: x**-1.5, (positive(3),), lambda x: x**-1.5, note="negative"),
    Case("pow", lambda lib, x: x**0.5, (positive(3, 4),), np.sqrt, note="root"),
    Case("pow", lambda lib, x: x**2.0, (normal(3, 4),), np.square, note="float square"),
    Case("pow", lambda lib, x: x**-1.0, (positive(3),), np.reciprocal, note="inverse"),
    Case("pow", lambda lib, x: 2.5**x, (normal(3),), lambda x: 2.5**x, note="number's power"),
    _binary("pow", np.power, positive(3, 4), normal(4)),
    _unary("sqrt", np.sqrt, positive(3, 4)),
    _unary("rsqrt", lambda x: 1 / np.sqrt(x), positive(3, 4)),
    _unary("reciprocal", np.reciprocal, nonzero(3, 4)),
    _unary("square", np.square, normal(3, 4)),
]

EXPONENTIALS = [
    _unary("exp", np.exp, normal(3, 4)),
    _unary("expm1", np.expm1, normal(3, 4) * 1e-3),
    _unary("log", np.log, positive(3, 4)),
    _unary("log2", np.log2, positive(3, 4)),
    _unary("log10", np.log10, positive(3, 4)),
    _unary("log1p", np.log1p, positive(3, 4) * 1e-2),
    _unary("sigmoid", scipy.special.expit, normal(3, 4) * 3),
    _unary("sigmoid", scipy.special.expit, np.array([-800.0, -100.0, 40.0, 800.0]), note="far"),
    _unary("erf", scipy.special.erf, normal(3, 4)),
    _unary(
        "exp",
        lambda x: np.exp(x.astype(np.float32)),
        INTEGERS % 3,
        differentiable=False,
        in_torch=False,
        note="integers",
    ),
]

TRIGONOMETRY = [
    _unary("sin", np.sin, normal(3, 4)),
    _unary("cos", np.cos, normal(3, 4)),
    _unary("tan", np.tan, normal(3, 4) * 0.5),
    _unary("tanh", np.tanh, normal(3, 4)),
]

SELECTION = [
    _binary("maximum", np.maximum, distinct(3, 4), distinct(4, 1)[:3] + 0.05),
    _binary("minimum", np.minimum, distinct(3, 4), distinct(4, 1)[:3] + 0.05),
    _binary(
        "maximum", np.maximum, SPECIAL, SPECIAL[::-1].copy(), differentiable=False, note="special"
    ),
    Case(
        "where",
        lambda lib, c, x, y: lib.where(c, x, y),
        (BOOLS, normal(2, 4), normal(2, 1)),
        np.where,
    ),
    Case(
        "where",
        lambda lib, c, x: lib.where(c, x, 2.0),
        (BOOLS, normal(4)),
        lambda c, x: np.where(c, x, 2.0),
        note="number",
    ),
    Case(
        "clamp",
        lambda lib, x: lib.clamp(x, -0.5, 0.5),
        (normal(3, 4),),
        lambda x: x.clip(-0.5, 0.5),
    ),
    Case(
        "clamp", lambda lib, x: lib.clamp(x, min=0), (normal(5),), lambda x: x.clip(0), note="min"
    ),
    Case(
        "clamp",
        lambda lib, x: lib.clamp(x, max=0),
        (normal(5),),
        lambda x: x.clip(None, 0),
        note="max",
    ),
    Case("clip", lambda lib, x: lib.clip(x, -1, 1), (normal(7),), lambda x: x.clip(-1, 1)),
    Case(
        "clamp",
        lambda lib, x, low, high: lib.clamp(x, low, high),
        (normal(3, 4), -positive(4), positive(3, 1)),
        np.clip,
        note="tensors",
    ),
]

COMPARISONS = [
    *(_compared(name, reference, INTEGERS, INTEGERS[:, ::-1].copy(), "integers") for name, reference in [
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater),
        ("ge", np.greater_equal), ("bitwise_and", np.bitwise_and), ("bitwise_or", np.bitwise_or),
        ("bitwise_xor", np.bitwise_xor), ("logical_and", np.logical_and),
        ("logical_or", np.logical_or), ("logical_xor", np.logical_xor),
    ]),
    *(_compared(name, reference, SPECIAL, np.zeros(6), "special") for name, reference in [
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("ge", np.greater_equal),
    ]),
    _compared("bitwise_and", np.bitwise_and, BOOLS, BOOLS[::-1].copy(), "bools"),
    _compared("isclose", np.isclose, np.array([1.0, np.nan, np.inf]), np.array([1 + 1e-7, np.nan, np.inf])),
    _unary("bitwise_not", np.bitwise_not, INTEGERS, differentiable=False),
    _unary("bitwise_not", np.bitwise_not, BOOLS, differentiable=False, note="bools"),
    *(_unary(name, reference, SPECIAL, differentiable=False) for name, reference in [
        ("logical_not", np.logical_not), ("isnan", np.isnan), ("isinf", np.isinf), ("isfinite", np.isfinite),
    ]),
]  # fmt: skip

CASES = [*ARITHMETIC, *ROUNDING, *POWERS, *EXPONENTIALS, *TRIGONOMETRY, *SELECTION, *COMPARISONS]
