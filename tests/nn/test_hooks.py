"""Hooks of modules: before and after forward, and at the gradients of a module's two ends."""

from __future__ import annotations

import copy
import pickle

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


def test_places_without_gradient_are_none():
    module = Product()
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    x = leaf(3.0)
    module(x, ge.ones(1, dtype="float64"))[0].sum().backward()
    (((gx, gy), (_, g_total)),) = seen
    assert gx.item() == 1
    assert gy is None
    assert g_total is None  # nothing depends on the second output


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
        pytest.raises(RuntimeError, match="invalid number of grad_input; got 1, but expected 2"),
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


# ---- beside PyTorch ------------------------------------------------------------------------------

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


def listed(values):
    return tuple(None if value is None else value.tolist() for value in values)


def product_of(lib):
    """Give the module `Product`, which takes a text too and returns one, of a library."""

    class Product(lib.nn.Module):  # pyright: ignore[reportGeneralTypeIssues]
        def forward(self, x, y, text="", *, power=1):
            return x * y**power, text, x + y

    return Product()


def ones(lib, *shape):
    return lib.ones(*shape, requires_grad=True)


@both
def test_the_order_of_all_hooks(library):
    lib = library_called(library)
    module = lib.nn.Linear(2, 1)
    log = []
    for name, register in (
        ("backward", module.register_full_backward_hook),
        ("backward pre", module.register_full_backward_pre_hook),
        ("forward", module.register_forward_hook),
        ("forward pre", module.register_forward_pre_hook),
    ):
        register(lambda *_, name=name: log.append(name))
        register(lambda *_, name=name: log.append(name + " first"), prepend=True)
    module(ones(lib, 3, 2)).sum().backward()
    kinds = ["forward pre", "forward", "backward pre", "backward"]
    assert log == [name + end for name in kinds for end in (" first", "")]


@both
def test_a_backward_pre_hook_replaces_the_gradient_of_outputs(library):
    lib = library_called(library)
    module = product_of(lib)
    seen = []
    module.register_full_backward_pre_hook(lambda m, go: (go[0] * 3, None, go[2] * 5))
    module.register_full_backward_pre_hook(lambda m, go: seen.append(listed(go)))
    module.register_full_backward_hook(lambda m, gi, go: seen.append((listed(gi), listed(go))))
    x, y = ones(lib, 1), ones(lib, 1)
    product, text, total = module(x, y, "text")
    assert text == "text"
    (product + total).sum().backward()
    assert seen == [([3.0], None, [5.0]), (([8.0], [8.0], None), ([3.0], None, [5.0]))]
    assert (x.grad.item(), y.grad.item()) == (8.0, 8.0)


@both
def test_unused_ends_of_a_module(library):
    lib = library_called(library)
    module = product_of(lib)
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((listed(gi), listed(go))))
    x, y = ones(lib, 1), ones(lib, 1)
    module(x, y)[0].sum().backward()
    assert seen.pop() == (([1.0], [1.0]), ([1.0], None, None))
    module(x.detach(), y.detach() * 1)
    module(lib.ones(1), lib.arange(1))
    assert not seen
    module.register_forward_hook(lambda m, args, output: (output[0], output[1], args[0] * 1))
    module(x, y)[2].sum().backward()
    assert seen == [(([1.0], [0.0]), (None, None, [1.0]))]


@both
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PyTorch's
def test_a_backward_pre_hook_where_no_input_needs_a_gradient(library):
    lib = library_called(library)
    module = lib.nn.Linear(2, 1)
    seen = []
    module.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
    module.register_full_backward_hook(lambda m, gi, go: seen.append((listed(gi), listed(go))))
    module(lib.ones(1, 2)).sum().backward()
    assert seen == [((None,), ([[2.0]],))]
    assert module.weight.grad.tolist() == [[2.0, 2.0]]


@both
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_backward_hooks_that_return_too_much(library, kind):
    lib = library_called(library)
    module = product_of(lib)
    if kind == "pre":
        module.register_full_backward_pre_hook(lambda m, go: (*go, None))
    else:
        module.register_full_backward_hook(lambda m, gi, go: (*gi, None))
    what = (
        "grad_output.*got 4, but expected 3"
        if kind == "pre"
        else "grad_input.*got 3, but expected 2"
    )
    with pytest.raises(RuntimeError, match=f"returned an invalid number of {what}"):
        module(ones(lib, 1), ones(lib, 1))[0].backward()


