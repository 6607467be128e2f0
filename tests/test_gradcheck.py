"""The gradient checks find what is wrong, and only that."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import GradcheckError, gradcheck, gradgradcheck
from gradengine.operation import operation


@operation
def wrong(x):
    return x * x


wrong.pullbacks(x=lambda grad, x: grad * x)


@operation
def wrong_again(x):
    return x * x * x


def _constant_factor(grad, x):
    return grad * 3 * (x * x).detach() if isinstance(x, ge.Tensor) else grad * 3 * x * x


wrong_again.pullbacks(x=_constant_factor)


def inputs():
    return ge.tensor([0.5, -1.5], dtype=ge.float64, requires_grad=True)


def test_right_derivatives_pass():
    assert gradcheck(lambda x: (x.sin(), x**3), inputs())
    assert gradgradcheck(lambda x: (x.sin(), x**3), inputs())


def test_wrong_first_derivatives_are_found():
    with pytest.raises(
        GradcheckError, match="Jacobian mismatch for output 0 with respect to input 0"
    ):
        gradcheck(wrong, inputs())
    assert not gradcheck(wrong, inputs(), raise_exception=False)


def test_wrong_second_derivatives_are_found():
    assert gradcheck(wrong_again, inputs())
    with pytest.raises(GradcheckError):
        gradgradcheck(wrong_again, inputs())


def test_nothing_to_check_is_an_error_and_float32_a_warning():
    with pytest.raises(ValueError, match="at least one input tensor to require gradient"):
        gradcheck(ge.exp, ge.ones(2, dtype=ge.float64))
    with pytest.raises(ValueError, match="at least one input tensor to require gradient"):
        gradgradcheck(ge.exp, ge.ones(2, dtype=ge.float64))
    with pytest.warns(UserWarning, match="not a double precision"):
        gradcheck(lambda x: x * 2, ge.ones(2, requires_grad=True), atol=1e-2, rtol=0.1)


def test_an_empty_input_may_have_any_strides():
    # NumPy's empty arrays have strides of 0 in some of its versions, and hold nothing to change.
    empty = np.lib.stride_tricks.as_strided(np.zeros(0), (0, 4), (8, 0))
    x = ge.from_numpy(empty).requires_grad_()
    assert x.array.strides == (8, 0)
    assert gradcheck(ge.exp, x)
    assert gradgradcheck(ge.exp, x)
    assert gradcheck(ge.exp, x, fast_mode=True)
