"""Elementwise operations beside the table: what they refuse, and in which words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gradengine as ge

FLOATS = ge.tensor([1.0, -2.0], device="cpu")
BOOLS = ge.tensor([True, False], device="cpu")
BYTES = ge.tensor(np.array([1, 0], np.uint8), device="cpu")
INTEGERS = ge.tensor([3, 0], device="cpu")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FLOATS & FLOATS, TypeError, "bitwise_and: not defined .*got x.dtype=float32"),
        (lambda: ~FLOATS, TypeError, "bitwise_not: not defined for these dtypes"),
        (lambda: BOOLS - BOOLS, TypeError, "sub: not defined for these dtypes"),
        (lambda: -BOOLS, TypeError, "neg: not defined for these dtypes.*got x.dtype=bool"),
        (lambda: BYTES + -1, ValueError, "add: a number must fit .*got x.dtype=uint8, y=-1"),
        (lambda: INTEGERS // INTEGERS, RuntimeError, "floor_divide: integers cannot be divided by 0"),
        (lambda: 7 % INTEGERS, RuntimeError, "remainder: integers cannot be divided by 0"),
        (
            lambda: ge.div(INTEGERS, INTEGERS, rounding_mode="trunc"),
            RuntimeError,
            "div: integers cannot be divided by 0",
        ),
        (lambda: INTEGERS ** (INTEGERS - 1), ValueError, "pow: .*negative integer powers"),
        (lambda: ge.add(INTEGERS, INTEGERS, alpha=0.5), TypeError, "add: alpha must be an integer"),
        (lambda: ge.isclose(FLOATS, FLOATS, rtol=-1), ValueError, "isclose: tolerances must not"),
        (lambda: ge.isclose(FLOATS, ge.ones(3)), ValueError, "isclose: shapes must broadcast"),
        (lambda: ge.where(BOOLS, ge.ones(3), 0.0), ValueError, "where: condition and both branches"),
    ],
)  # fmt: skip
def test_refusals(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_quotients_that_are_rounded_have_a_gradient_of_zero() -> None:
    for divide in (
        ge.floor_divide,
        lambda x, y: ge.div(x, y, rounding_mode="trunc"),
        lambda x, y: ge.div(x, y, rounding_mode="floor"),
    ):
        x, y = (ge.tensor([value], device="cpu", requires_grad=True) for value in (7.0, 2.0))
        divide(x, y).backward()
        assert (x.grad.tolist(), y.grad.tolist()) == ([0], [0])


def test_powers_of_zero_have_a_gradient_of_zero_by_the_exponent() -> None:
    exponent = ge.tensor([0.0, 2.0], device="cpu", requires_grad=True)
    (0.0**exponent).sum().backward()
    assert exponent.grad.tolist() == [0, 0]


def test_bounds_beyond_integers_confine_nothing() -> None:
    assert ge.clamp(BYTES, -5, 300).tolist() == [1, 0]
    assert ge.clamp(BYTES, -5, 300).dtype == ge.uint8


def test_a_bound_that_is_nan_makes_nan() -> None:
    bound = ge.tensor([math.nan, 0.0], device="cpu")
    assert math.isnan(ge.clamp(FLOATS, min=bound)[0].item())
    assert math.isnan(ge.clamp(FLOATS, max=bound)[0].item())
