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
from hypothesis import strategies as st

import gradengine as ge

torch = pytest.importorskip("torch")

VIEWS = {
    "row": lambda x: x[0],
    "last": lambda x: x[..., -1],
    "head": lambda x: x[:2],
    "tail": lambda x: x[1:],
    "step": lambda x: x[::2],
    "turned": lambda x: x.transpose(0, -1),
    "flat": lambda x: x.reshape(-1),
    "same": lambda x: x.view(x.shape),
    "new": lambda x: x.unsqueeze(0),
    "squeezed": lambda x: x.squeeze(),
    "diagonal": lambda x: x.diagonal(),
    "narrow": lambda x: x.narrow(0, 0, 1),
    "one": lambda x: x.unbind()[0],
    "half": lambda x: x.split(1)[-1],
    "wide": lambda x: x.expand(2, *x.shape),
    "apart": lambda x: x.detach(),
}
WRITES = {
    "mul_": lambda x, y: x.mul_(y),
    "add_": lambda x, y: x.add_(y),
    "copy_": lambda x, y: x.copy_(y),
    "tanh_": lambda x, y: x.tanh_(),
    "double_": lambda x, y: x.mul_(2.0),
    "zero_": lambda x, y: x.zero_(),
    "first": lambda x, y: x.__setitem__(0, 0.5),
    "part": lambda x, y: x.__setitem__(slice(1, None), y[1:]),
    "whole": lambda x, y: x.__setitem__(..., y),
    "mask": lambda x, y: x.__setitem__(x > 0.25, 0.125),
}
OPERATIONS = {
    "mul": lambda x, y: x * y,
    "add": lambda x, y: x + y,
    "exp": lambda x, y: (x * 0.25).exp(),
    "tanh": lambda x, y: x.tanh(),
    "square": lambda x, y: x * x,
    "sum": lambda x, y: x.sum(0),
    "sine": lambda x, y: x.sin(),
    "copy": lambda x, y: x.clone(),
}

places = st.integers(0, 30)
steps = st.one_of(
    st.tuples(st.just("view"), st.sampled_from(sorted(VIEWS)), places, places, st.booleans()),
    st.tuples(st.just("view"), st.sampled_from(sorted(VIEWS)), places, places, st.just(True)),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), places, places, st.just(True)),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), places, places, st.just(True)),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), places, places, st.booleans()),
    st.tuples(st.just("compute"), st.sampled_from(sorted(OPERATIONS)), places, places, st.just(True)),
)  # fmt: skip
programs = st.tuples(st.lists(steps, min_size=3, max_size=14), st.booleans(), st.booleans())

START = np.random.default_rng(0).uniform(-1, 1, (4, 3, 3))


def run(library: Any, program: Any, start: Any = START) -> tuple[Any, str]:
    """Return values and gradients of a program, or None, and what was refused."""
    steps, base_needs_gradient, turned = program
    a = library.tensor(start[0] + 0, dtype=library.float64, requires_grad=True)
    b = library.tensor(start[1] + 0, dtype=library.float64, requires_grad=True)
    c = library.tensor(start[2] + 0, dtype=library.float64)
    # The base of the views: on the tape or not, in either memory order.
    base = (a.mT if turned else a) * 1.0 if base_needs_gradient else c.clone()
    tensors = [base, base, b, c]
    for number, (kind, name, first, second, recorded) in enumerate(steps):
        x, y = tensors[first % len(tensors)], tensors[second % len(tensors)]
        mode = library.enable_grad if recorded else library.no_grad
        try:
            with mode():
                if kind == "view":
                    result = VIEWS[name](x)
                elif kind == "write":
                    # PyTorch reads an argument in the written memory while it writes: half of it anew.
                    WRITES[name](x, y.clone() if library is torch else y)
                    continue
                else:
                    result = OPERATIONS[name](x, y)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return None, f"step {number}: {type(error).__name__}: {error}"
        tensors.append(result)
    try:
        loss = sum((x * (place + 1.0)).sum() for place, x in enumerate(tensors))
        values = [x.detach().numpy().copy() for x in tensors]
        leaves = [a, b]
        first = library.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        weighed = sum((g * g).sum() for g in first if g is not None)
        needed = hasattr(weighed, "requires_grad") and weighed.requires_grad
        second = (
            library.autograd.grad(weighed, leaves, allow_unused=True) if needed else (None,) * 2
        )
    except RuntimeError as error:
        return None, f"backward: {error}"
    gradients = [None if g is None else g.detach().numpy() for g in (*first, *second)]
    flags = [x.requires_grad for x in tensors]
    return (values, gradients, flags), ""


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


@settings(max_examples=300, deadline=None, suppress_health_check=tuple(HealthCheck))  # pyright: ignore[reportArgumentType]
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
