"""ge.func beside torch.func: values, nesting, auxiliary results, graphs, and calls of modules."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import func

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Both:
    """Runs the same code with either library and compares what it returns."""

    def same(self, compute: Any) -> Any:
        ours, theirs = compute(ge, ge.func), compute(torch, torch.func)
        assert_same(ours, theirs)
        return ours


@pytest.fixture
def both() -> Both:
    return Both()


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(theirs, (tuple, list)):
        assert isinstance(ours, (tuple, list))
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_same(x, y)
    elif isinstance(theirs, torch.Tensor):
        assert (ours.shape, ours.requires_grad) == (tuple(theirs.shape), theirs.requires_grad)
        np.testing.assert_allclose(
            ours.detach().tolist(), theirs.detach().tolist(), rtol=1e-10, atol=1e-12
        )
    else:
        assert ours == theirs


def tensor(library: Any, *values: Any, requires_grad: bool = False) -> Any:
    return library.tensor(list(values), dtype=library.float64, requires_grad=requires_grad)


def product(x, y):
    return (x.sin() * y**2).sum()


def test_grad_by_arguments(both):
    for argnums in (0, 1, (0, 1), (1,), -1):
        both.same(
            lambda lib, f, n=argnums: f.grad(product, argnums=n)(
                tensor(lib, 1, 2), tensor(lib, 3, 4)
            )
        )


def test_values_and_auxiliary_results(both):
    def function(x):
        return (x**3).sum(), {"twice": x * 2}

    both.same(lambda lib, f: f.grad(function, has_aux=True)(tensor(lib, 1, 2)))
    gradient, value = both.same(
        lambda lib, f: f.grad_and_value(lambda x: (x**3).sum())(tensor(lib, 2))
    )
    turned = func.value_and_grad(lambda x: (x**3).sum())(tensor(ge, 2))
    assert (turned[0].item(), turned[1].item()) == (value.item(), gradient.item()) == (8.0, 12.0)
    (value, aux), gradient = func.value_and_grad(function, has_aux=True)(tensor(ge, 1))
    assert (value.item(), aux["twice"].item(), gradient.item()) == (1.0, 2.0, 3.0)


def test_nested_derivatives(both):
    def third(lib, f):
        return f.grad(f.grad(f.grad(lambda x: x**4)))(lib.tensor(2.0, dtype=lib.float64))

    assert both.same(third).item() == 48.0
    both.same(
        lambda lib, f: f.grad(lambda x: (f.grad(product)(x, 3 * x) ** 2).sum())(tensor(lib, 1, 2))
    )


def test_arguments_may_be_nested(both):
    def function(parameters, x):
        return ((parameters["w"] * x + parameters["rest"][0]) ** 2).sum()

    both.same(
        lambda lib, f: f.grad(function)(
            {"w": tensor(lib, 1, 2), "rest": (tensor(lib, 3, 4),)}, tensor(lib, 5, 6)
        )
    )


def test_vjp(both):
    def function(x, y):
        return {"sum": x + y, "product": x * y}

    def compute(lib, f):
        output, pullback = f.vjp(function, tensor(lib, 1, 2), tensor(lib, 3, 4))
        cotangents = {"sum": tensor(lib, 1, 1), "product": tensor(lib, 2, 3)}
        return output, pullback(cotangents), pullback(cotangents)

    both.same(compute)
    both.same(lambda lib, f: f.vjp(lambda x: x.exp(), tensor(lib, 1))[1](tensor(lib, 2)))
    _, _, aux = func.vjp(lambda x: (x * 2, x), tensor(ge, 1), has_aux=True)
    assert aux.tolist() == [1.0]


def test_jvp(both):
    def function(x, y):
        return (x * y).sin(), x.sum()

    both.same(
        lambda lib, f: f.jvp(
            function, (tensor(lib, 1, 2), tensor(lib, 3, 4)), (tensor(lib, 5, 6), tensor(lib, 7, 8))
        )
    )
    both.same(lambda lib, f: f.jvp(lambda x: x * 0 + 1, (tensor(lib, 1),), (tensor(lib, 5),)))
    with pytest.raises(RuntimeError, match="primals and tangents to be tuples"):
        func.jvp(lambda x: x, tensor(ge, 1), tensor(ge, 1))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
def test_jacobians(both, name):
    def function(x, y):
        return (x[:, None] * y).tanh(), y.sum()

    for argnums in (0, (0, 1)):
        both.same(
            lambda lib, f, n=argnums: getattr(f, name)(function, argnums=n)(
                tensor(lib, 0.1, 0.2), tensor(lib, 0.3, 0.4, 0.5)
            )
        )
    both.same(
        lambda lib, f: getattr(f, name)(lambda x: (x**2, x * 3), has_aux=True)(tensor(lib, 1, 2))
    )
    assert getattr(func, name)(lambda x: x * 2)(ge.ones(0, 3)).shape == (0, 3, 0, 3)


def test_hessian(both):
    both.same(lambda lib, f: f.hessian(lambda x: (x**3).sum() * x[0])(tensor(lib, 1, 2)))
    both.same(
        lambda lib, f: f.hessian(product, argnums=(0, 1))(tensor(lib, 1, 2), tensor(lib, 3, 4))
    )


def test_results_go_on_where_something_requires_grad(both):
    def compute(lib, f):
        x, weight = tensor(lib, 1, 2, requires_grad=True), tensor(lib, 3, 4, requires_grad=True)
        by_x = f.grad(lambda z: (z**3 * weight).sum())(x)
        by_x.sum().backward()
        outside = f.grad(lambda z: (z**3 * weight).sum())(x.detach())
        outside.sum().backward()
        with lib.no_grad():
            plain = f.grad(lambda z: (z**3 * weight).sum())(x)
        return x.grad, weight.grad, by_x, outside, plain

    both.same(compute)


def test_nothing_is_added_to_grad():
    x = tensor(ge, 1, 2, requires_grad=True)
    func.hessian(lambda z: (z**3).sum())(x)
    assert x.grad is None


def test_errors():
    x = tensor(ge, 1, 2)
    with pytest.raises(RuntimeError, match="single element.*vjp or jacrev"):
        func.grad(lambda x: x * 2)(x)
    with pytest.raises(RuntimeError, match="as a Tensor"):
        func.grad(lambda x: 3.0)(x)
    with pytest.raises(RuntimeError, match="argnums must name positional arguments"):
        func.grad(lambda x: x.sum(), argnums=1)(x)
    with pytest.raises(RuntimeError, match="argnums must be distinct"):
        func.grad(lambda x: x.sum(), argnums=(0, -1))(x)
    with pytest.raises(RuntimeError, match="tuple of two"):
        func.grad(lambda x: x.sum(), has_aux=True)(x)
    with pytest.raises(RuntimeError, match="argument 0 must be a Tensor"):
        func.grad(lambda x: x)(3.0)
    with pytest.raises(RuntimeError, match=r"got shapes=\[\(1,\)\], expected \[\(2,\)\]"):
        func.vjp(lambda x: x, x)[1](tensor(ge, 1))


# ---- functional_call -----------------------------------------------------------------------------


class Net(ge.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            ge.nn.Linear(3, 4),
            ge.nn.BatchNorm1d(4),
            ge.nn.Linear(4, 3),
        )
        self.last.weight_again = self.first.bias

    def forward(self, x, scale=1.0):
        return self.last(self.norm(self.first(x))) * scale


def test_gradients_by_the_parameters_of_a_module():
    model, x = Net(), ge.randn(5, 3)
    parameters = dict(model.named_parameters())
    buffers = copy.deepcopy(dict(model.named_buffers()))

    def loss(parameters):
        return (func.functional_call(model, (parameters, buffers), x, {"scale": 2.0}) ** 2).sum()

    gradients = func.grad(loss)(parameters)
    assert all(parameter.grad is None for parameter in model.parameters())
    (model(x, scale=2.0) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradients[name].tolist(), parameter.grad.tolist(), atol=1e-4)
    assert buffers["norm.num_batches_tracked"].item() == 1


def test_the_module_is_as_it_was():
    model = Net().eval()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    zeros = {name: ge.zeros_like(value) for name, value in model.named_parameters()}
    assert func.functional_call(model, zeros, ge.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="matmul|linear"):
        func.functional_call(model, zeros, ge.ones(2, 7))
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before


def test_names_and_ties():
    model, x = Net().eval(), ge.ones(2, 3)
    ones = ge.ones(4)
    with pytest.raises(RuntimeError, match=r"unexpected key\(s\): \['third.weight'\]"):
        func.functional_call(model, {"third.weight": ones}, x)
    with pytest.raises(RuntimeError, match=r"missing key\(s\): \['first.weight'"):
        func.functional_call(model, {"first.bias": ones}, x, strict=True)
    with pytest.raises(ValueError, match="multiple values for keys that are tied"):
        func.functional_call(model, {"first.bias": ones, "last.weight_again": ge.zeros(4)}, x)
    with pytest.raises(ValueError, match="multiple dictionaries"):
        func.functional_call(model, ({"first.bias": ones}, {"first.bias": ones}), x)
    with pytest.raises(ValueError, match="dict, or a list or tuple of dicts"):
        func.functional_call(model, ones, x)
    by_tie = func.functional_call(model, {"last.weight_again": ones}, x)
    assert by_tie.tolist() == func.functional_call(model, {"first.bias": ones}, x).tolist()
    apart = func.functional_call(model, {"last.weight_again": ones}, x, tie_weights=False)
    assert apart.tolist() == model(x).tolist()
