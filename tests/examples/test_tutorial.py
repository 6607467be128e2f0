"""The tutorial prints the facts that it claims."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

import gradengine as ge
from gradengine.examples import tutorial


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """Give what the tutorial prints, by section."""
    printed = io.StringIO()
    ge.set_default_device("cpu")
    with contextlib.redirect_stdout(printed):
        tutorial.main()
    ge.set_default_device(None)
    parts = re.split("^== (.*)$", printed.getvalue().strip(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_one_training_step(sections: dict[str, str]) -> None:
    text = sections["One training step"]
    # 1000 logits around 0 less 1000 labels around 0.5
    found = re.search(r"loss: tensor\((-\d+\.\d+), grad_fn=<SumBackward0>\)", text)
    assert found is not None
    assert -800 < float(found[1]) < -200
    assert "gradient of conv1.weight: (64, 3, 7, 7)" in text
    assert "conv1.weight moved against its gradient: True" in text


def test_the_tape(sections: dict[str, str]) -> None:
    text = sections["The tape"]
    assert "a parameter is a leaf: True None" in text
    assert "the loss is none: False <SumBackward0>" in text
    assert "the way back: SumBackward0 <- SubBackward0 <- AddmmBackward0 <- " in text
    assert "the labels need no gradient: (None, 0)" in text


def test_gradients_by_hand(sections: dict[str, str]) -> None:
    text = sections["Gradients by hand"]
    assert "Q: tensor([-12.,  65.], grad_fn=<SubBackward0>)" in text
    assert "dQ/da = 9a^2: tensor([36., 81.]) tensor([True, True])" in text
    assert "dQ/db = -2b:  tensor([-12.,  -8.]) tensor([True, True])" in text


def test_what_is_left_out(sections: dict[str, str]) -> None:
    text = sections["What is left out of the tape"]
    assert re.findall(r"\? (\w+)", text) == ["False", "True", "False"]


def test_a_frozen_network(sections: dict[str, str]) -> None:
    assert "moved: fc.weight and fc.bias, of 122 tensors" in sections["A frozen network"]
