"""Hooks on several tensors at once, and tensors' places in the graph."""

from __future__ import annotations

import weakref

import pytest

import gradengine as ge
from gradengine.autograd import graph

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


def leaves(lib, *values):
    return [lib.tensor(value, requires_grad=True) for value in values]


def listed(grads):
    return [None if grad is None else grad.item() for grad in grads]


# ---- hooks on several tensors --------------------------------------------------------------------


@both
def test_a_hook_on_all_runs_when_the_last_gradient_is_there(library):
    lib = library_called(library)
    a, b, c = leaves(lib, 2.0, 3.0, 5.0)
    seen = []
    handle = lib.autograd.graph.register_multi_grad_hook(
        (a, b, c), lambda g: seen.append(listed(g))
    )
    (a * b * 2).backward()
    (a * b * c).backward(inputs=[a])
    product = a * b * c
    product.backward()
    assert seen == [[6.0, 4.0, None], [15.0, None, None], [15.0, 10.0, 6.0]]
    handle.remove()
    (a * b * c).backward()
    assert len(seen) == 3


def test_a_hook_on_all_and_gradients_as_values():
    """PyTorch does not support this for leaves."""
    a, b, c = leaves(ge, 2.0, 3.0, 5.0)
    seen = []
    graph.register_multi_grad_hook((a, b, c), lambda grads: seen.append(listed(grads)))
    ge.autograd.grad(a * b * c, (c, b))
    assert seen == [[None, 10.0, 6.0]]


@both
def test_a_hook_on_any_runs_with_the_first_gradient(library):
    lib = library_called(library)
    a, b = leaves(lib, 2.0, 3.0)
    y = a * b
    z = y * 4
    seen = []
    register = lib.autograd.graph.register_multi_grad_hook
    with register((lib.ones(1), y, z), lambda g: seen.append(g.item()), mode="any"):
        z.backward(retain_graph=True)
        (y * 7).backward(retain_graph=True)
    z.backward()
    assert seen == [1.0, 7.0]


@both
def test_gradients_that_other_hooks_have_replaced(library):
    lib = library_called(library)
    a, b = leaves(lib, 2.0, 3.0)
    y = a * b
    seen = []
    y.register_hook(lambda grad: grad * 10)
    lib.autograd.graph.register_multi_grad_hook((y, b), lambda g: seen.append(listed(g)) or 99)
    (y * 1).backward()
    assert seen == [[10.0, 20.0]]
    assert b.grad.item() == 20.0


@both
def test_each_backward_within_a_backward_counts_for_itself(library):
    lib = library_called(library)
    a, b = leaves(lib, 2.0, 3.0)
    seen = []
    lib.autograd.graph.register_multi_grad_hook((a, b), lambda g: seen.append(listed(g)))
    y = a * 1

    def inner(grad):
        with lib.enable_grad():
            (a * b * 100).backward()

    y.register_hook(inner)
    (y * b).backward()
    assert seen == [[300.0, 200.0], [3.0, 2.0]]


@both
def test_who_takes_a_hook_on_several(library):
    lib = library_called(library)
    register = lib.autograd.graph.register_multi_grad_hook
    with pytest.raises(ValueError, match="mode"):
        register(leaves(lib, 1.0), print, mode="some")
    with pytest.raises((RuntimeError, AssertionError), match="gradient"):
        register((lib.ones(1),), print)


def test_a_hook_on_several_leaves_nothing_behind():
    class Box:
        pass

    a, b = leaves(ge, 2.0, 3.0)
    box = Box()
    reference = weakref.ref(box)
    graph.register_multi_grad_hook((a, b), lambda g, box=box: None)
    del box
    y = a * 1
    y.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (y * b).backward()
    assert ge.backward_walk.walks.innermost is None
    assert reference() is not None
    del a, b, y
    assert reference() is None


# ---- places in the graph -------------------------------------------------------------------------


@both
def test_an_edge_stands_for_its_tensor(library):
    lib = library_called(library)
    edge_of = lib.autograd.graph.get_gradient_edge
    x = lib.tensor([1.0, 2.0], requires_grad=True)
    y = x * 3
    z = y * y
    place, leaf, end = edge_of(y), edge_of(x), edge_of(z)
    assert place.node is y.grad_fn
    assert leaf.node is y.grad_fn.next_functions[0][0]
    assert place.output_nr == 0
    grads = lib.autograd.grad(z.sum(), [place, leaf], retain_graph=True)
    assert [grad.tolist() for grad in grads] == [[6.0, 12.0], [18.0, 36.0]]
    (grad,) = lib.autograd.grad(end, leaf, lib.tensor([1.0, 10.0]), retain_graph=True)
    assert grad.tolist() == [18.0, 360.0]
    lib.autograd.backward(end, lib.ones(2), inputs=[leaf], retain_graph=True)
    assert x.grad.tolist() == [18.0, 36.0]
    z.sum().backward(inputs=leaf, retain_graph=True)
    assert x.grad.tolist() == [36.0, 72.0]
    lib.autograd.backward((end, z.sum()), (lib.ones(2), None))
    assert x.grad.tolist() == [72.0, 144.0]


@both
def test_edges_that_are_not_used(library):
    lib = library_called(library)
    edge_of = lib.autograd.graph.get_gradient_edge
    x, y = lib.ones(2, requires_grad=True), lib.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="index 0 appears to not have been used"):
        lib.autograd.grad(x.sum(), edge_of(y))
    assert lib.autograd.grad(x.sum(), edge_of(y), allow_unused=True) == (None,)
    with pytest.raises(RuntimeError, match="materialize_grads cannot be used"):
        lib.autograd.grad(x.sum(), edge_of(y), materialize_grads=True)
    with pytest.raises(RuntimeError, match="does not require gradients"):
        edge_of(lib.ones(1))


def test_an_edge_keeps_no_values_and_needs_a_gradient():
    x = ge.ones(2, requires_grad=True)
    y = x * 3
    array = weakref.ref(y.array)
    edge = graph.get_gradient_edge(y)
    del y
    assert array() is None
    with pytest.raises(RuntimeError, match="GradientEdge cannot be implicitly created"):
        ge.autograd.grad(edge, x)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        ge.autograd.grad(edge, x, ge.ones(3))
    (grad,) = ge.autograd.grad(edge, x, ge.ones(2))
    assert grad.tolist() == [3.0, 3.0]
