"""Copies of tensors and modules, by deepcopy and pickle: what comes along, and what does not."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import gradengine as ge

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


def pickled(value):
    return pickle.loads(pickle.dumps(value))


copied_by = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])


@both
@copied_by
def test_a_copy_of_a_leaf_is_a_leaf_of_its_own(library, copied):
    lib = library_called(library)
    x = lib.tensor([1.0, 2.0], requires_grad=True)
    called = []
    if copied is copy.deepcopy or lib is ge:  # PyTorch warns that a pickle goes without
        x.register_hook(lambda grad: called.append("hook"))
        x.register_post_accumulate_grad_hook(lambda leaf: called.append("set"))
    x.requires_grad_(False).requires_grad_()
    y = copied(x)
    assert (y.requires_grad, y.is_leaf, y.tolist()) == (True, True, [1.0, 2.0])
    (y * 3).sum().backward()
    assert (x.grad, y.grad.tolist(), called) == (None, [3.0, 3.0], [])
    with lib.no_grad():
        y.mul_(5)
    assert x.tolist() == [1.0, 2.0]


@both
def test_a_deepcopy_has_a_copy_of_grad(library):
    lib = library_called(library)
    x = lib.tensor([1.0, 2.0], requires_grad=True)
    (x * 2).sum().backward()
    y = copy.deepcopy(x)
    y.grad.mul_(10)
    assert (x.grad.tolist(), y.grad.tolist()) == ([2.0, 2.0], [20.0, 20.0])


@both
@copied_by
def test_only_leaves_can_be_copied(library, copied):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    if copied is pickled and lib is not ge:
        pytest.skip("PyTorch pickles any tensor, without its place in the graph")
    with pytest.raises(RuntimeError, match="graph leaves"):
        copied(x * 2)
    assert copied((x * 2).detach()).tolist() == [2.0]


@both
@copied_by
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
def test_copies_keep_form_and_dtype(library, copied, dtype):
    lib = library_called(library)
    x = lib.ones(2, 3, 0, 4).to(getattr(lib, dtype))
    y = copied(x)
    assert (tuple(y.shape), y.dtype) == ((2, 3, 0, 4), x.dtype)
    z = copied(lib.ones(()).to(getattr(lib, dtype)))
    assert (tuple(z.shape), z.item()) == ((), 1)


@copied_by
def test_copies_keep_the_order_of_axes_in_memory(copied):
    x = ge.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    assert copied(x).tolist() == x.tolist()
    x = ge.ones(2, 3, dtype="bfloat16")
    assert copied(x).dtype == x.dtype


class Tied(ge.nn.Module):
    """Two layers with one weight, a buffer, a transient buffer, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ge.nn.Linear(3, 3), ge.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = ge.nn.BatchNorm1d(3)
        self.register_buffer("scale", ge.full((1,), 2.0))
        self.register_buffer("transient", ge.ones(1), persistent=False)
        self.steps = [1, 2]

    def forward(self, x):
        return self.norm(self.second(self.first(x)) * self.scale)


def trained(module, steps):
    ge.manual_seed(1)
    optimizer = ge.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(ge.randn(5, 3)) ** 2 * ge.arange(3.0)).sum().backward()
        optimizer.step()
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


@copied_by
def test_a_copy_of_a_module_trains_alike_and_apart(copied):
    ge.manual_seed(0)
    module = Tied()
    trained(module, 2)
    before = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    other = copied(module)
    assert other.second.weight is other.first.weight
    assert other.second.weight is not module.first.weight
    assert isinstance(other.first.weight, ge.nn.Parameter)
    assert "transient" not in other.state_dict()
    assert other.transient.tolist() == [1.0]
    assert other.steps == [1, 2]
    assert other.steps is not module.steps
    after = trained(other, 3)
    assert {name for name in after if not np.array_equal(after[name], before[name])} == {
        *("first.weight", "second.weight", "first.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    } | (
        {"second.bias"}
        if not np.array_equal(after["second.bias"], before["second.bias"])
        else set()
    )
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    for name, value in trained(module, 3).items():
        np.testing.assert_array_equal(value, after[name])


@copied_by
def test_a_copy_keeps_modes_and_what_is_frozen(copied):
    module = Tied().eval()
    module.first.freeze()
    other = copied(module)
    assert not other.training
    assert [name for name, p in other.named_parameters() if not p.requires_grad] == [
        "first.weight",
        "first.bias",
    ]
    assert other.unfreeze().first.bias.requires_grad
    assert not module.first.bias.requires_grad


@both
@copied_by
def test_a_copy_of_a_network_computes_the_same(library, copied):
    lib = library_called(library)
    nn = lib.nn
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)
    )
    x = lib.randn(2, 2, 5, 5)
    module(x).sum().backward()
    module.eval()
    expected = module(x).tolist()
    other = copied(module)
    assert repr(other) == repr(module)
    assert other(x).tolist() == expected
    lib.nn.init.zeros_(other[0].weight)
    assert module(x).tolist() == expected
    assert other(x).tolist() != expected
