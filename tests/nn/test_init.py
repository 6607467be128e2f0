"""Initial values: their distributions, their bounds, and the seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn
from gradengine.nn import init

SHAPE = (40, 30, 5, 3)
FAN_IN, FAN_OUT = 30 * 15, 40 * 15


def drawn(function, *args, **kwargs):
    ge.manual_seed(3)
    tensor = nn.Parameter(ge.zeros(SHAPE, dtype="float64"))
    assert function(tensor, *args, **kwargs) is tensor
    assert tensor.is_leaf
    return tensor.detach().array


@pytest.mark.parametrize(
    ("function", "arguments", "mean", "std"),
    [
        (init.normal_, (2.0, 0.5), 2, 0.5),
        (init.xavier_normal_, (2.0,), 0, 2 * math.sqrt(2 / (FAN_IN + FAN_OUT))),
        (init.kaiming_normal_, (), 0, math.sqrt(2 / FAN_IN)),
        (init.kaiming_normal_, (0, "fan_out", "relu"), 0, math.sqrt(2 / FAN_OUT)),
        (init.kaiming_normal_, (1.0,), 0, math.sqrt(1 / FAN_IN)),
        (init.kaiming_normal_, (0, "fan_in", "tanh"), 0, 5 / 3 / math.sqrt(FAN_IN)),
    ],
)
def test_normal(function, arguments, mean, std):
    values = drawn(function, *arguments)
    assert values.mean() == pytest.approx(mean, abs=0.03 * std)
    assert values.std() == pytest.approx(std, rel=0.03)
    assert abs(values - mean).max() > 3.5 * std


@pytest.mark.parametrize(
    ("function", "arguments", "low", "high"),
    [
        (init.uniform_, (), 0, 1),
        (init.uniform_, (-1.0, 3.0), -1, 3),
        (init.xavier_uniform_, (), *(s * math.sqrt(6 / (FAN_IN + FAN_OUT)) for s in (-1, 1))),
        (init.kaiming_uniform_, (), *(s * math.sqrt(6 / FAN_IN) for s in (-1, 1))),
        (init.kaiming_uniform_, (0, "fan_out"), *(s * math.sqrt(6 / FAN_OUT) for s in (-1, 1))),
    ],
)
def test_uniform(function, arguments, low, high):
    values = drawn(function, *arguments)
    assert low <= values.min() < low + 0.001 * (high - low)
    assert high > values.max() > high - 0.001 * (high - low)
    assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_constants():
    assert (drawn(init.constant_, 2.5) == 2.5).all()
    assert (drawn(init.ones_) == 1).all()
    assert (drawn(init.zeros_) == 0).all()


def test_trunc_normal_stays_inside_and_keeps_its_shape():
    values = drawn(init.trunc_normal_, 1.0, 2.0, 0.0, 4.0)
    assert values.min() >= 0
    assert values.max() <= 4
    # The mean of a normal distribution cut at -0.5 and 1.5 standard deviations, computed by hand.
    density = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (-0.5, 1.5)]
    below = [(1 + math.erf(z / math.sqrt(2))) / 2 for z in (-0.5, 1.5)]
    expected = 1 + 2 * (density[0] - density[1]) / (below[1] - below[0])
    assert values.mean() == pytest.approx(expected, abs=0.03)
    with pytest.raises(ValueError, match="mean must be within two standard deviations"):
        init.trunc_normal_(ge.zeros(2), mean=10.0)


def test_gains():
    names = ("linear", "conv2d", "sigmoid", "tanh", "relu", "selu")
    assert [init.calculate_gain(name) for name in names] == [1, 1, 1, 5 / 3, math.sqrt(2), 0.75]
    assert init.calculate_gain("leaky_relu") == math.sqrt(2 / (1 + 0.01**2))
    assert init.calculate_gain("leaky_relu", 0.5) == math.sqrt(2 / 1.25)
    with pytest.raises(ValueError, match="nonlinearity must be leaky_relu or one of linear"):
        init.calculate_gain("softsign")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 2 dimensions .*got shape=\(3,\)"):
        init.kaiming_normal_(ge.zeros(3))
    with pytest.raises(ValueError, match="mode must be 'fan_in' or 'fan_out'; got mode='in'"):
        init.kaiming_normal_(ge.zeros(3, 3), mode="in")


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: nn.Linear(400, 300), 400),
        (lambda: nn.Conv2d(40, 60, 3, groups=2), 20 * 9),
        (lambda: nn.Conv1d(40, 60, 5), 40 * 5),
    ],
)
def test_layers_start_within_one_over_the_root_of_their_fan_in(layer, fan_in):
    ge.manual_seed(0)
    first = layer()
    bound = 1 / math.sqrt(fan_in)
    for tensor in first.parameters():
        array = tensor.detach().array
        assert bound >= abs(array).max() > 0.9 * bound
        assert array.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    second = layer()
    assert not np.array_equal(first.weight.array, second.weight.array)
    ge.manual_seed(0)
    np.testing.assert_array_equal(layer().weight.array, first.weight.array)
