"""Random programs of views, in-place writes and operations, and how a library runs one."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

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


def programs_of(views: Any, recorded: Any) -> Any:
    """Return the strategy of programs: steps, whether the base requires grad, and its order in memory.

    A step is its kind and name, the places of its one or two tensors among those made so far, and whether
    it is recorded, which `recorded` decides where it may vary.
    """
    always = st.just(True)
    kinds = [
        ("view", views, recorded),
        ("view", views, always),
        ("write", WRITES, always),
        ("write", WRITES, always),
        ("write", WRITES, recorded),
        ("compute", OPERATIONS, always),
    ]
    steps = st.one_of(
        *(
            st.tuples(st.just(kind), st.sampled_from(sorted(names)), places, places, mode)
            for kind, names, mode in kinds
        )
    )
    return st.tuples(st.lists(steps, min_size=3, max_size=14), st.booleans(), st.booleans())


programs = programs_of(VIEWS, st.booleans())

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
                    # PyTorch takes a view whose base has just joined the tape for a leaf, until it is asked.
                    _ = x.grad_fn
                    # PyTorch reads an argument in the written memory while it writes: half of it anew.
                    WRITES[name](x, y.clone() if library.__name__ == "torch" else y)
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
