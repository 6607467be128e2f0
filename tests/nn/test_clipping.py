"""Clipping of gradients by their joint norm."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn


def parameters():
    made = [nn.Parameter(ge.zeros(2)), nn.Parameter(ge.zeros(1, 2)), nn.Parameter(ge.zeros(3))]
    made[0].grad = ge.tensor([3.0, 0.0])
    made[1].grad = ge.tensor([[0.0, -4.0]])
    return made


@pytest.mark.parametrize(("norm_type", "norm"), [(2.0, 5), (1.0, 7), (math.inf, 4)])
def test_gradients_are_scaled_together(norm_type, norm):
    given = parameters()
    assert nn.clip_grad_norm_(given, 1.0, norm_type).item() == pytest.approx(norm)
    np.testing.assert_allclose(given[0].grad.array, [3 / norm, 0], rtol=1e-5)
    np.testing.assert_allclose(given[1].grad.array, [[0, -4 / norm]], rtol=1e-5)
    assert given[2].grad is None


def test_small_gradients_are_left_alone():
    given = parameters()
    nn.clip_grad_norm_(iter(given), 100.0)
    assert given[0].grad.tolist() == [3, 0]
    nn.clip_grad_norm_(given[0], 1.0)
    np.testing.assert_allclose(given[0].grad.array, [1, 0], rtol=1e-5)


def test_no_gradients_have_norm_zero():
    assert nn.clip_grad_norm_([nn.Parameter(ge.zeros(2))], 1.0).item() == 0


def test_a_norm_that_is_not_finite_is_refused_if_asked():
    given = parameters()
    given[0].grad = ge.tensor([math.inf, 1.0])
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped; got norm=inf"):
        nn.clip_grad_norm_(given, 1.0, error_if_nonfinite=True)
    assert given[1].grad.tolist() == [[0, -4]]
    assert nn.clip_grad_norm_(given, 1.0).item() == math.inf
