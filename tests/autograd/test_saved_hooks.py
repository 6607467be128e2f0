"""Hooks of saved tensors: what is packed and when, nesting, errors, and what they work together with."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import operation
from gradengine.autograd import graph
from gradengine.autograd.checkpoint import checkpoint
from gradengine.nn import functional as F
from gradengine.tape import Node

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


def functional_of(lib):
    return lib.nn.functional


class Noted:
    """A block of hooks that keep detached tensors and note what they are called with."""

    def __init__(self, lib, name=""):
        self.shapes: list[Any] = []
        self.calls: list[str] = []

        def pack(tensor):
            self.shapes.append((tuple(tensor.shape), tensor.requires_grad))
            self.calls.append(f"pack{name}")
            assert not lib.is_grad_enabled()
            return tensor.detach()

        def unpack(packed):
            self.calls.append(f"unpack{name}")
            return packed

        self.block = lib.autograd.graph.saved_tensors_hooks(pack, unpack)


# ---- what is packed ------------------------------------------------------------------------------


SAVING = {
    "mul by number": (lambda lib, x, w: x * 2, []),
    "mul": (lambda lib, x, w: x * w, [((2, 2), True), ((2, 2), True)]),
    "mul by constant": (lambda lib, x, w: x * w.detach(), [((2, 2), False)]),
    "add": (lambda lib, x, w: x + w, []),
    "exp": (lambda lib, x, w: x.exp(), [((2, 2), True)]),
    "matmul": (lambda lib, x, w: x @ w, [((2, 2), True), ((2, 2), True)]),
    "cat": (lambda lib, x, w: lib.cat([x, w]), []),
    "max": (lambda lib, x, w: x.max(1)[0], [((2,), False)]),
    "softmax": (lambda lib, x, w: x.softmax(1), [((2, 2), True)]),
    "where": (lambda lib, x, w: lib.where(x > 1, x, w), [((2, 2), False)]),
    "conv": (
        lambda lib, x, w: functional_of(lib).conv2d(x[None, None], w[None, None]),
        [((1, 1, 2, 2), True), ((1, 1, 2, 2), True)],
    ),
    "linear": (lambda lib, x, w: functional_of(lib).linear(x, w), [((2, 2), True), ((2, 2), True)]),
    "clone": (lambda lib, x, w: x.clone().sum(), []),
}


@both
@pytest.mark.parametrize("case", SAVING)
def test_what_backward_saves_is_packed_once_and_nothing_else(library, case):
    lib = library_called(library)
    x, w = lib.ones(2, 2, requires_grad=True), lib.full((2, 2), 2.0, requires_grad=True)
    function, expected = SAVING[case]
    noted = Noted(lib)
    with noted.block:
        y = function(lib, x, w)
    assert sorted(noted.shapes) == sorted(expected)
    y.sum().backward()
    assert noted.calls == ["pack"] * len(expected) + ["unpack"] * len(expected)


@both
def test_a_frozen_part_packs_nothing(library):
    lib = library_called(library)
    x, w = lib.ones(2, 2), lib.ones(2, 2, requires_grad=True)
    noted = Noted(lib)
    with noted.block:
        y = (x @ x).exp() @ w
    assert noted.shapes == [((2, 2), False)]
    y.sum().backward()


@both
def test_values_come_from_unpack(library):
    lib = library_called(library)
    x = lib.tensor([3.0], requires_grad=True)
    w = lib.tensor([2.0], requires_grad=True)
    saved_tensors_hooks = lib.autograd.graph.saved_tensors_hooks
    with saved_tensors_hooks(lambda t: t.detach() + 10, lambda t: t):
        y = x * w
    y.backward()
    assert (x.grad.item(), w.grad.item()) == (12.0, 13.0)


@both
def test_any_object_may_be_what_is_kept(library):
    lib = library_called(library)
    kept = {}

    def pack(tensor):
        kept[len(kept)] = tensor.detach().numpy().copy()
        return len(kept) - 1

    x = lib.tensor([3.0], requires_grad=True)
    with lib.autograd.graph.saved_tensors_hooks(pack, lambda key: lib.tensor(kept[key])):
        y = x.exp() * x
    y.backward()
    assert sorted(kept) == [0, 1, 2]
    assert x.grad.item() == pytest.approx(4 * np.exp(3))


@both
def test_only_operations_within_the_block_pack(library):
    lib = library_called(library)
    x = lib.tensor([3.0], requires_grad=True)
    noted = Noted(lib)
    y = x.exp()
    with noted.block:
        pass
    y.exp().backward()
    assert not noted.calls


@both
def test_the_innermost_of_nested_blocks_counts(library):
    lib = library_called(library)
    x = lib.tensor([0.5], requires_grad=True)
    outer, inner = Noted(lib, " outer"), Noted(lib, " inner")
    inner.calls = outer.calls
    with outer.block:
        a = x.exp()
        with inner.block:
            b = a.exp()
        c = b.exp()
    c.backward()
    packs = ["pack outer", "pack inner", "pack outer"]
    assert outer.calls == packs + ["un" + call for call in reversed(packs)]


@both
def test_each_backward_unpacks_and_the_first_frees(library):
    lib = library_called(library)
    x = lib.tensor([0.5], requires_grad=True)
    noted = Noted(lib)
    with noted.block:
        y = x.exp()
    y.backward(retain_graph=True)
    y.backward()
    assert noted.calls == ["pack", "unpack", "unpack"]
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_walk_that_wants_one_gradient_unpacks_what_that_needs():
    x, w = ge.ones(2, requires_grad=True), ge.ones(2, requires_grad=True)
    noted = Noted(ge)
    with noted.block:
        y = x * w
    ge.autograd.grad(y.sum(), x)
    assert noted.calls == ["pack", "pack", "unpack"]


def test_results_are_shown_as_part_of_the_graph_and_do_not_keep_it_alive():
    x = ge.ones(2, requires_grad=True)
    seen = []

    def pack(tensor):
        seen.append(tensor.grad_fn.name())
        return tensor  # the very one: a cycle, if it went on holding its node

    gc.collect()
    gc.disable()
    try:
        with graph.saved_tensors_hooks(pack, lambda packed: packed):
            y = x.exp()
        node = weakref.ref(y.grad_fn)
        assert seen == ["ExpBackward0"]
        del y
        assert node() is None
    finally:
        gc.enable()


# ---- errors --------------------------------------------------------------------------------------


@both
def test_a_pack_hook_must_not_write(library):
    lib = library_called(library)
    x = lib.ones(2, requires_grad=True)
    for operation_on in (lambda x: x * 1 * x, lambda x: x.exp()):
        with (
            lib.autograd.graph.saved_tensors_hooks(lambda t: t.add_(1), lambda t: t),
            pytest.raises(RuntimeError, match="pack hook is modifying its input in place"),
        ):
            operation_on(x)


@both
def test_unpack_must_return_a_tensor(library):
    lib = library_called(library)
    x = lib.ones(2, requires_grad=True)
    with lib.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 3):
        y = x.exp()
    with pytest.raises(
        TypeError, match="unpack_hook expected to be a Tensor but got result of type"
    ):
        y.sum().backward()


def test_unpack_must_keep_shape_and_dtype():
    x = ge.ones(2, requires_grad=True)
    for unpack in (lambda t: t[:1], lambda t: t.double()):
        with graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            y = x.exp()
        with pytest.raises(RuntimeError, match="of the saved one's shape and dtype; got shape="):
            y.sum().backward()


@both
@pytest.mark.parametrize("which", ["pack", "unpack"])
def test_what_a_hook_raises_comes_through(library, which):
    lib = library_called(library)

    def broken(value):
        raise LookupError("lost")

    hooks = (broken, lambda t: t) if which == "pack" else (lambda t: t, broken)
    x = lib.ones(2, requires_grad=True)

    def step():
        with lib.autograd.graph.saved_tensors_hooks(*hooks):
            y = x.exp()
        y.sum().backward()

    with pytest.raises(LookupError, match="lost"):
        step()
    x.exp().sum().backward()  # the block has ended


@both
def test_hooks_can_be_disabled(library):
    lib = library_called(library)
    saved_tensors_hooks = lib.autograd.graph.saved_tensors_hooks
    disable = lib.autograd.graph.disable_saved_tensors_hooks
    keep = (lambda t: t.detach(), lambda t: t)
    with disable("outer"):
        with disable("inner"), pytest.raises(RuntimeError, match="inner"):
            saved_tensors_hooks(*keep).__enter__()
        with pytest.raises(RuntimeError, match="outer"):
            saved_tensors_hooks(*keep).__enter__()
    with saved_tensors_hooks(*keep), pytest.raises(RuntimeError, match="not here"):
        disable("not here").__enter__()
    noted = Noted(lib)
    with noted.block:
        lib.ones(1, requires_grad=True).exp()
    assert noted.calls == ["pack"]


# ---- writes in place -----------------------------------------------------------------------------


@both
def test_a_write_after_a_copy_was_packed_is_harmless(library):
    lib = library_called(library)
    x = lib.tensor([2.0], requires_grad=True)
    y = x * 1
    with lib.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        z = y * y
    y.mul_(100)
    (grad,) = lib.autograd.grad(z, x)
    assert grad.item() == 4.0


@pytest.mark.parametrize("pack", [lambda t: t, lambda t: t.detach(), lambda t: t[:]])
@pytest.mark.parametrize("saved", ["input", "output"])
def test_a_write_to_memory_that_is_still_shared_is_found(pack, saved):
    x = ge.tensor([2.0], requires_grad=True)
    y = x * 1
    with graph.saved_tensors_hooks(pack, lambda t: t):
        z = y.exp() if saved == "output" else y * y
    (z if saved == "output" else y).mul_(100)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation.* by mul_ at .* after"
    ):
        ge.autograd.grad(z.sum(), x)


# ---- with what else ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["identity", "detached", "copy"])
def test_double_backward(library, kind):
    lib = library_called(library)
    pack = {"identity": lambda t: t, "detached": lambda t: t.detach()}.get(
        kind, lambda t: t.clone()
    )
    x = lib.tensor([0.5, 1.5], dtype=lib.float64, requires_grad=True)
    w = lib.tensor([2.0, 3.0], dtype=lib.float64, requires_grad=True)

    def gradients(hooked):
        def function():
            return ((x * w).exp() * w).tanh().sum()

        if hooked:
            with lib.autograd.graph.saved_tensors_hooks(pack, lambda t: t * 1):
                y = function()
        else:
            y = function()
        first = lib.autograd.grad(y, (x, w), create_graph=True)
        second = lib.autograd.grad(first[0].sum() + first[1].sum(), (x, w), create_graph=True)
        third = lib.autograd.grad(second[0].sum(), (x, w))
        return [value.tolist() for order in (first, second, third) for value in order]

    assert gradients(hooked=True) == gradients(hooked=False)


@both
def test_the_graph_of_a_graph_is_packed_within_a_block(library):
    lib = library_called(library)
    x = lib.tensor([0.5], requires_grad=True)
    y = x.exp()
    noted = Noted(lib)
    with noted.block:
        (grad,) = lib.autograd.grad(y, x, create_graph=True)
    assert "pack" in noted.calls
    (second,) = lib.autograd.grad(grad, x)
    assert second.item() == pytest.approx(np.exp(0.5))


@both
def test_a_functions_saved_tensors_are_packed(library):
    lib = library_called(library)
    function: Any = lib.autograd.Function

    class Scaled(function):
        @staticmethod
        def forward(ctx, x, w):
            out = x * w
            ctx.save_for_backward(x, w, out)
            return out, out + 1

        @staticmethod
        def backward(ctx, grad, other):
            x, w, _ = ctx.saved_tensors
            return (grad + other) * w, (grad + other) * x

    x, w = lib.ones(2, requires_grad=True), lib.full((2,), 3.0, requires_grad=True)
    noted = Noted(lib)
    with noted.block:
        first, second = Scaled.apply(x, w)
    assert len(noted.shapes) == 3
    (first + second).sum().backward(retain_graph=True)
    assert noted.calls == ["pack"] * 3 + ["unpack"] * 3
    assert (x.grad.tolist(), w.grad.tolist()) == ([6.0, 6.0], [2.0, 2.0])
    lib.autograd.grad(first.sum(), x, create_graph=True)
    assert first.grad_fn.saved_tensors[1].tolist() == [3.0, 3.0]


@both
def test_a_checkpoint_packs_its_arguments_alone(library):
    lib = library_called(library)
    call: Any = checkpoint
    if lib is not ge:
        call = pytest.importorskip("torch.utils.checkpoint").checkpoint
    x = lib.tensor([0.5], requires_grad=True)
    noted, inner = Noted(lib), Noted(lib)

    def function(x, scale):
        return (x * scale).exp().exp()

    with noted.block:
        y = call(function, x * 1, lib.ones(1), use_reentrant=False)
    assert noted.calls == ["pack", "pack"]
    with inner.block:  # what the second call saves is no business of a block around backward either
        y.backward()
    assert noted.calls == ["pack", "pack", "unpack", "unpack"]
    assert not inner.calls
    assert x.grad.item() == pytest.approx(np.exp(0.5) * np.exp(np.exp(0.5)))


def test_a_packed_argument_of_a_checkpoint_that_was_written():
    for kept, fails in ((lambda t: t.detach(), True), (lambda t: t.detach().clone(), False)):
        x = ge.tensor([0.5], requires_grad=True)
        y = x * 1
        with graph.saved_tensors_hooks(kept, lambda t: t):
            z = checkpoint(lambda y: y.exp().exp(), y, use_reentrant=False)
        y.mul_(2)
        if fails:
            with pytest.raises(
                RuntimeError, match="an argument or a parameter of <lambda> has been"
            ):
                z.backward()
        else:
            z.backward()
            assert x.grad.item() == pytest.approx(np.exp(0.5) * np.exp(np.exp(0.5)))


def test_hooks_within_a_checkpoint():
    x = ge.tensor([0.5], requires_grad=True)

    def hooked(x):
        with graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), ge.tensor):
            return (x * x).exp()

    y = checkpoint(hooked, x, use_reentrant=False)
    y.backward()
    assert x.grad.item() == pytest.approx(np.exp(0.25))
    w = ge.ones(1, requires_grad=True)
    y = checkpoint(lambda x: hooked(x * w), x, use_reentrant=False)
    with ge.no_grad():
        w.mul_(2)  # the second call would compute something else, whatever was packed in the first
    with pytest.raises(RuntimeError, match="an argument or a parameter of <lambda> has been"):
        y.backward()


def test_the_ledger_counts_what_is_kept():
    x = ge.ones(100, 10, requires_grad=True)

    def kept(pack, unpack=lambda t: t):
        with ge.autograd.memory() as ledger, graph.saved_tensors_hooks(pack, unpack):
            y = x.exp()
            z = y * y.detach() + y * 2
        assert z.requires_grad
        return ledger

    with ge.autograd.memory() as plain:
        y = x.exp()
        z = y * y.detach() + y * 2
    assert z.requires_grad
    assert plain.total == 4000
    assert kept(lambda t: t).total == 4000
    assert kept(lambda t: t.detach().clone()).total == 8000
    assert kept(lambda t: None).total == 0
    half = kept(lambda t: t.detach().half(), lambda t: t.float())
    assert half.total == 4000
    assert {row.operation for row in half.saved} == {"ExpBackward0", "MulBackward0"}


def test_every_kind_of_operation_gives_the_same_gradients_with_packed_values():
    def gradients():
        ge.manual_seed(0)
        model = ge.nn.Sequential(
            ge.nn.Conv2d(2, 4, 3, padding=1),
            ge.nn.BatchNorm2d(4),
            ge.nn.ReLU(),
            ge.nn.MaxPool2d(2),
            ge.nn.Flatten(),
            ge.nn.Dropout(0.5),
            ge.nn.Linear(64, 8),
            ge.nn.LayerNorm(8),
        )
        x = ge.randn(3, 2, 8, 8)
        loss = F.cross_entropy(model(x) @ ge.ones(8, 5), ge.tensor([0, 3, 4]))
        loss = loss + model(x)[:, [0, 2, 2]].sort(1)[0].std() + ge.cat([x[0, 0]] * 2).max()
        loss.backward()
        return [p.grad.tolist() for p in model.parameters()]

    expected = gradients()
    with graph.saved_tensors_hooks(
        lambda t: t.numpy().copy() if not t.requires_grad else t, unpacked
    ):
        assert gradients() == expected
    with graph.save_on_cpu():
        assert gradients() == expected


def test_arrays_within_tuples_are_packed():
    """Indices are saved in tuples, those of a write in a named one."""

    def gradients():
        x, w = ge.arange(12.0).reshape(3, 4).requires_grad_(), ge.ones(2, requires_grad=True)
        y = x * 1
        y[[0, 2], [1, 1]] = w * 3
        z = (y[:, [0, 3]] * y[[2], 1:3]).sum() + y.max(1)[0].sum()
        first = ge.autograd.grad(z, (x, w), create_graph=True)
        second = ge.autograd.grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), (x, w))
        return [grad.tolist() for grad in (*first, *second)]

    expected = gradients()
    kinds = []
    with graph.saved_tensors_hooks(lambda t: kinds.append(t.dtype.kind) or t.detach(), lambda t: t):
        assert gradients() == expected
    assert kinds.count("i") > 5


def test_arrays_stay_arrays_when_the_walk_is_recorded():
    x = ge.randn(2, 3, 4, 4, dtype="float64").requires_grad_()
    condition = np.arange(4) > 1

    def gradients():
        y = F.max_pool2d(ge.where(condition, x, x * 2), 2, stride=1)
        y = F.layer_norm(y * y, (3, 3)).exp()
        (first,) = ge.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = ge.autograd.grad((first * first).sum(), x)
        return first.detach().numpy(), second.numpy()

    expected = gradients()
    with graph.save_on_cpu():
        found = gradients()
    for grad, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            grad, other, atol=1e-8
        )  # copies of expanded memory are added up apart


def test_gradients_that_share_work_share_what_is_unpacked():
    x, w, b = (ge.ones(*shape, requires_grad=True) for shape in ((5, 4), (4,), (4,)))
    noted = Noted(ge)
    with noted.block:
        y = F.batch_norm(x, None, None, w, b, training=True)
    y.sum().backward()
    assert len(noted.shapes) > 2
    assert noted.calls == ["pack"] * len(noted.shapes) + ["unpack"] * len(noted.shapes)


def unpacked(packed):
    return ge.tensor(packed) if isinstance(packed, np.ndarray) else packed


# ---- on the CPU ----------------------------------------------------------------------------------


def test_save_on_cpu_keeps_copies_with_their_layout():
    x = ge.ones(2, 3, 4, 5, requires_grad=True)
    y = x.permute(0, 2, 3, 1) * 1
    with graph.save_on_cpu(pin_memory=True):
        z = y.exp() * y
    y.mul_(0)
    z.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.full((2, 3, 4, 5), 2 * np.e), rtol=1e-6)
    seen = []
    with graph.save_on_cpu(), graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        (x * x.detach()).sum()
    assert len(seen) == 1  # the innermost block's, not save_on_cpu's


@pytest.mark.gpu
@pytest.mark.parametrize("pin_memory", [False, True])
def test_save_on_cpu_frees_the_gpu(pin_memory):
    import cupy  # pyright: ignore[reportMissingImports]

    pool = cupy.get_default_memory_pool()

    def run(block):
        x = ge.ones(1 << 20, device="cuda", requires_grad=True)
        before = pool.used_bytes()
        with block:
            y = x
            for _ in range(8):
                y = (y * 0.5).exp()
        used = pool.used_bytes() - before
        y.sum().backward()
        return used, x.grad.cpu().numpy()

    plain, expected = run(graph.disable_saved_tensors_hooks(""))
    used, grad = run(graph.save_on_cpu(pin_memory=pin_memory))
    np.testing.assert_array_equal(grad, expected)
    assert plain >= 8 << 22
    assert used <= 1 << 22  # the last result alone


# ---- nothing is left -----------------------------------------------------------------------------


def test_outside_of_blocks_operations_make_ordinary_nodes():
    assert operation.new_node is Node
    x = ge.ones(1, requires_grad=True)
    with graph.save_on_cpu():
        assert operation.new_node is not Node
        with graph.save_on_cpu():
            pass
        y = x.exp()
        assert type(y.grad_fn) is Node
    assert operation.new_node is Node


def test_blocks_belong_to_their_thread():
    x = ge.ones(1, requires_grad=True)
    noted = Noted(ge)
    inside, done = threading.Event(), threading.Event()
    nodes = []

    def other():
        assert inside.wait(10)
        nodes.append(x.exp().grad_fn)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with noted.block:
        inside.set()
        assert done.wait(10)
    thread.join()
    assert not noted.calls
    assert type(nodes[0]) is Node
    assert operation.new_node is Node


@both
def test_packed_values_go_with_the_graph(library):
    lib = library_called(library)
    x = lib.ones(2, requires_grad=True)
    kept = []

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach().clone()
            kept.append(weakref.ref(self))

    with lib.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        y = (x * x.detach()).exp()
        z = y.sum()
    z.backward()
    assert [reference() for reference in kept] == [None] * 2
    with lib.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        y = x.exp()
    del y
    assert kept[-1]() is None


def test_retained_graphs_keep_no_unpacked_values():
    x = ge.ones(2, requires_grad=True)
    arrays = []

    def unpack(packed):
        tensor = ge.tensor(packed)
        arrays.append(weakref.ref(tensor.array))
        return tensor

    with graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), unpack):
        y = x.reshape(1, 1, 2, 1) * 1
        z = F.conv2d(y, y.transpose(2, 3).reshape(1, 1, 2, 1)).sum() + (x * x).sum()
        scale = ge.ones(1, requires_grad=True)
        z = z + F.batch_norm(y * y, None, None, scale, scale * 2, training=True).max()
    z.backward(retain_graph=True)
    assert arrays
    assert [array() for array in arrays] == [None] * len(arrays)