@both
@pytest.mark.parametrize("end", ["input", "output"])
def test_the_ends_of_a_module_with_backward_hooks_cannot_be_written(library, end):
    lib = library_called(library)
    module = lib.nn.ReLU(inplace=True) if end == "input" else lib.nn.Tanh()
    x = ones(lib, 2) * 1
    module(x)  # without hooks it may be
    module.register_full_backward_hook(lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"created inside a custom Function \(or because an input was"
    ):
        module(x).mul_(2)
    with lib.no_grad():
        module(x.detach()).mul_(2)


@both
def test_what_passed_a_module_with_backward_hooks_is_a_view(library):
    lib = library_called(library)
    module = lib.nn.Tanh()
    seen = []
    module.register_full_backward_hook(lambda *_: None)
    module.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    x = ones(lib, 2) * 1
    out = module(x)
    assert seen[0]._base is x
    assert out._is_view()
    x.mul_(2)  # tanh saved its result alone
    out.sum().backward()
    with pytest.raises(
        RuntimeError, match="its base or another view of its base has been modified in"
    ):
        seen[0].sum().backward()


@both
def test_a_function_that_returns_its_input_gives_a_view_that_cannot_be_written(library):
    lib = library_called(library)

    class Same(lib.autograd.Function):  # pyright: ignore[reportGeneralTypeIssues]
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Flat(Same):
        @staticmethod
        def forward(ctx, x):
            return x.view(-1)

    for kind in (Same, Flat):
        x = ones(lib, 2) * 1
        y = kind.apply(x)
        assert y._base is x
        with pytest.raises(RuntimeError, match="created inside a custom Function"):
            y.mul_(2)
        y = kind.apply(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified in"):
            y.sum().backward()


@both
def test_hooks_that_are_always_called(library):
    lib = library_called(library)

    class Broken(lib.nn.Module):  # pyright: ignore[reportGeneralTypeIssues]
        def forward(self, x):
            raise ValueError("broken")

    module = Broken()
    log = []
    module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    module.register_forward_hook(lambda m, args, output: log.append("not called"))
    module.register_forward_hook(
        lambda m, args, kwargs, output: log.append((args, kwargs, output)) or "changed",
        always_call=True,
        with_kwargs=True,
    )
    module.register_forward_hook(lambda m, args, output: log.append(output), always_call=True)
    with pytest.raises(ValueError, match="broken"):
        module(1)
    assert log == [((2,), {}, None), "changed"]


@both
def test_hooks_that_are_always_called_run_once(library):
    lib = library_called(library)
    module = lib.nn.Identity()
    log = []

    def broken(*_):
        log.append("broken")
        raise KeyError("hook")

    module.register_forward_hook(lambda *_: log.append("a"), always_call=True)
    module.register_forward_hook(broken)
    module.register_forward_hook(lambda *_: log.append("b"), always_call=True)
    module.register_forward_hook(lambda *_: log.append("not called"))
    with pytest.raises(KeyError, match="hook"):
        module(1)
    assert log == ["a", "broken", "b"]
    log.clear()
    module.register_forward_pre_hook(lambda *_: 1 / 0)
    module.register_forward_hook(broken, always_call=True)
    with (
        pytest.warns(
            UserWarning, match="was silenced as another error was raised in forward: 'hook'"
        ),
        pytest.raises(ZeroDivisionError),
    ):
        module(1)
    assert log == ["a", "b", "broken"]


# ---- state ---------------------------------------------------------------------------------------


@both
def test_the_order_of_hooks_around_a_state_dict(library):
    lib = library_called(library)
    module = lib.nn.Sequential(lib.nn.Linear(1, 1, bias=False), lib.nn.Linear(1, 1, bias=False))
    log = []
    for name, part in (("all", module), ("0", module[0]), ("1", module[1])):
        part.register_state_dict_pre_hook(
            lambda m, prefix, keep, name=name: log.append((name, m is module, prefix, keep))
        )
        part.register_state_dict_post_hook(
            lambda m, state, prefix, metadata, name=name: log.append(
                (name, list(state), prefix, metadata)
            )
        )
    state = module.state_dict(prefix="a.", keep_vars=True)
    weights = ["a.0.weight", "a.1.weight"]
    assert log == [
        ("all", True, "a.", True),
        ("0", False, "a.0.", True),
        ("0", weights[:1], "a.0.", {"version": 1}),
        ("1", False, "a.1.", True),
        ("1", weights, "a.1.", {"version": 1}),
        ("all", weights, "a.", {"version": 1}),
    ]
    assert list(state) == weights


@both
def test_a_hook_may_change_a_state_dict(library):
    lib = library_called(library)
    module = lib.nn.Linear(1, 1)

    def rename(module, state, prefix, metadata):
        state[prefix + "w"] = state.pop(prefix + "weight")

    with module.register_state_dict_post_hook(rename):
        assert list(module.state_dict()) == ["bias", "w"]
    assert list(module.state_dict()) == ["weight", "bias"]
    module.register_state_dict_post_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="post-hook must return None"):
        module.state_dict()


