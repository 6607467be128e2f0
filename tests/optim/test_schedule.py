"""Schedules: rates by hand, the order of calls, resuming."""

from __future__ import annotations

import pytest

import gradengine as ge
from gradengine import nn, optim


def optimizer(lr=1.0):
    return optim.SGD([nn.Parameter(ge.zeros(1))], lr=lr)


def rates(schedule, count):
    found = []
    for _ in range(count):
        found += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: optim.StepLR(o, 2, gamma=0.5), [1, 1, 0.5, 0.5, 0.25]),
        (lambda o: optim.MultiStepLR(o, [3, 1], gamma=0.5), [1, 0.5, 0.5, 0.25, 0.25]),
        (
            lambda o: optim.CosineAnnealingLR(o, 4, eta_min=0.5),
            [1, 0.9267766952966369, 0.75, 0.5732233047033631, 0.5],
        ),
        (lambda o: optim.LambdaLR(o, lambda epoch: epoch + 2), [2, 3, 4, 5, 6]),
    ],
)
def test_rates(make, expected):
    assert rates(make(optimizer()), 5) == pytest.approx(expected)


def test_the_order_of_calls_is_checked_once():
    schedule = optim.StepLR(optimizer(), 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        schedule.step()
    schedule.step()


def test_a_schedule_goes_on_from_its_state():
    whole = rates(optim.CosineAnnealingLR(optimizer(), 6), 6)
    first = optim.CosineAnnealingLR(optimizer(), 6)
    start = rates(first, 3)
    second = optim.CosineAnnealingLR(optimizer(), 6)
    second.load_state_dict(first.state_dict())
    assert start + rates(second, 3) == whole


def test_a_schedule_goes_on_from_the_optimizers_state():
    whole = rates(optim.StepLR(optimizer(), 2), 6)
    first = optim.StepLR(optimizer(), 2)
    start = rates(first, 3)
    resumed = optimizer(lr=7.0)
    resumed.load_state_dict(first.optimizer.state_dict())
    second = optim.StepLR(resumed, 2, last_epoch=2)
    assert start + rates(second, 3) == whole
    with pytest.raises(KeyError, match="'initial_lr' is not specified .*got last_epoch=2"):
        optim.StepLR(optimizer(), 2, last_epoch=2)


def test_one_function_for_each_group():
    with pytest.raises(
        ValueError, match="one function for each param group; got 2 functions, 1 groups"
    ):
        optim.LambdaLR(optimizer(), [lambda epoch: 1.0] * 2)
