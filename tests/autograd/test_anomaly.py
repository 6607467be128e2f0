"""Anomaly mode: which gradient is bad, which line made it, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import backward_walk, source_lines
from gradengine.autograd import (
    detect_anomaly,
    is_anomaly_check_nan_enabled,
    is_anomaly_enabled,
    set_detect_anomaly,
)
from gradengine.tape import Node

FILE = "tests/autograd/test_anomaly.py"
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield
    assert backward_walk.pull_instead is None


def line_of(function: Callable[..., Any], mark: str) -> int:
    """Return the number of the line of a function's source that holds the mark."""
    import inspect

    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if mark in line and "match" not in line)


def square_root_of_a_negative_number() -> Any:
    x = ge.tensor([-1.0, 4.0], requires_grad=True)
    return ge.sqrt(x).sum()


def test_the_line_of_forward_is_named():
    with detect_anomaly():
        loss = square_root_of_a_negative_number()
        line = line_of(square_root_of_a_negative_number, "ge.sqrt")
        with pytest.raises(
            RuntimeError,
            match=rf"'SqrtBackward0' returned nan values in its 0th output.*{FILE}:{line}",
        ):
            loss.backward()


def test_pytorch_names_the_same_function():
    torch = pytest.importorskip("torch")
    x = torch.tensor([-1.0, 4.0], requires_grad=True)
    with (
        torch.autograd.detect_anomaly(),
        pytest.warns(UserWarning, match="Error detected"),
        pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan values in its 0th output"),
    ):
        torch.sqrt(x).sum().backward()


def test_it_warns_when_it_is_made():
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        detect_anomaly()


def test_the_second_input_is_the_1st_output():
    x = ge.tensor([0.0], requires_grad=True)
    with detect_anomaly(), pytest.raises(RuntimeError, match="'DivBackward0'.*in its 1th output"):
        (ge.zeros(1) / x).sum().backward()


def test_infinite_gradients_are_asked_for():
    x = ge.tensor([0.0, 1.0], requires_grad=True)
    with detect_anomaly():
        ge.sqrt(x).sum().backward()
    with (
        detect_anomaly(check_inf=True),
        pytest.raises(RuntimeError, match="'SqrtBackward0' returned inf values in its 0th output"),
    ):
        ge.sqrt(x).sum().backward()


def test_nothing_is_looked_for_without_check_nan():
    with detect_anomaly(check_nan=False):
        assert not is_anomaly_check_nan_enabled()
        square_root_of_a_negative_number().backward()


def test_the_trap_of_where_is_named():
    x = ge.tensor([0.0, 2.0], requires_grad=True)

    def reciprocal():
        return ge.where(x == 0, ge.zeros(2), 1 / x)

    with detect_anomaly():
        line = line_of(reciprocal, "ge.where")
        with pytest.raises(RuntimeError, match=rf"`where` at {FILE}:{line} took.* 0 \* inf is nan"):
            (reciprocal() * 2).sum().backward()


def test_other_nans_are_no_trap_of_where():
    x = ge.tensor([-1.0, 2.0], requires_grad=True)
    with detect_anomaly(), pytest.raises(RuntimeError, match="SqrtBackward0") as caught:
        ge.where(x < 0, ge.sqrt(x), x).sum().backward()
    assert "where" not in str(caught.value)


def test_the_remedy_works():
    x = ge.tensor([0.0, 2.0], requires_grad=True)
    with detect_anomaly():
        ge.where(x == 0, ge.zeros(2), 1 / ge.where(x == 0, ge.ones(2), x)).sum().backward()
    assert x.grad.tolist() == [0.0, -0.25]


def test_other_errors_in_backward_tell_the_line():
    class Fails(ge.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            raise KeyError("oh")

    with detect_anomaly():
        y = Fails.apply(ge.ones(2, requires_grad=True))
        with pytest.raises(KeyError) as caught:
            y.sum().backward()
    assert f"in backward of FailsBackward at {FILE}" in caught.value.__notes__[0]


def test_a_forward_that_ran_before_has_no_line():
    loss = square_root_of_a_negative_number()
    with detect_anomaly(), pytest.raises(RuntimeError, match="ran before anomaly detection"):
        loss.backward()


def test_with_create_graph_and_several_results():
    x = ge.tensor([1.0, 2.0], requires_grad=True)
    with detect_anomaly():
        first, second = x.split(1)
        (found,) = ge.autograd.grad((first * second**2).sum(), x, create_graph=True)
        found.sum().backward()
    assert x.grad.tolist() == [4.0, 6.0]


def test_an_error_of_writing_in_place_tells_where_the_value_was_saved():
    with detect_anomaly():
        x = ge.ones(2, requires_grad=True) * 1
        y = x.exp()
        y += 1
        with pytest.raises(RuntimeError, match=rf"after exp saved it at {FILE}"):
            y.sum().backward()


def test_switching_and_nesting():
    assert not is_anomaly_enabled()
    with detect_anomaly():
        with set_detect_anomaly(False):
            assert not is_anomaly_enabled()
        assert is_anomaly_enabled()
        with detect_anomaly(check_nan=False):
            pass
        assert is_anomaly_check_nan_enabled()
    set_detect_anomaly(True)
    assert is_anomaly_enabled()
    set_detect_anomaly(False)
    assert not is_anomaly_enabled()


def test_off_it_leaves_nothing_behind():
    before = Node.__init__
    with detect_anomaly():
        loss = (ge.ones(2, requires_grad=True) * 2).sum()
        assert loss.grad_fn in source_lines.places_of_nodes
        assert Node.__init__ is not before
    assert Node.__init__ is before
    later = (ge.ones(2, requires_grad=True) * 2).sum()
    assert later.grad_fn not in source_lines.places_of_nodes
