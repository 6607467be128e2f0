"""Random programs of views, in-place writes and operations: nothing may part from PyTorch silently.

A program runs twice, by gradengine and by PyTorch. Where PyTorch gives values and gradients, gradengine
gives the same or raises RuntimeError; where PyTorch refuses a write, so does gradengine. Where PyTorch
refuses only in backward, since a saved value was changed, gradengine may have kept a copy: then differences
of the program's values say what is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import gradengine as ge
from tests.autograd.view_programs import START, programs, run

torch = pytest.importorskip("torch")


def agree(ours: Any, theirs: Any, recorded: bool) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        mine, other = (np.zeros(()) if g is None else g for g in (mine, other))
        np.testing.assert_allclose(*np.broadcast_arrays(mine, other), rtol=1e-8, atol=1e-10)
    if recorded:  # PyTorch's views under no_grad say that they require grad, and have no gradient
        assert ours[2] == theirs[2]


# What PyTorch takes and gradengine does not, or the reverse, and why; all of it with an error.
OURS = (
    "expanded",  # a view of expanded memory is read-only, even where no element is in it twice
    "modified by an inplace",  # gradengine copies what is written less or more often
)
THEIRS = (
    "modified by an inplace",
    "no_grad mode",  # gradengine minds recorded writes only
    "multiple views",
)


def is_smooth(steps: Any) -> bool:
    """Whether differences of the program's values tell its gradient: all is recorded, without jumps."""
    return all(recorded and name not in ("apart", "mask") for _, name, _, _, recorded in steps)


def check_by_differences(program: Any, gradients: Any) -> None:
    """Compare gradengine's first gradients with differences of its values, which do not need any."""
    for place in (0, 1):
        direction = np.zeros_like(START)
        direction[place] = np.random.default_rng(1).uniform(-1, 1, (3, 3))
        losses = []
        for step in (1e-6, -1e-6):
            values = run(ge, program, START + step * direction)[0][0]
            losses.append(sum((value * (i + 1.0)).sum() for i, value in enumerate(values)))
        slope = 0.0 if gradients[place] is None else (gradients[place] * direction[place]).sum()
        np.testing.assert_allclose((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-4, atol=1e-4)


@settings(
    max_examples=3 * settings().max_examples,
    deadline=None,
    suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
)
@given(programs)
@pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors")
def test_programs_of_views_and_writes(program):
    theirs, their_refusal = run(torch, program)
    ours, our_refusal = run(ge, program)
    if theirs is not None and ours is not None:
        agree(ours, theirs, all(step[-1] for step in program[0]))
    elif theirs is not None:
        assert any(reason in our_refusal for reason in OURS), our_refusal
    elif ours is not None:
        assert any(reason in their_refusal for reason in THEIRS), their_refusal
        if is_smooth(program[0]):
            check_by_differences(program, ours[1])
