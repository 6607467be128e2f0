"""autograd.functional beside PyTorch's: values, nesting, graphs and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import functional

torch = pytest.importorskip("torch")
theirs = torch.autograd.functional

X, Y = [[0.5, -1.0, 2.0], [0.1, 0.7, 1.5]], [0.3, -0.2, 0.9]


def arguments(library: Any, requires_grad: bool = False) -> tuple[Any, Any]:
    return tuple(
        library.tensor(values, dtype=library.float64, requires_grad=requires_grad)
        for values in (X, Y)
    )


def two_outputs(x, y):
    return (x * y).sin(), (x**2).sum(0) * y.exp()


def one_output(x, y):
    return (x @ y).tanh()


def number(x, y):
    return (x.sin() * y).sum() + (y**3).sum()


def assert_same(ours: Any, theirs: Any) -> None:
    """Both are nested alike and hold the same values."""
    if isinstance(theirs, tuple):
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_same(x, y)
        return
    assert (ours.shape, ours.requires_grad) == (tuple(theirs.shape), theirs.requires_grad)
    np.testing.assert_allclose(ours.tolist(), theirs.tolist(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("func", [two_outputs, one_output, lambda x, y: y * 2, number])
def test_jacobian(func, requires_grad, create_graph):
    ours, expected = (
        module.jacobian(func, arguments(library, requires_grad), create_graph=create_graph)
        for module, library in ((functional, ge), (theirs, torch))
    )
    if create_graph and not requires_grad:  # where PyTorch records what nobody can ask for
        ours, expected = detached(ours), detached(expected)
    assert_same(ours, expected)


def detached(value: Any) -> Any:
    return tuple(map(detached, value)) if isinstance(value, tuple) else value.detach()


def test_jacobian_by_columns():
    ours = functional.jacobian(two_outputs, arguments(ge), strategy="forward-mode")
    assert_same(ours, theirs.jacobian(two_outputs, arguments(torch)))
    with pytest.raises(NotImplementedError, match="reverse-mode"):
        functional.jacobian(two_outputs, arguments(ge), strict=True, strategy="forward-mode")
    with pytest.raises(AssertionError, match="expected strategy to be either"):
        functional.jacobian(two_outputs, arguments(ge), strategy="sideways")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("func", [number, lambda x, y: (x * x).sum()])
def test_hessian(func, create_graph):
    ours, expected = (
        module.hessian(func, arguments(library, True), create_graph=create_graph)
        for module, library in ((functional, ge), (theirs, torch))
    )
    if create_graph:
        ours, expected = detached(ours), detached(expected)
    assert_same(ours, expected)


def test_one_input_and_an_empty_one():
    for shape in ((3,), ()):
        results = [
            module.jacobian(lambda x: x * x, library.ones(shape, dtype=library.float64))
            for module, library in ((functional, ge), (theirs, torch))
        ]
        assert_same(*results)
    empty = functional.jacobian(lambda x: x * x, ge.ones(0, 2))  # an error in PyTorch
    assert empty.shape == (0, 2, 0, 2)
    results = [
        module.hessian(lambda x: (x**3).sum(), library.ones(3, dtype=library.float64))
        for module, library in ((functional, ge), (theirs, torch))
    ]
    assert_same(*results)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("name", "func", "v"),
    [
        ("vjp", two_outputs, (X, Y)),
        ("vjp", one_output, [0.5, 2.0]),
        ("vjp", number, None),
        ("jvp", two_outputs, (X, Y)),
        ("jvp", number, (X, Y)),
        ("hvp", number, (X, Y)),
        ("vhp", number, (X, Y)),
    ],
)
def test_products(name, func, v, create_graph):
    results = []
    for module, library in ((functional, ge), (theirs, torch)):
        vector = v
        if isinstance(v, tuple):
            vector = tuple(library.tensor(value, dtype=library.float64) for value in v)
        elif v is not None:
            vector = library.tensor(v, dtype=library.float64)
        function = getattr(module, name)
        results.append(function(func, arguments(library, True), vector, create_graph=create_graph))
    assert_same(*results)


def test_results_can_be_differentiated():
    gradients = []
    for module, library in ((functional, ge), (theirs, torch)):
        x, y = arguments(library, True)
        jacobian = module.jacobian(two_outputs, (x, y), create_graph=True)
        _, product = module.jvp(two_outputs, (x, y), arguments(library), create_graph=True)
        total = sum((block**2).sum() for row in jacobian for block in row)
        (total + sum(z.sum() for z in product)).backward()
        gradients.append((x.grad, y.grad))
    assert_same(*gradients)


def test_nothing_is_recorded_outside_and_no_grad_does_not_matter():
    x, y = arguments(ge, True)
    with ge.no_grad():
        assert_same(functional.vjp(number, (x, y)), theirs.vjp(number, arguments(torch)))
    assert (x.grad, y.grad) == (None, None)


@pytest.mark.parametrize("module", [functional, theirs], ids=["ge", "torch"])
def test_errors(module):
    library = ge if module is functional else torch
    x, y = arguments(library)
    with pytest.raises(TypeError, match="must be either a Tensor or a tuple of Tensors"):
        module.jacobian(number, (x, 3))
    with pytest.raises(TypeError, match="must be either a Tensor or a tuple of Tensors"):
        module.vjp(lambda x: 3, x)
    with pytest.raises(RuntimeError, match="should contain a single element"):
        module.hessian(one_output, (x, y))
    with pytest.raises(RuntimeError, match="should return a single Tensor"):
        module.vhp(two_outputs, (x, y), (x, y))
    with pytest.raises(RuntimeError, match="v can only be None if"):
        module.vjp(one_output, (x, y))
    with pytest.raises(RuntimeError, match="v can only be None if"):
        module.jvp(one_output, (x, y))
    with pytest.raises(RuntimeError, match="v is a tuple of invalid length: should be 2 but got 1"):
        module.jvp(one_output, (x, y), (x,))
    with pytest.raises(RuntimeError, match="v has invalid size"):
        module.hvp(number, (x, y), (y, y))


@pytest.mark.parametrize("module", [functional, theirs], ids=["ge", "torch"])
def test_strict(module):
    library = ge if module is functional else torch
    x, y = arguments(library)
    with pytest.raises(RuntimeError, match="independent of input 1.*strict mode"):
        module.jacobian(lambda x, y: x * 2, (x, y), strict=True)
    with pytest.raises(RuntimeError, match="Output 0.*does not require gradients"):
        module.vjp(lambda x, y: library.ones(1), (x, y), strict=True)
    with pytest.raises(RuntimeError, match="independent of.*strict mode"):
        module.jvp(lambda x, y: x.sum(), (x, y), (x, y), strict=True)
    with pytest.raises(RuntimeError, match="strict mode"):
        module.hessian(lambda x: (x * 2).sum(), x, strict=True)
    with pytest.raises(RuntimeError, match="strict mode"):
        module.vhp(lambda x: (x * 2).sum(), x, x, strict=True)
    module.hvp(number, (x, y), (x, y), strict=True)
