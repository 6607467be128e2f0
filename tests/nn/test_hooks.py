"""Hooks of modules: before and after forward, and at the gradients of a module's two ends."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn


class Product(nn.Module):
    """Two inputs, one keyword, two outputs."""

    def forward(self, x, y, *, power=1):
        return x * y**power, x + y


def test_forward_hooks_see_and_replace():
    module = nn.Identity()
    seen = []
    pre = module.register_forward_pre_hook(lambda m, args: seen.append((m, args)))
    module.register_forward_pre_hook(lambda m, args: args[0] + 1)
    post = module.register_forward_hook(lambda m, args, output: output * 10)
    x = ge.ones(2)
    assert module(x).tolist() == [20.0, 20.0]
    assert seen[0][0] is module
    assert seen[0][1][0] is x
    pre.remove()
    post.remove()
    assert module(x).tolist() == [2.0, 2.0]
    assert len(seen) == 1


def test_hooks_run_in_order_and_prepend_goes_first():
    module = nn.Identity()
    order = []
    module.register_forward_hook(lambda *_: order.append("a"))
    module.register_forward_hook(lambda *_: order.append("b"), prepend=True)
    with module.register_forward_pre_hook(lambda *_: order.append("c")):
        module.register_forward_pre_hook(lambda *_: order.append("d"), prepend=True)
        module(1)
    assert order == ["d", "c", "b", "a"]
    module(1)
    assert order[4:] == ["d", "b", "a"]


def test_hooks_with_kwargs():
    module = Product()
    seen = []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: (args, kwargs | {"power": 2}), with_kwargs=True
    )
    module.register_forward_hook(
        lambda m, args, kwargs, output: seen.append(kwargs), with_kwargs=True
    )
    product, _ = module(ge.ones(1) * 3, ge.ones(1) * 2, power=1)
    assert product.item() == 12
    assert seen == [{"power": 2}]
    module.register_forward_pre_hook(lambda m, args, kwargs: args, with_kwargs=True)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple \(args, kwargs\)"):
        module(ge.ones(1), ge.ones(1), power=1)


def leaf(*values):
    return ge.tensor(list(values), dtype="float64", requires_grad=True)


def test_backward_hook_sees_both_ends():
    module = nn.Linear(2, 1, bias=False, dtype="float64")
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((m, gi, go)))
    x = leaf(1.0, 2.0)
    (module(x) * 3).sum().backward()
    ((owner, (grad_input,), (grad_output,)),) = seen
    assert owner is module
    assert grad_output.tolist() == [3.0]
    np.testing.assert_allclose(grad_input.array, 3 * module.weight.detach().array[0])
    np.testing.assert_array_equal(x.grad.array, grad_input.array)
    np.testing.assert_array_equal(module.weight.grad.array, [[3.0, 6.0]])


def test_backward_hook_runs_once_for_several_inputs_and_outputs():
    module = Product()
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    x, y = leaf(3.0), leaf(5.0)
    product, total = module(x * 1, y * 1)
    (2 * product + 7 * total).sum().backward()
    (((gx, gy), (g_product, g_total)),) = seen
    assert (gx.item(), gy.item()) == (2 * 5 + 7, 2 * 3 + 7)
    assert (g_product.item(), g_total.item()) == (2, 7)
    assert (x.grad.item(), y.grad.item()) == (17, 13)


def test_backward_hook_replaces_the_gradient_of_inputs():
    module = Product()
    module.register_full_backward_hook(lambda m, gi, go: (gi[0] * 10, gi[1]))
    module.register_full_backward_hook(lambda m, gi, go: (gi[0] + 1, gi[1]))
    x, y = leaf(3.0), leaf(5.0)
    module(x, y)[0].sum().backward()
    assert (x.grad.item(), y.grad.item()) == (51, 3)


def test_places_without_gradient_are_none_and_unused_ones_zero():
    module = Product()
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    x = leaf(3.0)
    module(x, ge.ones(1, dtype="float64"))[0].sum().backward()
    (((gx, gy), (_, g_total)),) = seen
    assert gx.item() == 1
    assert gy is None
    assert g_total.item() == 0  # nothing depends on the second output


def test_backward_hook_of_a_module_whose_inputs_need_no_gradient():
    module = nn.Linear(2, 1)
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    module(ge.ones(3, 2)).sum().backward()
    ((grad_input, grad_output),) = seen
    assert grad_input == (None,)
    assert grad_output[0].shape == (3, 1)
    assert module.weight.grad is not None


def test_backward_hook_runs_at_every_pass_and_not_after_removal():
    module = nn.Tanh()
    seen = []
    handle = module.register_full_backward_hook(lambda m, gi, go: seen.append(gi))
    x = leaf(0.5)
    out = module(x)
    out.backward(retain_graph=True)
    out.backward()
    assert len(seen) == 2
    handle.remove()
    module(x).backward()
    assert len(seen) == 2


def test_backward_hook_under_create_graph():
    module = nn.Tanh()
    module.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    x = leaf(0.5)
    (grad,) = ge.autograd.grad(module(x), x, create_graph=True)
    (second,) = ge.autograd.grad(grad, x)
    slope = 1 - np.tanh(0.5) ** 2
    assert grad.item() == pytest.approx(2 * slope)
    # The first pass went through the hook; the second starts inside the module, and does not.
    assert second.item() == pytest.approx(2 * -2 * np.tanh(0.5) * slope)


def test_a_hook_must_keep_places_and_shapes():
    module = Product()
    x, y = leaf(3.0), leaf(5.0)
    with (
        module.register_full_backward_hook(lambda m, gi, go: gi[0]),
        pytest.raises(RuntimeError, match="must have the places and shapes"),
    ):
        module(x, y)[0].backward()
    module.register_full_backward_hook(lambda m, gi, go: (gi[0], ge.ones(2)))
    with pytest.raises(RuntimeError, match="must have the places and shapes"):
        module(x, y)[0].backward()


def test_outputs_must_be_tensors():
    class Named(nn.Module):
        def forward(self, x):
            return {"x": x}

    module = Named()
    module.register_full_backward_hook(lambda *_: None)
    with pytest.raises(
        TypeError, match="output should be a Tensor or a tuple of Tensors; got dict"
    ):
        module(leaf(1.0))


def test_backward_hooks_cost_nothing_without_grad():
    module = nn.Linear(2, 1)
    module.register_full_backward_hook(lambda *_: pytest.fail("no backward here"))
    with ge.no_grad():
        assert module(ge.ones(1, 2)).grad_fn is None


def test_memory_is_freed_without_the_garbage_collector():
    import gc
    import weakref

    module = nn.Tanh()
    module.register_full_backward_hook(lambda *_: None)
    x = leaf(0.5)
    gc.disable()
    try:
        out = module(x)
        node = weakref.ref(out.node.edges[0][0])
        out.backward()
        del out
        assert node() is None
    finally:
        gc.enable()