@both
def test_hooks_around_loading(library):
    lib = library_called(library)
    module = lib.nn.Sequential(lib.nn.Linear(1, 1), lib.nn.Linear(1, 1))
    log = []
    for name, part in (("all", module), ("0", module[0]), ("1", module[1])):
        part.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *rest, name=name: log.append(
                (name, list(state), prefix, *rest[:1])
            )
        )
        part.register_load_state_dict_post_hook(
            lambda m, keys, name=name: log.append((name, *map(list, keys)))
        )
    state = module.state_dict()
    del state["0.bias"]
    state["other"] = state["1.bias"]
    result = module.load_state_dict(state, strict=False)
    version = {"version": 1}
    before = [
        ("all", ["0.weight", "1.weight", "1.bias", "other"], "", version),
        ("0", ["0.weight"], "0.", version),
        ("1", ["1.weight", "1.bias"], "1.", version),
    ]
    assert [entry for entry in log if len(entry) == 4] == before
    lists = (["0.bias"], ["other"])
    after = [entry for entry in log if len(entry) == 3]
    assert sorted(after) == [("0", *lists), ("1", *lists), ("all", *lists)]
    assert log[-1][0] == "all"
    assert tuple(result) == lists
    with pytest.raises(RuntimeError, match="(?s)Missing key.*0.bias.*Unexpected key.*other"):
        module.load_state_dict(state)


@both
def test_a_hook_may_bring_an_old_state_up_to_date(library):
    lib = library_called(library)
    module = lib.nn.Sequential(lib.nn.Linear(1, 1))

    def rename(module, state, prefix, metadata, strict, missing, unexpected, errors):
        state[prefix + "weight"] = state.pop(prefix + "w")

    handle = module[0].register_load_state_dict_pre_hook(rename)
    old = {"0.w": lib.full((1, 1), 7.0), "0.bias": lib.ones(1)}
    assert str(module.load_state_dict(old)) == "<All keys matched successfully>"
    assert list(old) == ["0.w", "0.bias"]
    assert module[0].weight.item() == 7.0
    handle.remove()

    def complain(module, state, prefix, metadata, strict, missing, unexpected, errors):
        missing.append("m")
        unexpected.append("u")
        errors.append("too old")

    with (
        module.register_load_state_dict_pre_hook(complain),
        pytest.raises(RuntimeError, match='(?s)Missing.*"m".*Unexpected.*"u".*too old'),
    ):
        module.load_state_dict(module.state_dict())


@both
def test_a_hook_after_loading_may_forgive(library):
    lib = library_called(library)
    module = lib.nn.Linear(1, 1)
    state = {"bias": lib.full((1,), 7.0)}
    with module.register_load_state_dict_post_hook(lambda m, keys: keys.missing_keys.clear()):
        assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    assert module.bias.item() == 7.0
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)
    module.register_load_state_dict_post_hook(lambda m, keys: keys)
    with pytest.raises((TypeError, AssertionError), match="not expected to return new values"):
        module.load_state_dict(module.state_dict())


def test_a_misfit_changes_nothing_whatever_hooks_there_are():
    module = nn.Linear(1, 1)
    module.register_load_state_dict_post_hook(lambda m, keys: pytest.fail("nothing was loaded"))
    before = module.bias.item()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict({"weight": ge.ones(2, 2), "bias": ge.full((1,), before + 1)})
    assert module.bias.item() == before


# ---- copies --------------------------------------------------------------------------------------


def counted(module, state, prefix, metadata):
    state[prefix + "count"] = len(state)


def doubled(module, args, output):
    return output * 2


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_are_part_of_a_modules_copy(library, copied):
    lib = library_called(library)
    module = lib.nn.Identity()
    handle = module.register_forward_hook(doubled)
    module.register_state_dict_post_hook(counted)
    other = copied(module)
    handle.remove()
    assert module(lib.ones(1)).item() == 1.0
    assert other(lib.ones(1)).item() == 2.0
    assert other.state_dict()["count"] == 0
