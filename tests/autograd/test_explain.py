"""The sentence names what cut the path, and its line."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import explain, record_reasons


@pytest.fixture(autouse=True)
def _nothing_recorded() -> None:
    from gradengine.autograd.explain import _latest

    _latest.reasons = None


def parameter(*values: float) -> ge.Parameter:
    return ge.nn.Parameter(ge.tensor(values or (1.0, 2.0)))


def line() -> int:
    return sys._getframe(1).f_lineno


def no_grad_block(w: Any) -> Any:
    y = w.exp()
    with ge.no_grad():
        z = y * 2
    return z.sum() + ge.ones(1, requires_grad=True).sum()


def detached(w: Any) -> Any:
    return (w * 3).detach().sin().sum()


def through_data(w: Any) -> Any:
    return (w * 3).data.sum()


def to_integers(w: Any) -> Any:
    return (w * 3).long().float().sum()


def without_derivative(w: Any) -> Any:
    return (w * 3).argmax() * 2


def compared(w: Any) -> Any:
    return ((w * 3) > 1).float().sum()


def through_tensor(w: Any) -> Any:
    return ge.tensor(w * 3).sum()


def by_item(w: Any) -> Any:
    y = (w * 3).sum()
    return ge.ones(2, requires_grad=True).sum() * y.item()


def by_numpy(w: Any) -> Any:
    y = w * 3
    values = np.exp(y.detach().numpy())
    return ge.tensor(values).sum()


def decorated(w: Any) -> Any:
    @ge.no_grad()
    def inner(x: Any) -> Any:
        return x * 2

    return inner(w.exp()).sum()


def dead_branch(w: Any) -> Any:
    w.sin()
    return ge.ones(2, requires_grad=True).sum()


def never_used(w: Any) -> Any:
    return ge.ones(2, requires_grad=True).sum()


@pytest.mark.parametrize(
    ("function", "offset", "match"),
    [
        (
            no_grad_block,
            3,
            r"mul at LINE cuts the path: it ran with gradients switched off \(no_grad, ",
        ),
        (no_grad_block, 2, r"no_grad, entered at LINE\); the last connected operation is exp at"),
        (no_grad_block, 1, r"the last connected operation is exp at LINE"),
        (
            detached,
            1,
            r"detach\(\) at LINE cuts the path: .* last connected operation is mul at LINE",
        ),
        (through_data, 1, r"\.data at LINE cuts the path"),
        (to_integers, 1, r"the conversion to int64 at LINE cuts the path"),
        (without_derivative, 1, r"argmax at LINE cuts the path: it has no derivative"),
        (compared, 1, r"gt at LINE cuts the path: it has no derivative; .* is mul at LINE"),
        (through_tensor, 1, r"tensor\(\) at LINE cuts the path: it makes a new leaf"),
        (by_item, 2, r"item\(\) at LINE makes plain numbers of what depends on it"),
        (by_numpy, 2, r"numpy\(\) at LINE makes plain numbers .* is mul at"),
        (decorated, 5, r"mul at .*no_grad, entered at LINE"),
        (dead_branch, 1, r"does not depend on it \(a dead branch\); .* operation is sin at LINE"),
    ],
)
def test_a_cut_path_is_named_with_its_line(function: Any, offset: int, match: str) -> None:
    w = parameter()
    found = explain(lambda: function(w), w)
    number = function.__code__.co_firstlineno + offset
    assert re.search(match.replace("LINE", rf"[^ ]*test_explain\.py:{number}"), found), found
    assert found.count("\n") == 0


def test_an_unused_parameter() -> None:
    w = parameter()
    found = explain(lambda: never_used(w), w)
    assert found.endswith("does not depend on it; no operation used it while that was recorded")


def test_frozen_with_the_line_that_froze() -> None:
    w = parameter()
    with record_reasons():
        w.requires_grad_(False)
        number = line() - 1
        loss = (w * ge.ones(2, requires_grad=True)).sum()
    found = explain(loss, w)
    assert re.search(
        rf"is frozen: its requires_grad is False since .*test_explain.py:{number};", found
    )


def test_names_of_parameters_come_from_the_modules_seen() -> None:
    model = ge.nn.Sequential(ge.nn.Linear(2, 3), ge.nn.ReLU(), ge.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    x = ge.ones(4, 2)
    found = explain(lambda: model(x).sum(), model[0].weight)
    assert found.startswith("Sequential.0.weight is frozen")


class TestZero:
    @pytest.mark.parametrize(
        ("function", "match"),
        [
            (
                lambda w: (w - 10).relu().sum(),
                r"ReluBackward0 at LINE gets one and passes on zeros, as no el",
            ),
            (lambda w: ge.where(w > 10, w, 0.0).sum(), r"WhereBackward0 at LINE .* other branch"),
            (lambda w: (w.exp() * 0).sum(), r"MulBackward0 at LINE .* multiplies by 0"),
            (lambda w: w.clamp(5, 6).sum(), r"ClampBackward1 at LINE .* outside its bounds"),
            (lambda w: (w * 1000).sigmoid().sum(), r"SigmoidBackward0 at LINE .* saturated"),
            (lambda w: w.exp()[:0].sum(), r"SumBackward0 at LINE"),
        ],
    )
    def test_where_it_becomes_zero(self, function: Any, match: str) -> None:
        w = parameter()
        found = explain(lambda: function(w), w)
        number = function.__code__.co_firstlineno
        assert "is zero: " in found
        assert re.search(match.replace("LINE", rf"[^ ]*test_explain\.py:{number}"), found), found
        assert w.grad is None

    def test_without_a_recording_the_operation_is_named(self) -> None:
        w = parameter()
        loss = (w - 10).relu().sum()
        assert "is zero: ReluBackward0 gets one and passes on zeros" in explain(loss, w)
        assert explain(loss, w) == explain(loss, w)


class TestWithoutARecording:
    def test_a_result_that_is_not_on_the_tape(self) -> None:
        w = parameter()
        assert "the result is not on the tape at all" in explain(detached(w), w)

    def test_a_result_of_other_leaves(self) -> None:
        w, v = parameter(), parameter(3.0, 4.0)
        loss = (w.detach() * v).sum()
        found = explain(loss, w)
        assert (
            "depends on other leaves (1), but not on it; constants enter at MulBackward0" in found
        )
        assert "record_reasons() around forward" in found

    def test_a_copy_in_its_place(self) -> None:
        w = parameter()
        copy = ge.nn.Parameter(w.detach().clone())
        assert "another leaf of its shape and values" in explain((copy * 2).sum(), w)

    def test_a_frozen_parameter(self) -> None:
        w = parameter()
        w.requires_grad = False
        found = explain((w * ge.ones(2, requires_grad=True)).sum(), w)
        assert found.startswith("the tensor of shape (2,) is frozen: its requires_grad is False;")

    def test_a_graph_that_was_freed(self) -> None:
        w = parameter()
        loss = w.exp().sum()
        loss.backward()
        assert "a backward has freed what they saved" in explain(loss, w)


def test_a_gradient_that_is_there() -> None:
    w = parameter()
    loss = w.exp().sum()
    found = explain(loss, w)
    assert re.search(
        r"is there, up to 7.39 large: 2 operations connect it; its grad is None", found
    )
    loss.backward(retain_graph=True)
    assert explain(loss, w).endswith("2 operations connect it")


def test_requires_grad_switched_off_and_on_again() -> None:
    w = parameter()
    loss = w.exp().sum()
    w.requires_grad_(False).requires_grad_(True)
    assert "is there" in explain(loss, w)


def test_writes_in_place_are_followed() -> None:
    w = parameter()

    def function() -> Any:
        y = ge.zeros(2)
        with ge.no_grad():
            y[:] = w * 2
        return y.sum() + ge.ones(1, requires_grad=True).sum()

    assert "mul at" in explain(function, w)
    assert "gradients switched off" in explain(function, w)
